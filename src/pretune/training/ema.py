"""A moving average of the weights: what a run measures and hands on, while training goes on with the raw ones.

An average of late weights is often better than the last weights, most of all where the learning rate does not go down
or the data is small (arXiv 1803.05407, 2411.18704).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn


M = TypeVar("M", bound="nn.Module")


class EMA(Generic[M]):
    """`model` is a second model, the same but for the trained weights, which are averages of the first one's.

    What is frozen, and buffers, the two have in common. Build it when the first model is in its final form. Averages
    are float32 at least, whatever the weights are.
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
        # What deepcopy finds in its memo it takes for copied already.
        self.model = copy.deepcopy(model, {**averages, **{id(one): one for one in (*frozen, *model.buffers())}})
        self._pairs = [averages[id(parameter)] for parameter in trained], trained
        self._decay, self._warmup = decay, warmup

    def update(self, step: int, skipped: Tensor) -> None:
        """Move the averages towards the weights as they are after `step` steps; not where the newest was `skipped`, a
        scalar of 0 or 1."""
        import torch

        averages, trained = self._pairs
        decay = min(self._decay, (1 + step) / (10 + step)) if self._warmup else self._decay
        wide = [one.detach().to(mean.dtype) for mean, one in zip(averages, trained, strict=True)]
        new: Any = 1 - decay
        if skipped.device.type != "cpu":  # where looking would wait for the device
            new = [new * (1 - skipped)] * len(wide)
        elif skipped:
            return
        with torch.no_grad():
            torch._foreach_lerp_(averages, wide, new)  # pyright: ignore[reportPrivateImportUsage]
