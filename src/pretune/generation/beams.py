"""Beam search: find a likely text by extending several candidates (beams) at once.

N texts, B beams per text, V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pretune.generation.config import DecodingConfig
from pretune.generation.decode import Decoder
from pretune.generation.sampling import History, penalized


@dataclass
class _Search:
    """State of the search for one text."""

    room: int
    beams: list[list[int]]
    scores: list[float]
    """Log-probability of each beam; at the start all beams are equal, so only the first one counts."""
    finished: list[tuple[float, list[int]]] = field(default_factory=list)
    """The best finished texts, best first: length-normalized log-probability, and tokens."""


def beam_search(decoder: Decoder, prompts: Sequence[Sequence[int]], config: DecodingConfig) -> list[list[int]]:
    """The best continuation of each prompt, including the token that ended it.

    As in transformers (`generate` with num_beams and early_stopping False), a search ends when the best beam, scored at
    its current length, is worse than the worst of num_beams finished texts. Penalties apply to log-probabilities.
    """
    rooms, width = decoder.room(prompts, config), config.num_beams
    searches = [_Search(room, [[]] * width, [0.0] + [-1e9] * (width - 1)) for room in rooms]
    logits, cache = decoder.read(prompts, max(rooms))
    history = History(prompts, decoder.vocabulary.size, decoder.device) if config.penalizes else None
    active = list(range(len(prompts)))
    parents = [row for row in range(len(prompts)) for _ in range(width)]
    while True:
        rows = torch.tensor(parents, device=decoder.device)
        cache.keep(rows)
        if history is not None:
            history.keep(rows)
        if searches[active[0]].beams[0]:
            tokens = torch.tensor([beam[-1] for text in active for beam in searches[text].beams])
            if history is not None:
                history.add(tokens)
            logits = decoder.next(tokens, cache)
        else:
            logits = logits[rows]
        scores = logits.float().log_softmax(-1)
        if history is not None:
            scores = penalized(scores, config, history)
        candidates = _candidates(scores, [searches[text] for text in active], decoder, width)
        parents, going_on = [], []
        for place, text in enumerate(active):
            origins = _advance(searches[text], candidates[place], decoder.vocabulary.end_ids, config)
            if not _done(searches[text], config):
                parents += [place * width + origin for origin in origins]
                going_on.append(text)
        active = going_on
        if not active:
            return [search.finished[0][1] for search in searches]


def _candidates(
    scores: Tensor, searches: list[_Search], decoder: Decoder, width: int
) -> list[list[tuple[float, int, int]]]:
    """The most likely next steps of each search, best first: log-probability of the text, beam, token.

    There are enough of them that `width` beams remain even if every candidate with an end token is removed.
    """
    count = max(2, 1 + len(decoder.vocabulary.end_ids)) * width
    before = torch.tensor([search.scores for search in searches], device=scores.device)  # [N, B]
    total = (scores.unflatten(0, (-1, width)) + before[..., None]).flatten(1)  # [N, B V]
    best, places = total.topk(min(count, total.shape[1]))
    size = scores.shape[-1]
    return [
        [(score, place // size, place % size) for score, place in zip(*pair, strict=True)]
        for pair in zip(best.tolist(), places.tolist(), strict=True)
    ]


def _advance(
    search: _Search, candidates: list[tuple[float, int, int]], end_ids: frozenset[int], config: DecodingConfig
) -> list[int]:
    """Advance a search by one token; return the previous beam that each new beam extends."""
    length = len(search.beams[0]) + 1
    beams: list[list[int]] = []
    scores: list[float] = []
    origins: list[int] = []
    for rank, (score, beam, token) in enumerate(candidates):
        text = [*search.beams[beam], token]
        if token in end_ids or length >= search.room:
            # Candidates of lower rank exist only so that enough beams remain; they do not count as finished texts.
            if rank < config.num_beams:
                search.finished.append((score / length**config.length_penalty, text))
        elif len(beams) < config.num_beams:
            beams.append(text)
            scores.append(score)
            origins.append(beam)
    search.finished = sorted(search.finished, key=lambda one: -one[0])[: config.num_beams]
    search.beams, search.scores = beams, scores
    return origins


def _done(search: _Search, config: DecodingConfig) -> bool:
    if not search.beams:
        return True
    attainable = search.scores[0] / len(search.beams[0]) ** config.length_penalty
    return len(search.finished) == config.num_beams and attainable <= search.finished[-1][0]
