"""NEFTune: uniform noise on the embeddings while a model is trained (arXiv 2310.05914)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def add_embedding_noise(embedding: nn.Module, alpha: float) -> None:
    """From now on, add noise in +-alpha / sqrt(T D) to each value of what `embedding` returns, [B, T, D].

    T is the length of a row, packed or padded. Only in training mode and where gradients are computed: evaluation,
    generation and a frozen reference see none. The noise comes from torch's generator, as dropout does. Compile after.
    """
    import torch

    def noisy(module: nn.Module, _: object, output: Tensor) -> Tensor:
        if not (module.training and torch.is_grad_enabled()):
            return output
        size = alpha / (output.shape[-2] * output.shape[-1]) ** 0.5
        return output + torch.empty_like(output).uniform_(-size, size)

    embedding.register_forward_hook(noisy)
