"""Choose the next token from logits: penalties, filters, sampling.

B rows, V token ids. The order is that of transformers' processors: penalties, temperature, top_k, top_p, min_p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pretune.generation.config import DecodingConfig

_FIRST_LOOK = 256
"""Number of top tokens in which top_p is tried first: sorting all 50,000 takes longer than running a small model."""

_COLDEST = torch.finfo(torch.float32).tiny
"""Smallest temperature; anything smaller would be 0 or subnormal in float32."""


class History:
    """Input of penalties: which ids occur in each row, and how often each has been generated.

    read [B, V] bool, including the prompt; written [B, V] float32, without the prompt.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> None:
        self.read = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        self.written = torch.zeros(len(prompts), vocab_size, device=device)
        for row, prompt in enumerate(prompts):
            known = [token for token in prompt if token < vocab_size]
            self.read[row, torch.tensor(known, dtype=torch.int64, device=device)] = True

    def add(self, tokens: Tensor) -> None:
        """Record one new token per row, tokens [B]."""
        column = tokens.to(self.read.device)[:, None]
        self.read.scatter_(1, column, True)
        self.written.scatter_add_(1, column, torch.ones_like(column, dtype=self.written.dtype))

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows: integer indices, possibly repeated."""
        self.read, self.written = self.read[rows], self.written[rows]


def penalized(logits: Tensor, config: DecodingConfig, history: History) -> Tensor:
    """Logits (or log-probabilities) [B, V] after repetition_penalty and frequency_penalty."""
    if config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(history.read, lowered, logits)
    if config.frequency_penalty:
        logits = logits - config.frequency_penalty * history.written
    return logits


def filtered(logits: Tensor, config: DecodingConfig) -> Tensor:
    """Divide logits [B, V] (float32) by the temperature, which is not 0; set tokens that top_k, top_p or min_p exclude
    to -inf.

    Tokens as likely as the last one kept are kept too.
    """
    # Subtract the maximum before dividing: a tiny temperature then gives -inf for the others instead of NaN for all.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(config.temperature, _COLDEST)
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        logits = _at_least(logits, logits.topk(config.top_k).values[:, -1:])
    if config.top_p is not None and config.top_p < 1:
        logits = _at_least(logits, _nucleus_floor(logits, config.top_p))
    if config.min_p is not None and config.min_p > 0:
        logits = _at_least(logits, logits.amax(-1, keepdim=True) + math.log(config.min_p))
    return logits


def choose(logits: Tensor, config: DecodingConfig, luck: Tensor) -> Tensor:
    """A token id for each row of logits [B, V], on the CPU. luck [B], float64 in [0, 1), is the random number that
    selects a token by cumulative probability. Temperature 0 takes the most likely token."""
    if config.temperature == 0:
        return logits.argmax(-1).cpu()
    # On the CPU, because not every accelerator has float64. In float64, luck * total below is always less than the
    # total.
    cumulative = filtered(logits.float(), config).softmax(-1).cpu().double().cumsum(-1)
    return torch.searchsorted(cumulative, luck[:, None] * cumulative[:, -1:], right=True)[:, 0]


def _at_least(logits: Tensor, floor: Tensor) -> Tensor:
    return logits.masked_fill(logits < floor, -math.inf)


def _nucleus_floor(logits: Tensor, top_p: float) -> Tensor:
    """The lowest logit [B, 1] in the smallest set of most likely tokens whose probabilities sum to top_p."""
    total = logits.logsumexp(-1, keepdim=True)
    top = logits.topk(min(_FIRST_LOOK, logits.shape[-1])).values
    if (top - total).exp().sum(-1).min() < top_p:
        top = logits.sort(-1, descending=True).values
    probabilities = (top - total).exp()
    before = probabilities.cumsum(-1) - probabilities
    kept = (before < top_p).sum(-1, keepdim=True)
    return top.gather(-1, kept.clamp(min=1) - 1)
