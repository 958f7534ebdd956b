"""Distillation: learn from the text and from what a teacher, a frozen model, says of each of its tokens (arXiv
1503.02531).

B rows, T tokens, E the teacher's width, K tokens that are kept of its distribution. Batch.reference has `hidden` [B, T,
E], the teacher's hidden states, or with top_k `log_probs` [B, T, K + 1] float16 at the temperature, of its K likeliest
tokens (`tokens` [B, T, K] int32) and last of all others together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pretune.core.batch import Batch
from pretune.objectives.config import DistillationConfig
from pretune.objectives.divergence import lumped
from pretune.objectives.language_modeling import Compile, LanguageModel, score_positions, token_metrics, token_scores
from pretune.objectives.linear_distillation import Mix, Teacher, divergence_from, linear_distillation


class DistillationScores(NamedTuple):
    """Scores of each target, see TokenScores; and the model's divergence from the teacher [B, T] float32, in nats, 0
    where the target is not scored."""

    nll: Tensor
    correct: Tensor
    divergence: Tensor


class Distillation:
    """Distillation: the mean over scored tokens of a mix of cross-entropy and divergence from the teacher.

    teacher: needed for losses and scores unless the batches have the teacher's likeliest tokens.
    """

    first_loss = None

    def __init__(self, config: DistillationConfig, teacher: LanguageModel | None) -> None:
        self._config, self._teacher = config, teacher
        self._mix = Mix(config.alpha, config.temperature, config.divergence, config.beta)

    def sums(self, model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        hidden = model(batch.inputs, batch.document_ids)  # [B, T, D]
        rows, tokens = _said(batch)
        vocabulary = model.config.vocab_size, model.config.softcap
        loss, cross_entropy, divergence = linear_distillation(
            hidden.flatten(0, 1),
            model.head_weight,
            batch.targets.flatten(),
            *vocabulary,
            self._of_teacher(model, rows, tokens),
            self._mix,
            self._config.chunk_tokens,
        )
        return {"loss": loss, "cross_entropy": cross_entropy, "divergence": divergence}

    def count(self, batch: Batch) -> int:
        return batch.num_scored()

    def scorer(self, compiled: Compile | None = None) -> Callable[[LanguageModel, Batch], DistillationScores]:
        hidden_of, scores_of = _hidden, self._scores
        if compiled is not None:
            hidden_of, scores_of = compiled(hidden_of), compiled(scores_of)

        @torch.no_grad()
        def scored(model: LanguageModel, batch: Batch) -> DistillationScores:
            targets, kinds = batch.targets.flatten(), (torch.float32, torch.bool, torch.float32)
            found = [torch.zeros_like(targets, dtype=kind) for kind in kinds]
            rows, tokens = _said(batch)
            along = [hidden_of(model, batch), targets.clamp(min=0), rows, *([] if tokens is None else [tokens])]
            score_positions(
                lambda *own: scores_of(model, *own), along, batch, found, self._config.chunk_tokens, compiled
            )
            return DistillationScores(*(one.view_as(batch.targets) for one in found))

        return scored

    def metrics(
        self, score: Callable[[Batch], DistillationScores], batches: Iterable[Batch], token_bytes: Tensor
    ) -> dict[str, float]:
        """The metrics of next-token prediction, whose loss is the cross-entropy, and the mean divergence."""
        nats = torch.zeros((), dtype=torch.float64)

        def added(batch: Batch) -> DistillationScores:
            scores = score(batch)
            nats.add_(scores.divergence.cpu().double().sum())
            return scores

        metrics = token_metrics(added, batches, token_bytes)
        return {**metrics, "val/divergence": float(nats) / max(metrics["val/tokens"], 1)}

    def _scores(
        self, model: LanguageModel, hidden: Tensor, targets: Tensor, rows: Tensor, tokens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden states [C, D]: see DistillationScores."""
        logits = model.unembed(hidden).float()  # [C, V]
        apart = divergence_from(logits, self._of_teacher(model, rows, tokens), self._mix)
        return *token_scores(logits, targets), apart

    def _of_teacher(self, model: LanguageModel, rows: Tensor, tokens: Tensor | None) -> Teacher:
        if tokens is not None:
            return Teacher(rows, tokens, None, None, model.config.vocab_size)
        assert self._teacher is not None, "hidden states need the teacher's head"
        shape = self._teacher.config
        # What only one of the two tables has is no token of the tokenizer that both share.
        common = min(model.config.vocab_size, shape.vocab_size)
        return Teacher(rows, None, self._teacher.head_weight, shape.softcap, common)


def _hidden(model: LanguageModel, batch: Batch) -> Tensor:
    """Hidden states [B T, D] of the model that is measured."""
    return model(batch.inputs, batch.document_ids).flatten(0, 1)


def _teachers_hidden(teacher: LanguageModel, batch: Batch) -> Tensor:
    """Hidden states [B, T, E] of the teacher, in the dtype of its head: code of its own, compiled for itself."""
    return teacher(batch.inputs, batch.document_ids).to(teacher.head_weight.dtype)


def _said(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """What the teacher says of each position, [B T, ...]."""
    assert batch.reference is not None, "the teacher comes first"
    said = {name: tensor.flatten(0, 1) for name, tensor in batch.reference.items()}
    return (said["log_probs"], said["tokens"]) if "tokens" in said else (said["hidden"], None)


def teacher_outputs(
    config: DistillationConfig, vocab_size: int, compiled: Compile | None
) -> Callable[[LanguageModel, Batch], dict[str, Tensor]]:
    """A function that gives what the loss needs to know of a teacher: see the top of this file. `vocab_size`: that of
    the model in training, whose tokens alone can be among the K."""
    hidden_of = _teachers_hidden if compiled is None else compiled(_teachers_hidden)
    top_k = config.top_k

    def outputs(teacher: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        hidden = hidden_of(teacher, batch)
        if top_k is None:
            return {"hidden": hidden}
        flat, limit = hidden.flatten(0, 1), min(vocab_size, teacher.config.vocab_size)
        # Filled in, and not joined: under autocast to bfloat16, torch refuses to join float16 on a CPU.
        log_probs = flat.new_empty(len(flat), top_k + 1, dtype=torch.float16)
        tokens = flat.new_empty(len(flat), top_k, dtype=torch.int32)
        for start in range(0, len(flat), config.chunk_tokens):
            part = slice(start, start + config.chunk_tokens)
            log_probs[part], tokens[part] = _likeliest(teacher.unembed(flat[part]).float(), limit, top_k, config)
        found = {"log_probs": log_probs, "tokens": tokens}
        return {name: one.unflatten(0, batch.inputs.shape) for name, one in found.items()}

    return outputs


def _likeliest(logits: Tensor, limit: int, top_k: int, config: DistillationConfig) -> tuple[Tensor, Tensor]:
    """Of logits [C, U]: log-probabilities [C, K + 1] and tokens [C, K], the likeliest among the first `limit`."""
    tokens = logits[:, :limit].topk(top_k).indices
    log_probs, _ = lumped(logits, tokens, config.temperature)
    return log_probs.clamp(min=torch.finfo(torch.float16).min).half(), tokens.int()
