"""Models of others go through every stage, and what cannot be had for a family is refused by name."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from recorded import series
from safetensors.torch import load_file
from stand_ins import ALPACA, CHATS, FAMILIES, MATHQA, PREFERENCES, RUNS, TINY, VOCABULARY, stand_in, write_data

from pretune.core.config import validate
from pretune.launch.command_line import main
from pretune.model.transformer import Transformer
from pretune.run.config import RunConfig
from pretune.run.folder import find_run
from pretune.run.model import evaluation_model

TOKENS = torch.randint(0, 200, (2, 40), generator=torch.Generator().manual_seed(1))
LORA = ("adapter=lora", "adapter.rank=2", "optimizer.lr=1e-2")
STAGES: dict[str, tuple[str, ...]] = {
    "full": ("optimizer.lr=1e-2",),
    "lora": LORA,
    "qlora": (*LORA, "quantization=qlora_nf4", "quantization.block_size=32"),
    "qat": ("optimizer.lr=1e-2", "quantization=qat_int8_int4", "quantization.group_size=16", "quantization.start=0.0"),
    "dpo": (*PREFERENCES, "optimizer.lr=1e-3"),
}
QUICK = {("llama", "full"), ("llama", "dpo"), ("qwen2", "lora"), ("qwen2", "qat"), ("gemma2", "full"),
         ("gemma2", "qlora"), ("gpt2", "lora"), ("gpt2", "dpo")}  # fmt: skip
SAYS_NOTHING = {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "transformers_version",
                "max_window_layers", "original_max_position_embeddings", "n_ctx"}  # fmt: skip
"""Keys of config.json that end texts, describe the file, or repeat other keys."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)


def pretune(file: str | Path, *overrides: str) -> int:
    return main(["--config", str(file), *overrides])


def tune(family: str, *overrides: str) -> int:
    """Train a run `tuned` on Alpaca's form, from the folder named after the family."""
    own = () if "stage=dpo" in overrides else ALPACA
    return pretune(
        RUNS / "smollm_135m_mathqa.yaml", "name=tuned", f"stage.init_from={family}", "data=alpaca",
        "evaluation.option_accuracy=false", *own, *TINY, *overrides,
    )  # fmt: skip


def own_logits(name: str) -> torch.Tensor:
    """The logits that Pretune's own model of a run has for TOKENS, its adapter merged and its weights rounded."""
    config = validate(RunConfig, yaml.safe_load(Path(f"runs/{name}/config.yaml").read_text()))
    model = Transformer(config.model).eval()
    model.load_state_dict(evaluation_model(config, find_run(name, "runs"), torch.device("cpu")).state_dict())
    with torch.no_grad():
        return model.unembed(model(TOKENS))[..., :VOCABULARY]


def exported(name: str) -> list[Path]:
    assert pretune(f"runs/{name}/config.yaml", "task=export") == 0
    return list(Path(f"runs/{name}/export").iterdir())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize(
    ("family", "stage"),
    [
        pytest.param(family, stage, marks=() if (family, stage) in QUICK else pytest.mark.slow)
        for family in FAMILIES
        for stage in STAGES
    ],
)
def test_a_stage_trains_and_comes_back_as_what_came_in(family: str, stage: str) -> None:
    folder = stand_in(Path(family), *FAMILIES[family])
    assert tune(family, *STAGES[stage]) == 0
    assert pretune("runs/tuned/config.yaml", "task=evaluate") == 0
    assert pretune("runs/tuned/config.yaml", "task=generate", "generate.prompt=The", "generate.max_new_tokens=5") == 0
    (back,) = exported("tuned")
    model = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert model.config.model_type == family
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(TOKENS).logits, own_logits("tuned"), rtol=1e-4, atol=1e-4)
    before, after = (load_file(one / "model.safetensors") for one in (folder, back))
    assert {key: one.shape for key, one in before.items()} == {key: one.shape for key, one in after.items()}
    assert all(one.isfinite().all() for one in after.values())
    moved = [key for key, one in before.items() if not torch.equal(one, after[key])]
    assert moved, "training changed nothing"
    configs = [transformers.AutoConfig.from_pretrained(one).to_dict() for one in (folder, back)]
    ours, theirs = ({key: value for key, value in one.items() if key not in SAYS_NOTHING} for one in configs)
    assert ours == theirs


RUN_FILES: dict[str, tuple[str, str, bool, tuple[str, ...]]] = {
    "smollm_135m_mathqa": ("llama tied, wide heads", "qwen2", False, MATHQA),
    "smollm_135m_sft": ("llama tied, wide heads", "qwen2", False, CHATS),
    "qwen2.5_0.5b_mathqa_lora": ("qwen2", "qwen2", True, (*MATHQA, "adapter.rank=2")),
    "llama3.2_1b_qlora": ("llama 3.1", "llama3", False, (*ALPACA, "adapter.rank=2", "quantization.block_size=32")),
}
"""Of each run file that starts from a model on the hub: a stand-in, whether it has a chat template, and its data."""


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_file_runs_at_tiny_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tokenizer, template, more = RUN_FILES[name]
    folder = stand_in(Path("theirs"), case, tokenizer, template)
    assert pretune(RUNS / f"{name}.yaml", f"stage.init_from={folder}", *TINY, *more) == 0
    config = f"runs/{name}/config.yaml"
    assert series(Path("runs") / name, "val/loss")
    if "mathqa" in name:
        assert series(Path("runs") / name, "mathqa/accuracy")
    (back,) = exported(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(back).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, own_logits(name), rtol=1e-4, atol=1e-4)
    if name == "smollm_135m_sft":  # the export has the template that the base model lacks, and the run can be talked to
        own = transformers.AutoTokenizer.from_pretrained(back)
        turn = own.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
        assert turn == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        assert own.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
        monkeypatch.setattr(sys, "stdin", io.StringIO("2 cats?\n/quit\n"))
        assert pretune(config, "task=generate", "generate.chat=true", "generate.max_new_tokens=3") == 0


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    assert code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("family", "override", "expected"),
    [
        ("gpt2", "model.max_sequence_length=1024", "(model.max_sequence_length = 1024, but 512 there): take"),
        ("gpt2", "model/rope/scaling=linear", "which this model has not (rope.fraction = 0, as in GPT-2): set it"),
        ("gemma2", "model.attention_softcap=null", "(model.attention_softcap = null, but 2.0 there): take"),
        ("gemma2", "model.norm.placement=before", "architecture = gemma2 contradicts model.norm.placement = before"),
        ("qwen2", "model.bias.qkv=false", "model.architecture = qwen2 contradicts model.bias.qkv = false"),
        ("llama", "quantization=qat_int8_int4", "group_size (32) does not divide the 48 inputs of the layer mlp.down"),
        ("llama", "quantization=qlora_nf4", "full fine-tuning would have to train them: choose adapter=lora"),
    ],
)
def test_what_a_family_cannot_have_is_refused_before_training(
    family: str, override: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(Path(family), *FAMILIES[family])
    capsys.readouterr()
    assert expected in refused(capsys, tune(family, override))
    assert not Path("runs").exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize(
    ("family", "trained", "override", "expected"),
    [
        ("gemma2", (), "export.format=executorch", "(model.attention_softcap = 2, as in Gemma 2); use"),
        ("gpt2", ("adapter=loha", "adapter.rank=2"), "export.adapter=keep", "peft has no LOHA for GPT-2's layers"),
        ("llama", ("adapter=lokr", "adapter.rank=2"), "export.adapter=keep", "has q_proj, k_proj, v_proj in place of"),
    ],
)
def test_what_a_family_cannot_be_exported_as_is_refused(
    family: str, trained: tuple[str, ...], override: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "executorch" in override:
        pytest.importorskip("executorch", reason="executorch is not installed (req-phone.txt)")
    stand_in(Path(family), *FAMILIES[family])
    assert tune(family, *trained) == 0
    assert expected in refused(capsys, pretune("runs/tuned/config.yaml", "task=export", override))
    assert not Path("runs/tuned/export").exists() or not list(Path("runs/tuned/export").iterdir())
