"""How far a model's distribution over tokens is from a teacher's, with gradients written out.

C positions, M outcomes; p is the teacher's distribution and q the model's. A position's divergence is in nats:

forward_kl       KL(p || q): the model covers all that the teacher may say
reverse_kl       KL(q || p): the model avoids what the teacher would not say
jensen_shannon   beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, as in GKD (arXiv 2306.13649,
                 equation 1): between the two
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence [C] of log-probabilities [C, M], which are normalized and finite, and its gradient [C, M] with
    respect to logits whose log-softmax is log_q."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return (p * (log_p - log_q)).sum(-1), q - p
    if kind == "reverse_kl":
        gap = log_q - log_p
        value = (q * gap).sum(-1)
        return value, q * (gap - value[:, None])
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    gap = log_q - log_m
    of_model = (q * gap).sum(-1)
    value = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * of_model
    return value, (1 - beta) * q * (gap - of_model[:, None])


def soft_distribution(logits: Tensor, temperature: float) -> Tensor:
    """The log-probabilities [C, M] of logits [C, M] divided by the temperature."""
    return (logits / temperature).log_softmax(-1)


def lumped(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [C, K + 1], at the temperature, of K different tokens [C, K], and last of all others taken
    together; and the log-probabilities [C, M] of each of the others, given that it is one of them (-inf for the K).

    K is less than M.
    """
    soft = logits / temperature
    others = soft.scatter(-1, tokens, -torch.inf)
    rest = others.logsumexp(-1, keepdim=True)
    return torch.cat([soft.gather(-1, tokens), rest], -1).log_softmax(-1), others - rest


def spread(slope: Tensor, others: Tensor, tokens: Tensor) -> Tensor:
    """The gradient [C, M] with respect to all logits (over the temperature), from `slope` [C, K + 1], that with respect
    to those of the outcomes of `lumped`, and its `others`."""
    return (others.exp() * slope[:, -1:]).scatter(-1, tokens, slope[:, :-1])
