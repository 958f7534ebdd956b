"""Models with the switches of other families, from training to export: all that is done to a model knows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pretune.core.config import ConfigError, validate
from pretune.dispatch import run
from pretune.run.config import RunConfig
from pretune.run.folder import find_run
from pretune.run.model import adapted_model, merged_model

Compose = Callable[..., dict[str, Any]]
WINDOW = ("model.window={size:8,pattern:SL,full_last_layer:false}",)
GEMMA = ("model.activation=geglu", "model.norm.offset=1", "model.scale_embedding=true", "model.init.embedding_std=0.1")
BOTH = (*GEMMA, *WINDOW, "model.norm.placement=both", "model.attention_scale=0.5")
FAMILIES: dict[str, tuple[str, ...]] = {
    "olmo2": ("model.norm.placement=after", "model.qk_norm=true", "model.qk_norm_over=all_heads"),
    "gemma": GEMMA,
    "gemma2": (*BOTH, "model.attention_softcap=5", "model.softcap=9"),
    "gemma3_text": (*BOTH, "model.qk_norm=true", "model.rope.local_theta=100"),
}
TUNE = ("stage=finetune", "stage.init_from=base", "budget.steps=3", "optimizer.lr=1e-2")
TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))


# Models of transformers of all these go through every stage in tests/run/test_stages_from_others.py.
@pytest.fixture(
    params=["olmo2", "gemma3_text", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "gemma2"))]
)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def settings(family: str, tiny: Compose) -> Compose:
    """`settings(*overrides)` of a trained run `base`, of a model of the family."""

    def compose(*overrides: str) -> dict[str, Any]:
        return tiny(f"model.architecture={family}", *FAMILIES[family], "name=base", "budget.steps=4", *overrides)

    assert run(compose("optimizer.lr=1e-2")) == 0
    return compose


def own_logits(mapping: dict[str, Any]) -> torch.Tensor:
    config = validate(RunConfig, mapping)
    model = merged_model(config, find_run(config.name, config.output_dir), torch.device("cpu")).eval()
    with torch.no_grad():
        return model.unembed(model(TOKENS))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_a_run_is_tuned_quantized_generated_from_and_exported(
    settings: Compose, family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    for name, more in {
        "lora": ("adapter=lora", "adapter.rank=2"),
        "qlora": ("adapter=lora", "adapter.rank=2", "quantization=qlora_nf4", "quantization.block_size=16"),
        "qat": ("quantization=qat_int8_int4", "quantization.group_size=16", "quantization.start=0.0"),
        "noisy": ("neftune_alpha=5", "precision.activation_checkpointing=true"),
    }.items():
        assert run(settings(*TUNE, f"name={name}", *more)) == 0
    tuned = settings(*TUNE, "name=lora", "adapter=lora", "adapter.rank=2", "task=export")
    assert run(tuned) == 0
    (folder,) = (runs / "lora" / "export").iterdir()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.model_type == family
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(TOKENS).logits, own_logits(tuned), rtol=1e-4, atol=1e-4)
    capsys.readouterr()
    assert run(settings("task=generate", "generate.prompt=The cat", "generate.max_new_tokens=9")) == 0
    assert run(settings("task=plan")) == 0
    assert "logits and work space" in capsys.readouterr().out


@pytest.mark.parametrize(
    "family", ["gemma2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("olmo2", "gemma", "gemma3_text"))]
)
def test_other_runtimes_compute_it_or_say_why_not(settings: Compose, family: str) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (req-phone.txt)")
    assert run(settings("task=export", "export.format=onnx")) == 0  # which compares both on documents
    if family == "gemma2":
        with pytest.raises(ConfigError, match=r"no softcap.*model\.attention_softcap = 5"):
            run(settings("task=export", "export.format=executorch"))


def test_noise_is_added_to_the_embedding_that_is_scaled(tiny: Compose) -> None:
    config = validate(RunConfig, tiny(*FAMILIES["gemma"], "neftune_alpha=5"))
    model, inputs = adapted_model(config, torch.device("cpu")), []
    model.layers[0].register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].detach()))
    for training in (True, False):
        model.train(training)(TOKENS)
    noise, limit = inputs[0] - inputs[1], 5 / (24 * 32) ** 0.5
    assert 0.9 * limit < noise.abs().max() <= 1.001 * limit
