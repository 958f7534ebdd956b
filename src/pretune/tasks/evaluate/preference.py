"""Measures how well a model tells the better of two answers, on pairs that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pretune.core.batch import Batch
from pretune.core.config import InputError
from pretune.objectives.preference import PairScores, wins


def preference_metrics(score: Callable[[Batch], PairScores], batches: Iterable[Batch]) -> dict[str, float]:
    """Loss, accuracy and rewards over a whole set, each pair counting once; standard errors beside loss and accuracy.

    `accuracy`: share of pairs whose chosen side has the larger reward, equal ones as half: 50% before training. Rewards
    are over the reference. `chosen_nll`: nats per token of the chosen sides, which preference training may well worsen.
    Raises InputError where there is not one pair.
    """
    losses, rewards, log_probs, num_tokens = _gathered(score, batches)
    pairs, won = len(losses), wins(rewards)
    if pairs == 0:
        raise InputError(
            "no held-out pair has anything of both answers left within data.sequence_length; raise it, or "
            "data.validation.fraction"
        )
    chosen, rejected = rewards.sum(dim=0).tolist()
    return {
        "val/loss": float(losses.sum()) / pairs,
        "val/loss_error": _standard_error(losses),
        "preference/accuracy": float(won.sum()) / pairs,
        "preference/accuracy_error": _standard_error(won),
        "preference/margin": (chosen - rejected) / pairs,
        "preference/reward_chosen": chosen / pairs,
        "preference/reward_rejected": rejected / pairs,
        "preference/chosen_nll": -float(log_probs[:, 0].sum() / num_tokens[:, 0].sum()),
        "preference/pairs": pairs,
    }


def _gathered(score: Callable[[Batch], PairScores], batches: Iterable[Batch]) -> list[Tensor]:
    """Loss [N], rewards [N, 2], log-probabilities [N, 2] and numbers of tokens [N, 2] of all pairs, in float64."""
    found: list[list[Tensor]] = []
    for batch in batches:
        scores = score(batch)
        real = scores.real.cpu()
        # On the host: MPS has no float64.
        columns = (scores.loss, scores.rewards, scores.log_probs, scores.num_tokens)
        found.append([column.cpu()[real].double() for column in columns])
    return [torch.cat(column) for column in zip(*found, strict=True)]


def _standard_error(values: Tensor) -> float:
    """Of the mean of independent values."""
    return float(values.std(correction=0)) / math.sqrt(len(values))
