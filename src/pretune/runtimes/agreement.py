"""Check that an exported file computes the same logits as the model."""

from __future__ import annotations

import torch
from torch import Tensor

from pretune.runtimes.executorch.program import Program

PROMPT, STEPS = 12, 4
"""Number of tokens read at once, and of tokens that follow one by one."""

TOLERANCE = 0.05
"""Maximum root mean square of the logit differences, relative to the logits' standard deviation. It allows for 8-bit
activations near a rounding boundary that round the other way; how many do depends on the CPU's kernels (up to 0.032 was
seen, on a Zen 4). The largest difference is less informative, because it grows with the vocabulary."""


def probe(vocab_size: int, length: int = PROMPT + STEPS) -> Tensor:
    """Tokens [1, T] for the comparison, the same at every call."""
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


def program_logits(program: Program, tokens: Tensor) -> Tensor:
    """Logits [T - PROMPT, V] after the first PROMPT of tokens [1, T], read at once, and after each further token but
    the last."""
    cache = program.new_cache(torch.zeros(1, dtype=torch.int64), tokens.shape[1])
    found = []
    for part in (tokens[:, :PROMPT], *tokens[:, PROMPT:-1].split(1, dim=1)):
        cache.advance(part.shape[1])
        found.append(program(part, cache=cache)[0])
    return torch.cat(found)


def largest_difference(found: Tensor, expected: Tensor, name: str) -> float:
    """The largest difference of logits; RuntimeError if they differ by more than rounding explains."""
    differences = found - expected
    difference, typical = float(differences.abs().max()), float(differences.square().mean().sqrt())
    if not typical <= TOLERANCE * float(expected.std()):
        raise RuntimeError(
            f"the logits of {name} differ from the model's by up to {difference:.3g}: do not use it; this is a bug in "
            "Pretune or in a library that it uses, please report it with the run's config.yaml"
        )
    return difference
