"""Whether an exported file computes what the model computes."""

from __future__ import annotations

import torch
from torch import Tensor

from pretune.phone.program import Program

PROMPT, STEPS = 12, 4
"""Tokens that are read at once, and those that follow one by one."""

TOLERANCE = 0.05
"""Largest difference of a logit, as a share of the standard deviation of logits. What it allows for: an activation that
lies between two integers of 8 bits is rounded to the other one."""


def probe(vocab_size: int, length: int = PROMPT + STEPS) -> Tensor:
    """Tokens [1, T] to compare with: the same ones each time."""
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


def program_logits(program: Program, tokens: Tensor) -> Tensor:
    """Logits [T - PROMPT, V] after each of tokens [1, T] but the first ones, which are read at once."""
    cache = program.new_cache(torch.zeros(1, dtype=torch.int64), tokens.shape[1])
    found = []
    for part in (tokens[:, :PROMPT], *tokens[:, PROMPT:-1].split(1, dim=1)):
        cache.advance(part.shape[1])
        found.append(program(part, cache=cache)[0])
    return torch.cat(found)


def largest_difference(found: Tensor, expected: Tensor, name: str) -> float:
    """Of logits; RuntimeError where it is no matter of rounding."""
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE * float(expected.std()):
        raise RuntimeError(
            f"{name} computes other logits than the model, by up to {difference:.3g}: do not use it; this is a mistake "
            "in Pretune or in the libraries beneath it, please report it with the run's config.yaml"
        )
    return difference
