"""The options with shapes of published models: what transformers builds from the sizes that it has for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from pretune.core.config import validate
from pretune.model.config import ModelConfig
from pretune.model.costs import skeleton
from pretune.model.counts import count_parameters
from pretune.model.huggingface.config_json import huggingface_config, read_config

PUBLISHED = {
    "smollm_135m": 134_515_008,
    "smollm_360m": 361_821_120,
    "smollm2_135m": 134_515_008,
    "qwen2.5_0.5b": 494_032_768,
    "qwen3_0.6b": 596_049_920,
    "llama3.2_1b": 1_235_814_400,
    "gemma3_270m": 268_098_176,
}
"""Parameters, as the hub counts them in the models' files."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shape_is_the_published_one(name: str, composed: Callable[..., dict[str, Any]], tmp_path: Any) -> None:
    config = validate(ModelConfig, composed("smollama_pretrain", f"model={name}", "model.dropout=0.0")["model"])
    assert count_parameters(skeleton(config)).total == PUBLISHED[name]
    content = huggingface_config(config, 0, "float32")
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**content))
    assert sum(one.numel() for one in theirs.parameters()) == PUBLISHED[name]
    theirs.config.save_pretrained(tmp_path)
    back = read_config(tmp_path)
    layers = range(config.num_layers)  # a pattern may be written out
    assert [back.window_of(layer) for layer in layers] == [config.window_of(layer) for layer in layers]
    assert back.model_copy(update={"init": config.init, "window": config.window}) == config
