"""EMA: an exponential moving average of the weights, used for evaluation and later runs, while training continues with
the raw weights.

Averaged weights are often better than the last weights, especially if the learning rate does not decay or the data set
is small (arXiv 1803.05407, 2411.18704).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pretune.core.named_tensors import local

if TYPE_CHECKING:
    from torch import Tensor, nn


M = TypeVar("M", bound="nn.Module")


class EMA(Generic[M]):
    """Its `model` is a second model whose trained weights are averages of the first model's.

    The two share frozen weights and buffers. Build it when the first model is in its final form. Averages are at least
    float32, whatever the dtype of the weights.
    """

    def __init__(self, model: M, decay: float, warmup: bool) -> None:
        import torch

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        averages: dict[int, Tensor] = {
            id(parameter): torch.nn.Parameter(
                parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True), False
            )
            for parameter in trained
        }
        # deepcopy treats tensors in its memo as already copied: frozen ones are shared, trained ones become averages.
        self.model = copy.deepcopy(model, {**averages, **{id(one): one for one in (*frozen, *model.buffers())}})
        self._pairs = [averages[id(parameter)] for parameter in trained], trained
        self._decay, self._warmup = decay, warmup

    def follow(self, model: M) -> None:
        """Go on with other tensors of the same names, in both models: they have been shared out over processes."""
        own = dict(self.model.named_parameters())
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._pairs = [own[name] for name in trained], [*trained.values()]

    def update(self, step: int, skipped: Tensor) -> None:
        """Move the averages towards the weights after `step` steps, unless the newest step was `skipped`, a scalar of 0
        or 1."""
        import torch

        averages, trained = ([local(one) for one in tensors] for tensors in self._pairs)
        decay = min(self._decay, (1 + step) / (10 + step)) if self._warmup else self._decay
        wide = [one.detach().to(mean.dtype) for mean, one in zip(averages, trained, strict=True)]
        new: Any = 1 - decay
        if skipped.device.type != "cpu":  # reading `skipped` on the host would synchronize the device
            new = [new * (1 - skipped)] * len(wide)
        elif skipped:
            return
        with torch.no_grad():
            torch._foreach_lerp_(averages, wide, new)  # pyright: ignore[reportPrivateImportUsage]
