"""Predict a run's loss, to within a few tenths, from its numbers of parameters and tokens (a scaling law)."""

from __future__ import annotations

import math

# L(N, D) = E + A / N^alpha + B / D^beta, in nats per token, fitted by Besiroglu et al. (arXiv:2404.10102) to the runs
# of Hoffmann et al. (arXiv:2203.15556): N all parameters, D tokens of MassiveText, each read once, SentencePiece with
# 32,000 entries, cosine schedules that end with the run.
E, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658

# Other data and tokenizers have other losses. Two runs with GPT-2's tokenizer show how far off the fit can be:
#   180M parameters, 1.31e9 tokens of SlimPajama: 3.096 (the reference system); the fit says 3.43
#   124M parameters, 1.0e10 tokens of FineWeb:    3.28 (llm.c, the baseline of modded-nanogpt); the fit says 3.01


def fitted_loss(parameters: float, tokens: float, vocab_size: int) -> float | None:
    """The loss by the published fit, in nats per token; None if it exceeds that of guessing among `vocab_size` tokens:
    the fit does not hold for so few tokens."""
    loss = E + A / parameters**ALPHA + B / tokens**BETA
    return loss if loss < math.log(vocab_size) else None
