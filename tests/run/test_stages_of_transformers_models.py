"""Models that transformers computes go through every stage, and what cannot be had for them is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from library_models import SIZES, library_model
from published import model_folder
from recorded import series
from safetensors.torch import load_file
from stand_ins import ALPACA, PREFERENCES, RUNS, TINY, VOCABULARY, write_data

from pretune.core.config import validate
from pretune.launch.command_line import main
from pretune.run.config import RunConfig
from pretune.run.folder import find_run
from pretune.run.model import evaluation_model

TOKENS = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(1))
LORA = ("adapter=lora", "adapter.rank=2", "optimizer.lr=1e-2")
STAGES: dict[str, tuple[str, ...]] = {
    "full": ("optimizer.lr=1e-2",),
    "lora": LORA,
    "dpo": (*PREFERENCES, "optimizer.lr=1e-3"),
    "dpo with lora": (*PREFERENCES, *LORA),
}
QUICK = {("mixtral", "full"), ("mixtral", "dpo with lora"), ("mamba", "lora"), ("mamba", "dpo")}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)


def pretune(file: str | Path, *overrides: str) -> int:
    return main(["--config", str(file), *overrides])


def stand_in(kind: str) -> Path:
    """A folder with a tiny model as its publishers would write it."""
    folder = model_folder(Path(kind), "qwen2")
    ends = (folder / "generation_config.json").read_text()
    library_model(kind, vocab_size=VOCABULARY, max_position_embeddings=512).inner.save_pretrained(folder)
    (folder / "generation_config.json").write_text(ends)
    return folder


def tune(start: str, *overrides: str, name: str = "tuned") -> int:
    """Train a run on Alpaca's form, from a folder or a run."""
    own = () if "stage=dpo" in overrides else ("data=alpaca", *ALPACA)
    return pretune(
        RUNS / "smollm_135m_mathqa.yaml", f"name={name}", f"stage.init_from={start}", "data=alpaca",
        "evaluation.option_accuracy=false", *own, *TINY, *overrides,
    )  # fmt: skip


def own_logits(name: str) -> torch.Tensor:
    """The logits that a run's model has for TOKENS, its adapter merged."""
    config = validate(RunConfig, yaml.safe_load(Path(f"runs/{name}/config.yaml").read_text()))
    model = evaluation_model(config, find_run(name, "runs"), torch.device("cpu")).eval()
    with torch.no_grad():
        return model.unembed(model(TOKENS))


def exported(name: str, *overrides: str) -> Path:
    before = set(Path(f"runs/{name}/export").glob("*"))
    assert pretune(f"runs/{name}/config.yaml", "task=export", *overrides) == 0
    (folder,) = set(Path(f"runs/{name}/export").iterdir()) - before
    return folder


def assert_comes_back(name: str, kind: str) -> Path:
    """A run is evaluated, writes, and is exported as what it is."""
    config = f"runs/{name}/config.yaml"
    assert pretune(config, "task=evaluate") == 0
    measured = json.loads(Path(f"runs/{name}/evaluation.json").read_text())["val/loss"]
    assert measured == pytest.approx(series(Path("runs") / name, "val/loss")[-1], abs=1e-5)
    assert pretune(config, "task=generate", "generate.prompt=The", "generate.max_new_tokens=5") == 0
    back = exported(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(back).eval()
    assert model.config.model_type == kind
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, own_logits(name), rtol=1e-4, atol=1e-4)
    return back


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        pytest.param(kind, stage, marks=() if (kind, stage) in QUICK else pytest.mark.slow)
        for kind in ("mixtral", "mamba")
        for stage in STAGES
    ],
)
def test_a_stage_trains_and_comes_back_as_what_came_in(
    kind: str, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stand_in(kind)
    assert tune(kind, *STAGES[stage]) == 0
    said = capsys.readouterr().err
    assert f'because our own transformer cannot: {kind}/config.json: model_type = "{kind}" is none of' in said
    assert said.count("each document is computed in a row of its own") == (kind == "mamba")
    back = assert_comes_back("tuned", kind)
    before, after = (load_file(one / "model.safetensors") for one in (folder, back))
    assert {key: one.shape for key, one in before.items()} == {key: one.shape for key, one in after.items()}
    assert any(not torch.equal(one, after[key]) for key, one in before.items()), "training changed nothing"


def test_new_tokens_are_learned_and_exported() -> None:
    stand_in("mixtral")
    table = load_file("mixtral/model.safetensors")["model.embed_tokens.weight"]
    assert tune("mixtral", "optimizer.lr=1e-2", "data.tokenizer.add_tokens=[<ask>,<tell>]") == 0
    section = yaml.safe_load(Path("runs/tuned/config.yaml").read_text())["model"]
    back = assert_comes_back("tuned", "mixtral")
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    ids = tokenizer.convert_tokens_to_ids(["<ask>", "<tell>"])
    assert ids == [len(tokenizer) - 2, len(tokenizer) - 1]
    grown = load_file(back / "model.safetensors")["model.embed_tokens.weight"]
    assert len(grown) == section["vocab_size"] == max(len(tokenizer), len(table))
    assert tune("tuned", "optimizer.lr=1e-2", name="again") == 0, "a run starts from it"


SCRATCH = """\
# @package _global_
defaults:
  - /base
  - override /data: files
  - override /model: transformers
  - _self_
name: scratch
data: {source: {files: [texts.jsonl]}, validation: {fraction: 0.2}}
ema: {decay: 0.9}
model: {vocab_size: 300, config: CONFIG}
"""


@pytest.mark.parametrize("kind", ["mixtral", "mamba"])
def test_random_weights_are_pretrained_and_fine_tuned(kind: str, tmp_path: Path) -> None:
    sizes = {"model_type": kind, **{key: one for key, one in SIZES[kind].items() if key != "vocab_size"}}
    sizes |= {"max_position_embeddings": 512}
    (tmp_path / "scratch.yaml").write_text(SCRATCH.replace("CONFIG", json.dumps(sizes)))
    texts = [{"text": f"the cat number {n} sees a dog and a house. " * 3} for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    assert pretune("scratch.yaml", *TINY) == 0
    assert_comes_back("scratch", kind)
    assert tune("scratch", "optimizer.lr=1e-2", name="second") == 0
    first, second = (yaml.safe_load(Path(f"runs/{name}/config.yaml").read_text()) for name in ("scratch", "second"))
    assert first["model"] == second["model"] == {"kind": "transformers", "vocab_size": 300, "config": sizes}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_an_adapter_is_kept_for_peft_and_taken_back(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    stand_in("phi")
    assert tune("phi", *LORA, "adapter.targets=[attention,fc1]") == 0
    kept = exported("tuned", "export.adapter=keep")
    assert json.loads((kept / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "phi")
    names = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in load_file(kept / "adapter_model.safetensors")}
    assert names == {"q_proj", "k_proj", "v_proj", "dense", "fc1"}
    theirs = AutoPeftModelForCausalLM.from_pretrained(kept).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, own_logits("tuned"), rtol=1e-4, atol=1e-4)
    again = ("adapter=lora", "adapter.rank=2", "adapter.targets=[attention,fc1]", f"adapter.init_from={kept}")
    assert tune("phi", *again, "optimizer.lr=1e-30", name="again") == 0
    torch.testing.assert_close(own_logits("again"), own_logits("tuned"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "more"), [("mixtral", ("precision.activation_checkpointing=true",)), ("mamba", ("precision=bf16",))]
)
def test_a_plan_counts_what_transformers_builds(kind: str, more: tuple[str, ...]) -> None:
    stand_in(kind)
    assert tune(kind, "task=plan", "plan.device=a100-40gb", "plan.file=plan.json", *more) == 0
    plan = json.loads(Path("plan.json").read_text())
    model = library_model(kind, vocab_size=VOCABULARY, max_position_embeddings=512)
    assert sum(plan["parameters"].values()) == sum(one.numel() for one in model.inner.parameters())
    assert plan["memory"]["weights"] >= 4 * sum(plan["parameters"].values())
    assert plan["memory"]["activations"] > 0
    assert plan["biggest"] == []


def test_weights_in_4_bits_below_an_adapter() -> None:
    stand_in("gpt_neox")
    assert tune("gpt_neox", *LORA, "quantization=qlora_nf4", "quantization.block_size=32") == 0
    assert_comes_back("tuned", "gpt_neox")


def test_what_our_transformer_holds_can_be_computed_by_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    stand_in("gemma2")
    assert tune("gemma2", name="ours") == 0
    assert "transformers computes this model" not in capsys.readouterr().err
    assert tune("gemma2", "model=transformers", "+model.config.attention_dropout=0.0", name="theirs") == 0
    losses = [series(Path("runs") / name, "val/loss") for name in ("ours", "theirs")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("quantization=qat_int8_int4",), "quantization=qat_int8_int4 is only for Pretune's own transformer, not for"),
        (("export.format=executorch",), "export.format=executorch is only for Pretune's own transformer, not for"),
        (("export.format=onnx", "precision=fp8"), "export.format=onnx, precision=fp8 are only for Pretune's own"),
        ((*LORA, "adapter.targets=[embedding]"), "adapter.targets = embedding and head is only for Pretune's own"),
        (
            (*LORA, "data.tokenizer.add_tokens=[<ask>]"),
            "data.tokenizer.add_tokens with an adapter is only for Pretune's own transformer, not for",
        ),
        (("model=transformers", "model.vocab_size=500"), "(model.vocab_size = 500, but 448 there): take its own"),
        ((*LORA, "adapter.targets=[c_attn]"), "adapter.targets: 'c_attn' matches no linear layer; did you mean"),
        ((*LORA, "quantization=qlora_nf4"), "so that they cannot be stored in 4 bits; use quantization=none"),
        (
            ("model.dropout=0.1",),
            "model.dropout is a key of our own transformer, which cannot hold mamba: leave",
        ),
        (("model=transformers", "+model.config.model_type=falcon_mamba"), "another architecture than model.config"),
        (
            ("model=transformers", "+model.config.model_type=opt"),
            "transformers does not build this opt: embed_dim must",
        ),
        (("model=transformers", "+model.config.state_size=x"), "transformers does not take this config of model_type"),
    ],
)
def test_what_such_a_model_cannot_have_is_refused_before_training(
    overrides: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in("mamba")
    capsys.readouterr()
    assert expected in refused(capsys, tune("mamba", *overrides))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "brand_new"}, "nor can transformers (new/config.json: model_type = 'brand_new' is no"),
        (
            {"model_type": "brand_new", "auto_map": {"AutoModelForCausalLM": "modeling_new.New"}},
            "it needs code that comes with the model (modeling_new.New), which is never run",
        ),
    ],
)
def test_an_architecture_that_nobody_builds_is_named(
    config: dict[str, object], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder(Path("new"), "qwen2")
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert expected in refused(capsys, tune("new"))
    assert not Path("runs").exists()
