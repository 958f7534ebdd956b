"""adapter.init_from names what peft saved on a model of transformers: from its folder to exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from adapted import perturb
from hub_models import reference
from recorded import series
from safetensors.torch import load_file
from start_runs import save_with_tokenizer, write_run

from pretune.core.config import validate
from pretune.data.tokenizer import train_byte_level
from pretune.launch.command_line import main
from pretune.run.config import RunConfig
from pretune.run.folder import find_run
from pretune.run.model import merged_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
KEYS = """\
stage: {init_from: theirs}
adapter: {init_from: adapter, rank: 4, alpha: 6, targets: [TARGETS]}
budget: {steps: 3}
batch: {tokens: 256, micro_batch: 2}
optimizer: {lr: 1e-2}
evaluation: {every: 1}
checkpoint: {every: 1}
"""
TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
CASES: dict[str, tuple[str, Any, str]] = {
    "lora": ("llama", peft.LoraConfig(r=4, lora_alpha=6, **QV), "attention.qkv"),
    "dora": ("llama biases", peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules="all-linear"), "all"),
    "loha": ("llama 3.1", peft.LoHaConfig(r=4, alpha=6, **QV), "attention.qkv"),
    "lora on gpt2": (
        "gpt2",
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True),
        "attention.qkv",
    ),
    "lokr": ("phi3", peft.LoKrConfig(r=4, alpha=6, target_modules="all-linear"), "all"),
}


@pytest.fixture
def make(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], torch.Tensor]:
    """`make(kind)` writes a model, an adapter on it and a run file; the logits of peft's model."""
    monkeypatch.chdir(tmp_path)
    backend = train_byte_level(iter([texts.read_text()]), 300, True)

    def write(kind: str) -> torch.Tensor:
        family, config, targets = CASES[kind]
        write_run(tmp_path / "run.yaml", texts, KEYS.replace("TARGETS", targets), kind.split()[0])
        base = reference(family, vocab_size=320, pad_token_id=0)
        save_with_tokenizer(base, Path("theirs"), backend)
        base.name_or_path = "theirs"
        model = peft.get_peft_model(base, config)
        perturb(model)
        model.save_pretrained("adapter")
        return logits(model)

    return write


def pretune(*overrides: str) -> int:
    return main(["--config", "run.yaml", *overrides])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def own_logits() -> torch.Tensor:
    import yaml

    config = validate(RunConfig, yaml.safe_load(Path("runs/tuned/config.yaml").read_text()))
    model = merged_model(config, find_run("tuned", "runs"), torch.device("cpu")).eval()
    with torch.no_grad():
        return model.unembed(model(TOKENS))[..., :320]


@pytest.mark.parametrize("kind", CASES)
def test_it_is_trained_on_and_belongs_on_the_original_model(
    kind: str, make: Callable[[str], torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    given = make(kind)
    assert pretune("optimizer.lr=1e-12", "optimizer.weight_decay=0.0") == 0
    torch.testing.assert_close(own_logits(), given, rtol=1e-5, atol=1e-5)
    assert ("training adapts them too" in capsys.readouterr().err) == (kind == "lora")
    shutil.rmtree("runs")

    assert pretune() == 0
    losses, trained = series(Path("runs/tuned"), "val/loss"), own_logits()
    assert losses[-1] < losses[0]
    assert (trained - given).abs().max() > 0.01
    config = "runs/tuned/config.yaml"
    assert main(["--config", config, "task=evaluate"]) == 0
    measured = json.loads(Path("runs/tuned/evaluation.json").read_text())["val/loss"]
    assert measured == pytest.approx(losses[-1], abs=1e-5)
    for adapter in ("merge", "keep"):
        assert main(["--config", config, "task=export", f"export.adapter={adapter}", f"export.output={adapter}"]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained("merge")
    torch.testing.assert_close(logits(merged), trained, rtol=1e-5, atol=1e-5)
    original = transformers.AutoModelForCausalLM.from_pretrained("theirs")
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(original, "keep")), trained, rtol=1e-5, atol=1e-5)
    named = peft.AutoPeftModelForCausalLM.from_pretrained("keep")
    torch.testing.assert_close(logits(named), trained, rtol=1e-5, atol=1e-5)


def test_what_was_exported_is_a_start_again(make: Callable[[str], torch.Tensor]) -> None:
    make("lora")
    assert pretune() == 0
    assert main(["--config", "runs/tuned/config.yaml", "task=export", "export.adapter=keep", "export.output=kept"]) == 0
    assert pretune("name=again", "adapter.init_from=kept") == 0
    assert pretune("name=from_run", "adapter.init_from=tuned") == 0
    first, again, from_run = (series(Path("runs") / name, "val/loss") for name in ("tuned", "again", "from_run"))
    assert again[0] == pytest.approx(first[-1], abs=1e-6)
    assert again == from_run


def test_a_resumed_run_does_not_need_it_any_more(
    make: Callable[[str], torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    make("lora")
    assert pretune("name=whole", "checkpoint.keep=3") == 0
    assert pretune("checkpoint.keep=3") == 0
    shutil.rmtree("runs/tuned/checkpoints/step_00000003")
    Path("runs/tuned/summary.json").unlink()
    shutil.rmtree("adapter")
    capsys.readouterr()
    assert pretune("checkpoint.keep=3") == 0
    assert "resumed at step 2" in capsys.readouterr().out
    whole, resumed = (
        load_file(Path("runs") / name / "checkpoints/step_00000003/adapter_model.safetensors")
        for name in ("whole", "tuned")
    )
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("adapter.rank=8",), "the adapter in adapter is another than `adapter` describes: set adapter.rank=4"),
        (("adapter.targets=[all]",), "set adapter.targets=[attention.qkv]"),
        (("stage.init_from=other", "budget.steps=1"), "does not fit the model of stage.init_from: base_model.model."),
        (("adapter.init_from=nowhere",), "adapter.init_from: no run 'nowhere'"),
        (("adapter.init_from=theirs",), "theirs is no run, and holds no adapter: it has no adapter_config"),
    ],
)
def test_what_does_not_fit_is_one_line(
    overrides: tuple[str, ...],
    expected: str,
    make: Callable[[str], torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    make("lora")
    shutil.copytree("theirs", "other")
    reference("llama", vocab_size=320, hidden_size=48).save_pretrained("other")
    capsys.readouterr()
    assert pretune(*overrides) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert expected in line
    assert not Path("runs").exists()


def test_a_plan_counts_its_ranks(make: Callable[[str], torch.Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    make("lora")
    assert pretune("task=plan") == 0
    # Two of three parts of a stack of 64 rows and 32 columns, in three blocks: rank 8.
    assert "2,304" in capsys.readouterr().out
