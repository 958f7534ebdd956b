"""The loop, run for real on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretune.config import ConfigError, InputError
from pretune.run import run

Compose = Callable[..., dict[str, Any]]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def series(folder: Path, name: str) -> list[float]:
    return [row[name] for row in rows(folder) if name in row]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step_")))
    return load_file(newest / "model.safetensors")


def test_a_run_leaves_what_the_design_promises(tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny("name=one", "samples.every=10", "samples.prompts=[The cat]")) == 0
    folder = tmp_path / "runs" / "one"
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "samples.jsonl", "report.html", "tokenizer"} <= names
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000010", "step_00000020"]
    assert [row["step"] for row in rows(folder) if "train/loss" in row] == [5, 10, 15, 20]
    assert [row["step"] for row in rows(folder) if "val/loss" in row] == [0, 10, 20]
    losses = series(folder, "val/loss")
    assert losses[-1] < losses[0] - 0.5
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == 20
    assert summary["tokens"] == 20 * 256
    assert summary["val/loss"] == losses[-1]


def test_the_learning_rate_ends_where_the_schedule_does(tiny: Compose, tmp_path: Path) -> None:
    overrides = ["schedule=linear", "schedule.warmup=0.25", "report_every=1", "budget.steps=9", "optimizer.lr=1e-3"]
    assert run(tiny("name=one", *overrides)) == 0
    rates = series(tmp_path / "runs" / "one", "train/lr")
    expected = [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert rates == pytest.approx([1e-3 * factor for factor in expected], abs=1e-9)


@pytest.mark.parametrize("packing", ["stream", "documents", "none"])
def test_the_same_updates_whatever_the_micro_batch(packing: str, tiny: Compose, tmp_path: Path) -> None:
    settings = ["budget.steps=4", f"data.packing.mode={packing}", "report_every=1", "precision=fp32"]
    settings += ["data.packing.isolate=true", "precision.compile=false"]
    for micro_batch in (8, 4, 1):
        assert run(tiny(f"name=m{micro_batch}", f"batch.micro_batch={micro_batch}", *settings)) == 0
    runs = tmp_path / "runs"
    for other in ("m4", "m1"):
        for name, tolerance in (("train/loss", 1e-5), ("train/grad_norm", 1e-4)):
            assert series(runs / other, name) == pytest.approx(series(runs / "m8", name), abs=tolerance)


def test_compiled_is_the_same_training(tiny: Compose, tmp_path: Path) -> None:
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        settings = ["precision=fp32", f"precision.compile={compiled}", "budget.steps=3", "report_every=1"]
        assert run(tiny(f"name={name}", *settings)) == 0
    runs = tmp_path / "runs"
    assert series(runs / "compiled", "train/loss") == pytest.approx(series(runs / "eager", "train/loss"), abs=1e-4)
    assert not any("_orig_mod" in name for name in final_weights(runs / "compiled"))
    # Compiling runs a batch that no budget pays for and no random number remembers.
    assert rows(runs / "compiled")[-1]["tokens"] == rows(runs / "eager")[-1]["tokens"]


def test_a_time_budget_anneals_to_its_end(tiny: Compose, tmp_path: Path) -> None:
    settings = ["budget.steps=null", "budget.time=2s", "schedule.final=0.0", "report_every=1", "evaluation.every=null"]
    assert run(tiny("name=timed", *settings)) == 0
    folder = tmp_path / "runs" / "timed"
    summary = json.loads((folder / "summary.json").read_text())
    # Within one step of the budget, and the schedule within one step of its end, however slow the machine is today.
    step = 2.0 / summary["step"]
    assert summary["seconds"] == pytest.approx(2.0, abs=1.5 * step)
    assert summary["train/lr"] < 3e-3 * (0.02 + 1 / summary["step"])


def test_fine_tuning_starts_from_the_runs_weights_and_trains_them_all(tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny("name=base", "budget.steps=10")) == 0
    settings = ["stage=finetune", "stage.init_from=base", "data.tokenizer={kind: inherited}", "optimizer.lr=1e-2"]
    settings += ["schedule=constant", "schedule.warmup=0.0"]
    mapping = tiny("name=tuned", *settings)
    # Hydra merges mappings; a fine-tuning file picks a data option whose tokenizer is inherited.
    mapping["data"]["tokenizer"] = {"kind": "inherited"}
    assert run(mapping) == 0
    runs = tmp_path / "runs"
    assert series(runs / "tuned", "val/loss")[0] == pytest.approx(series(runs / "base", "val/loss")[-1], abs=1e-6)
    before, after = final_weights(runs / "base"), final_weights(runs / "tuned")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (runs / "tuned" / "tokenizer" / "tokenizer.json").read_bytes() == (
        runs / "base" / "tokenizer" / "tokenizer.json"
    ).read_bytes()


def test_word_problems_are_learned_better_than_chance_is(tiny: Compose, composed: Compose, tmp_path: Path) -> None:
    word_problems = composed("quickstart_finetune")["data"]
    assert run(tiny("name=base", "budget.steps=1", "model.max_sequence_length=256")) == 0
    mapping = tiny("name=tuned", "stage=finetune", "stage.init_from=base", "model.max_sequence_length=256")
    mapping["data"] = word_problems
    mapping["data"]["source"]["num_problems"] = 400
    mapping["data"]["validation"]["fraction"] = 0.25
    mapping["data"]["sequence_length"] = 256
    mapping["batch"] = {"tokens": 1024, "micro_batch": 4}
    mapping["evaluation"] |= {"option_accuracy": True, "max_problems": 40}
    assert run(mapping) == 0
    figures = rows(tmp_path / "runs" / "tuned")[-1]
    assert figures["mathqa/chance"] == pytest.approx(0.2)
    assert figures["mathqa/problems"] == 40
    assert 0 <= figures["mathqa/accuracy"] <= 1


class TestBadInput:
    """Each is one message, and nothing is written."""

    @pytest.fixture
    def refused(self, tmp_path: Path) -> Callable[[dict[str, Any]], str]:
        def refuse(mapping: dict[str, Any]) -> str:
            with pytest.raises((InputError, ConfigError)) as caught:
                run(mapping)
            assert not (Path(mapping["output_dir"]) / mapping["name"]).exists()
            return str(caught.value)

        return refuse

    def test_init_from_that_does_not_exist(self, tiny: Compose, refused: Callable[..., str]) -> None:
        assert run(tiny("name=quickstart", "budget.steps=1")) == 0
        message = refused(tiny("name=tuned", "stage=finetune", "stage.init_from=quikstart"))
        assert "no run 'quikstart'; did you mean 'quickstart'?" in message

    def test_init_from_of_another_shape(self, tiny: Compose, refused: Callable[..., str]) -> None:
        assert run(tiny("name=base", "budget.steps=1")) == 0
        message = refused(tiny("name=tuned", "stage=finetune", "stage.init_from=base", "model.mlp_dim=64"))
        assert "do not fit" in message
        assert "[48" in message or "48" in message

    def test_tokenizer_larger_than_the_vocabulary(self, tiny: Compose, refused: Callable[..., str]) -> None:
        message = refused(tiny("name=one", "model.vocab_size=280"))
        assert "the tokenizer has 300 tokens" in message
        assert "280" in message

    def test_an_empty_dataset(self, tiny: Compose, texts: Path, refused: Callable[..., str]) -> None:
        texts.write_text("")
        assert str(texts) in refused(tiny("name=one"))

    def test_a_file_that_is_not_json(self, tiny: Compose, texts: Path, refused: Callable[..., str]) -> None:
        lines = texts.read_text().splitlines()
        lines[6] = '{"text": "no end'
        texts.write_text("\n".join(lines) + "\n")
        message = refused(tiny("name=one"))
        assert str(texts) in message
        assert "line 7" in message

    def test_an_output_folder_that_cannot_be_written(self, tiny: Compose, tmp_path: Path) -> None:
        (tmp_path / "occupied").write_text("a file, not a folder")
        with pytest.raises(InputError, match="cannot write to"):
            run(tiny("name=one", f"output_dir={tmp_path / 'occupied'}"))
        assert (tmp_path / "occupied").read_text() == "a file, not a folder"

    def test_a_device_that_is_not_there(self, tiny: Compose, refused: Callable[..., str]) -> None:
        missing = "mps" if torch.cuda.is_available() else "cuda"
        assert f"device={missing}" in refused(tiny("name=one", f"device={missing}"))

    def test_a_missing_column(self, tiny: Compose, refused: Callable[..., str]) -> None:
        assert "body" in refused(tiny("name=one", "data.format.column=body"))


def test_the_smoke_run_works_as_it_is(composed: Compose, tmp_path: Path) -> None:
    assert run(composed("smoke", f"output_dir={tmp_path / 'runs'}")) == 0
    losses = series(tmp_path / "runs" / "smoke", "val/loss")
    assert losses[-1] < losses[0]
