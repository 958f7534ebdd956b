"""stage.init_from names a model of others: from its folder to a trained run, by the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hub_models import reference
from recorded import series, weights
from safetensors.torch import load_file, save_file
from start_runs import save_with_tokenizer, write_run

from pretune.data.tokenizer import train_byte_level
from pretune.launch.command_line import main

KEYS = """\
budget: {steps: 2}
batch: {tokens: 256, micro_batch: 2}
optimizer: {lr: 1e-3}
evaluation: {every: 1}
checkpoint: {every: 1}
"""


@pytest.fixture
def make(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`make(case)`: the folder of one of transformers' models, with a tokenizer."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run.yaml", texts, KEYS)
    backend = train_byte_level(iter([texts.read_text()]), 300, True)

    def folder_of(case: str, name: str = "theirs", **changes: Any) -> Path:
        folder = tmp_path / name
        save_with_tokenizer(reference(case, vocab_size=320, **changes), folder, backend)
        return folder

    return folder_of


def pretune(*overrides: str | Path) -> int:
    return main(["--config", "run.yaml", *map(str, overrides)])


def refused(capsys: pytest.CaptureFixture[str], *overrides: str | Path) -> str:
    """The one line of a refusal, after which nothing has been written."""
    capsys.readouterr()
    assert pretune(*overrides) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists()
    return line


def validation_loss(folder: Path, texts: Path) -> float:
    """transformers' own loss of a model, in nats per token, over the run's validation documents."""
    import transformers
    from tokenizers import Tokenizer

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer, total, count = Tokenizer.from_file(str(folder / "tokenizer.json")), 0.0, 0
    end = tokenizer.token_to_id("<|endoftext|>")
    held_out = json.loads(texts.read_text())
    for text in held_out:
        ids = torch.tensor([[*tokenizer.encode(text).ids, end]])
        logits = model(ids[:, :-1]).logits[0]
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize("case", ["llama 3.1", "qwen2"])
def test_the_first_loss_is_that_of_transformers(case: str, make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make(case)
    held_out = ["the cat sees the dog and the house", "then it was there quickly under a red house"]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out))
    (tmp_path / "held.json").write_text(json.dumps(held_out))
    apart = (
        "data/source@data.validation.source=files",
        "data.validation.source.files=[held.jsonl]",
        "data.validation.fraction=null",
        "data/format=text",
        "data.packing.mode=documents",
        "data.packing.isolate=true",
    )
    assert pretune(f"stage.init_from={folder}", *apart) == 0
    expected = validation_loss(folder, tmp_path / "held.json")
    assert series(tmp_path / "runs" / "tuned", "val/loss")[0] == pytest.approx(expected, abs=1e-5)


def test_the_model_section_is_that_of_the_folder_and_saved(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("qwen2 windows")
    assert pretune(f"stage.init_from={folder}", "model.dropout=0.1", "model.max_sequence_length=128") == 0
    model = yaml.safe_load((tmp_path / "runs/tuned/config.yaml").read_text())["model"]
    assert (model["num_layers"], model["dim"], model["num_kv_heads"], model["vocab_size"]) == (3, 32, 2, 320)
    assert (model["bias"]["qkv"], model["window"]["pattern"], model["rope"]["theta"]) == (True, "LSS", 5e5)
    assert (model["dropout"], model["max_sequence_length"]) == (0.1, 128)
    said = capsys.readouterr().err
    assert "note: model.max_sequence_length is 128, and was 96 in" in said
    # The run has all that it needs: it goes on, and is exported and used, without the folder it began from.
    shutil.rmtree(folder)
    assert main(["--config", "runs/tuned/config.yaml", "budget.steps=3", "name=tuned"]) == 2  # another budget
    assert main(["--config", "runs/tuned/config.yaml", "task=evaluate"]) == 0
    assert pretune(f"stage.init_from={folder}", "model.dropout=0.1", "model.max_sequence_length=128") == 0
    assert "is complete" in capsys.readouterr().out


def test_any_run_file_takes_any_model(make: Callable[..., Path], tmp_path: Path) -> None:
    """A run of Pretune's is a start like any other: its model need not be repeated either."""
    folder = make("llama")
    assert pretune(f"stage.init_from={folder}") == 0
    assert pretune("stage.init_from=tuned", "name=second") == 0
    first, second = (
        yaml.safe_load((tmp_path / "runs" / name / "config.yaml").read_text())["model"] for name in ("tuned", "second")
    )
    assert first == second


def test_an_adapter_is_merged_into_the_weights_of_the_folder(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make("llama")
    assert pretune(f"stage.init_from={folder}", "adapter=lora", "adapter.rank=2") == 0
    config = "runs/tuned/config.yaml"
    assert main(["--config", config, "task=evaluate"]) == 0
    measured = json.loads((tmp_path / "runs/tuned/evaluation.json").read_text())["val/loss"]
    assert measured == pytest.approx(series(tmp_path / "runs/tuned", "val/loss")[-1], abs=1e-5)
    # The same name with other weights: nothing is computed with them.
    tensors = load_file(folder / "model.safetensors")
    save_file({name: one + 0.01 for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert main(["--config", config, "task=evaluate"]) == 2
    assert "started from other weights than" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert main(["--config", config, "task=evaluate"]) == 2
    assert "stage.init_from: no run" in capsys.readouterr().err


def test_training_begins_with_the_weights_of_the_folder(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make("llama biases")
    assert pretune(f"stage.init_from={folder}", "optimizer.lr=1e-12", "optimizer.weight_decay=0.0") == 0
    ours, theirs = weights(tmp_path / "runs/tuned", 2), load_file(folder / "model.safetensors")
    torch.testing.assert_close(ours["embedding.weight"], theirs["model.embed_tokens.weight"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model=nano", "theirs is another model than `model` says (model.dim = 256, but 32 there; "),
        ("model.num_layers=2", "theirs is another model than `model` says (model.num_layers = 2, but 3 there): take"),
        ("model.activation=geglu", "(model.activation = geglu, but swiglu there): take its own with model=auto"),
        ("stage.init_from=nowhere", "stage.init_from: no run 'nowhere'. There are no runs in runs yet. A model on the"),
        ("stage.init_from=theirs/none", "stage.init_from: no run 'theirs/none'"),
        ("stage.init_from=empty", "empty has neither config.yaml (a run) nor config.json (a model in Hugging Face"),
        ("stage.init_from=adapter", "adapter holds an adapter: give it as adapter.init_from"),
        ("stage.init_from=pickled", "pickled has its weights only in pytorch_model.bin, a pickle, which may run code"),
        ("stage.init_from=small", "300 tokens, the model's vocabulary only 200; it is not the tokenizer of small"),
        (
            "data/tokenizer=file data.tokenizer.path=other.json data.tokenizer.eos=<|endoftext|>",
            "data.tokenizer is not the tokenizer of theirs, which the run starts",
        ),
        ("data.sequence_length=128", "data.sequence_length (128) exceeds the model's number of positions"),
    ],
)
def test_what_does_not_fit_is_one_line(
    override: str, expected: str, make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("llama")
    for name, file in (("empty", "notes.txt"), ("adapter", "adapter_config.json"), ("pickled", "pytorch_model.bin")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    shutil.copy(tmp_path / "theirs/config.json", tmp_path / "pickled")
    shutil.copytree(tmp_path / "theirs", tmp_path / "small")
    reference("llama", vocab_size=200).save_pretrained(tmp_path / "small")
    train_byte_level(iter(["zebras quack"] * 9), 280, True).save(str(tmp_path / "other.json"))
    given = [override] if override.startswith("stage") else ["stage.init_from=theirs", *override.split()]
    assert expected in refused(capsys, *given)


def test_a_plan_needs_no_weights(make: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = make("mistral 0.1")
    (folder / "model.safetensors").unlink()
    assert pretune(f"stage.init_from={folder}", "task=plan") == 0
    assert "parameters" in capsys.readouterr().out
