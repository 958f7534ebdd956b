"""Whether an exported file computes what the model computes."""

from __future__ import annotations

import torch
from torch import Tensor

from pretune.runtimes.executorch.program import Program

PROMPT, STEPS = 12, 4
"""Tokens that are read at once, and those that follow one by one."""

TOLERANCE = 0.05
"""Root mean square of the differences of logits, as a share of their standard deviation. What it allows for:
activations that lie between two integers of 8 bits are rounded to the other one, and how many depends on the CPU's
kernels (up to 0.032 was seen, on a Zen 4). The largest of them all says less: it grows with the vocabulary."""


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
    """Of logits; RuntimeError where they differ by more than rounding."""
    differences = found - expected
    difference, typical = float(differences.abs().max()), float(differences.square().mean().sqrt())
    if not typical <= TOLERANCE * float(expected.std()):
        raise RuntimeError(
            f"{name} computes other logits than the model, by up to {difference:.3g}: do not use it; this is a mistake "
            "in Pretune or in the libraries beneath it, please report it with the run's config.yaml"
        )
    return difference
