"""Import peft without torchao's warnings about kernels for other machines and about future torch versions."""

from __future__ import annotations

from pretune.core.quiet import quiet

with quiet():
    import peft
    from peft.tuners.loha.layer import Linear as PeftLoha
    from peft.tuners.lokr.layer import Linear as PeftLokr
    from peft.tuners.lora.layer import Embedding as PeftLoraEmbedding
    from peft.tuners.lora.layer import Linear as PeftLora
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper, get_pattern_key

__all__ = [
    "BaseTunerLayer",
    "ModulesToSaveWrapper",
    "PeftLoha",
    "PeftLokr",
    "PeftLora",
    "PeftLoraEmbedding",
    "TrainableTokensLayer",
    "TrainableTokensWrapper",
    "get_pattern_key",
    "get_peft_model_state_dict",
    "peft",
]
