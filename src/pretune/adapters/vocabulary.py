"""LoRA on the embedding and on the output head.

Losses multiply hidden states by the head's weight themselves, a chunk of positions at a time, so the weight that the
head shows is the sum of its own and of the update.

V token ids, D model width.
"""

from __future__ import annotations

from torch import Tensor, nn

from pretune.adapters.layers import ADAPTER, LoraLinear
from pretune.adapters.quiet_peft import PeftLora


class LoraHead(LoraLinear):
    @property
    def weight(self) -> Tensor:
        """The weight with the update, [V, D]; differentiable by the factors."""
        own = self.get_base_layer().weight
        assert isinstance(own, Tensor)
        return own if self.disable_adapters or self.merged else own + self.get_delta_weight(ADAPTER)


def use_whole_head(model: nn.Module) -> None:
    """Replace the class of the head's adapter in `model`, if it has one."""
    head = getattr(model, "head", None)
    if isinstance(head, PeftLora):
        head.__class__ = LoraHead
