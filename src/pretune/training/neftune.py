"""NEFTune: uniform noise on the embeddings during training (arXiv 2310.05914)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def add_embedding_noise(embedding: nn.Module, alpha: float) -> None:
    """Add uniform noise in +-alpha / sqrt(T D) to each output value of `embedding`, [B, T, D], from now on.

    T is the length of a row, packed or padded. Noise is added only in training mode with gradients on: evaluation,
    generation and a frozen reference model get none. It comes from torch's generator, like dropout. Call this before
    compiling.
    """
    import torch

    def noisy(module: nn.Module, _: object, output: Tensor) -> Tensor:
        if not (module.training and torch.is_grad_enabled()):
            return output
        size = alpha / (output.shape[-2] * output.shape[-1]) ** 0.5
        return output + torch.empty_like(output).uniform_(-size, size)

    embedding.register_forward_hook(noisy)
