"""Direct preference optimization from pairs of answers (DPO, arXiv 2305.18290).

B rows, T tokens, at most P pairs per row; the last axis of [B, P, 2] is chosen, rejected. Batch describes how rows hold
pairs; its reference has log_probs [B, P, 2] float32, of both sides under the reference model: P is at least the largest
number of pairs in a row, and entries without a pair are undefined. Log-probabilities are in nats, of the scored tokens
(the answer and its end token) given all tokens before them, and are summed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretune.core.batch import IGNORE, Batch
from pretune.core.config import InputError
from pretune.objectives.config import DPOConfig
from pretune.objectives.cross_entropy import linear_token_losses
from pretune.objectives.language_modeling import Compile, LanguageModel


class PairScores(NamedTuple):
    """Scores of each pair in a batch; where `real` is false there is no pair, and the other values are undefined.

    loss [B, P]; rewards [B, P, 2]: beta times the log-probability gained over the reference; log_probs [B, P, 2] and
    num_tokens [B, P, 2] of both sides; real [B, P] bool.
    """

    loss: Tensor
    rewards: Tensor
    log_probs: Tensor
    num_tokens: Tensor
    real: Tensor


def dpo(model: LanguageModel, batch: Batch, config: DPOConfig) -> dict[str, Tensor]:
    """Sums over the pairs of the batch, by name: float32 scalars. `loss` is minimized.

    Divide them once, by the number of pairs in the whole step. `accuracy` counts pairs whose chosen side has the larger
    reward; ties count half.
    """
    scores = score_pairs(model, batch, config)
    chosen, rejected = scores.rewards.detach().unbind(-1)
    scores_by_name = {
        "loss": scores.loss,
        "accuracy": wins(scores.rewards.detach()),
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "reward_margin": chosen - rejected,
    }
    return {name: torch.where(scores.real, value, 0).sum() for name, value in scores_by_name.items()}


def score_pairs(model: LanguageModel, batch: Batch, config: DPOConfig) -> PairScores:
    """Loss and rewards of each pair in the batch, which must have `reference` log-probabilities."""
    assert batch.reference is not None, "the reference comes first"
    reference = batch.reference["log_probs"]
    width = reference.shape[1]
    log_probs = pair_log_probs(model, batch, config.chunk_tokens)[:, :width]
    num_tokens = _sums_by_side((batch.targets != IGNORE).float(), batch)[:, :width]
    gained = log_probs - reference
    if config.length_normalized:
        gained = gained / num_tokens.clamp(min=1)
    rewards = config.beta * gained
    margin = rewards[..., 0] - rewards[..., 1]
    loss = -F.logsigmoid(margin)
    if config.label_smoothing:
        loss = (1 - config.label_smoothing) * loss - config.label_smoothing * F.logsigmoid(-margin)
    # With too_long = cut, a pair may have lost a whole answer; it is not scored then.
    return PairScores(loss, rewards, log_probs, num_tokens, (num_tokens > 0).all(-1))


def pair_log_probs(model: LanguageModel, batch: Batch, chunk_tokens: int) -> Tensor:
    """Log-probability of each side of each pair: [B, T // 2 + 1, 2] float32, differentiable."""
    hidden = model(batch.inputs, batch.document_ids)  # [B, T, D]
    losses = linear_token_losses(
        hidden.flatten(0, 1),
        model.head_weight,
        batch.targets.flatten(),
        model.config.vocab_size,
        model.config.softcap,
        chunk_tokens,
    )
    return _sums_by_side(-losses.view_as(batch.targets), batch)


def reference_outputs(
    config: DPOConfig, compiled: Compile | None
) -> Callable[[LanguageModel, Batch], dict[str, Tensor]]:
    """A function that gives the log-probabilities under a reference model, as Batch.reference holds them."""
    log_probs_of = pair_log_probs if compiled is None else compiled(pair_log_probs)
    return lambda model, batch: {"log_probs": log_probs_of(model, batch, config.chunk_tokens)}


def num_pairs(batch: Batch) -> int:
    """The number of pairs in the batch that have scored tokens on both sides."""
    scored = _sums_by_side((batch.targets != IGNORE).float(), batch)
    return int((scored > 0).all(-1).sum())


def wins(rewards: Tensor) -> Tensor:
    """1 where the chosen side [..., 0] has the larger reward, 0.5 for ties, else 0."""
    return 0.5 + 0.5 * (rewards[..., 0] - rewards[..., 1]).sign()


def _sums_by_side(values: Tensor, batch: Batch) -> Tensor:
    """Sums of values [B, T] over the documents of each row, in pairs: [B, T // 2 + 1, 2]."""
    assert batch.document_ids is not None, "pairs are told apart by the ids of their documents"
    rows, length = values.shape
    # Ids are at most T: padding after T documents of one token each would have id T.
    sums = values.new_zeros(rows, 2 * (length // 2 + 1))
    return sums.scatter_add(1, batch.document_ids.long(), values).unflatten(1, (-1, 2))


class Preference:
    """Direct preference optimization: the mean loss over pairs."""

    first_loss = math.log(2)
    """At the start, model and reference are equal, so that the margin is 0."""

    def __init__(self, config: DPOConfig) -> None:
        self._config = config

    def sums(self, model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
        return dpo(model, batch, self._config)

    def count(self, batch: Batch) -> int:
        return num_pairs(batch)

    def scorer(self, compiled: Compile | None = None) -> Callable[[LanguageModel, Batch], PairScores]:
        def scored(model: LanguageModel, batch: Batch) -> PairScores:
            return score_pairs(model, batch, self._config)

        return scored if compiled is None else compiled(scored)

    def metrics(
        self, score: Callable[[Batch], PairScores], batches: Iterable[Batch], token_bytes: Tensor
    ) -> dict[str, float]:
        return preference_metrics(score, batches)


def preference_metrics(score: Callable[[Batch], PairScores], batches: Iterable[Batch]) -> dict[str, float]:
    """Loss, accuracy and rewards over a whole set, each pair counting once; with standard errors of loss and accuracy.

    `accuracy`: share of pairs whose chosen side has the larger reward, ties counting half: 50% before training. Rewards
    are relative to the reference. `chosen_nll`: nats per token of the chosen sides; it may well rise during training.
    Raises InputError if there are no pairs.
    """
    losses, rewards, log_probs, num_tokens = _gathered(score, batches)
    pairs, won = len(losses), wins(rewards)
    if pairs == 0:
        raise InputError(
            "no held-out pair has scored tokens of both answers within data.sequence_length; raise it, or "
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
    """Loss [N], rewards [N, 2], log-probabilities [N, 2] and token counts [N, 2] of all pairs, in float64."""
    found: list[list[Tensor]] = []
    for batch in batches:
        scores = score(batch)
        real = scores.real.cpu()
        # On the host, because MPS has no float64.
        columns = (scores.loss, scores.rewards, scores.log_probs, scores.num_tokens)
        found.append([column.cpu()[real].double() for column in columns])
    return [torch.cat(column) for column in zip(*found, strict=True)]


def _standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values."""
    return float(values.std(correction=0)) / math.sqrt(len(values))
