"""What a run is trained from and measured with: by content, wherever it lies, and never something else in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged import flip
from recorded import losses, rows, series, weights

from pretune.core.config import ConfigError, UserError
from pretune.dispatch import run
from pretune.launch.compose import composed, plain
from pretune.launch.place import placed

Compose = Callable[..., dict[str, Any]]
PowerCut = Callable[..., None]
BASE = ("name=base", "budget.steps=4", "samples.prompts=[]", "tracker=none")
TUNE = ("stage=finetune", "budget.steps=6", "optimizer.lr=1e-2", "samples.prompts=[]", "tracker=none")
LORA = (*TUNE, "adapter=lora", "adapter.rank=4")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def of(folder: Path, *overrides: str) -> dict[str, Any]:
    """What `--config FOLDER/config.yaml` and overrides come to."""
    file = folder / "config.yaml"
    with composed(file, placed(file, overrides)) as config:
        return plain(config, file)


def loss_of(folder: Path, *overrides: str) -> float:
    """The validation loss that task=evaluate finds for the run in a folder."""
    assert run(of(folder, "task=evaluate", *overrides)) == 0
    return json.loads((folder / "evaluation.json").read_text())["val/loss"]


def refused(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(mapping)
    assert "\n" not in str(caught.value)


def test_a_moved_run_goes_on_where_it_lies(
    tiny: Compose, power_cut: PowerCut, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("budget.steps=8", "checkpoint.every=2", "model.dropout=0.1")
    assert run(tiny("name=whole", *settings)) == 0
    monkeypatch.chdir(tmp_path)
    power_cut(tiny("name=cut", "output_dir=runs", *settings), 6)
    moved = Path(shutil.move(runs / "cut", tmp_path / "elsewhere" / "renamed"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert run(of(moved)) == 0
    assert losses(moved) == losses(runs / "whole")
    assert list((tmp_path / "empty").iterdir()) == []
    assert {path.name for path in runs.iterdir()} == {"whole"}


def test_a_copied_run_is_itself(tiny: Compose, runs: Path) -> None:
    assert run(tiny(*BASE)) == 0
    shutil.copytree(runs / "base", runs / "copy")
    trained = runs / "base" / "checkpoints" / "step_00000004"
    assert run(tiny(*BASE, "name=other", "seed=5")) == 0
    shutil.rmtree(trained)
    shutil.copytree(runs / "other" / "checkpoints" / "step_00000004", trained)
    assert loss_of(runs / "copy") == series(runs / "copy", "val/loss")[-1]
    assert loss_of(runs / "base") == series(runs / "other", "val/loss")[-1]


def test_an_adapter_is_not_applied_twice(tiny: Compose, runs: Path) -> None:
    assert run(tiny(*BASE)) == 0
    assert run(tiny("name=lora", *LORA, "stage.init_from=base")) == 0
    last = series(runs / "lora", "val/loss")[-1]
    more = ("evaluation.at_start=true", "adapter.init_from=lora")
    assert run(tiny("name=on", *LORA, "stage.init_from=base", *more)) == 0
    assert series(runs / "on", "val/loss")[0] == pytest.approx(last, abs=1e-6)
    refused(tiny("name=twice", *LORA, "stage.init_from=lora", *more), "trained on other weights than this model has")
    checkpoint = runs / "lora" / "checkpoints" / "step_00000006"
    by_path = (*more, f"adapter.init_from={checkpoint}")
    refused(tiny("name=twice", *LORA, "stage.init_from=lora", *by_path), "trained on other weights than this model has")
    assert not (runs / "twice").exists()


@pytest.mark.parametrize("task", ["evaluate", "generate", "export"])
def test_a_base_is_not_exchanged_in_silence(task: str, tiny: Compose, runs: Path) -> None:
    assert run(tiny(*BASE)) == 0
    assert run(tiny("name=lora", *LORA, "stage.init_from=base")) == 0
    assert run(tiny("name=on_lora", *LORA, "stage.init_from=lora")) == 0
    shutil.rmtree(runs / "lora")
    # The same base below it, so that only the weights of the adapter's layers differ.
    assert run(tiny("name=lora", *LORA, "stage.init_from=base", "seed=5")) == 0
    mapping = of(runs / "on_lora", f"task={task}", "generate.prompt=The")
    refused(mapping, r"on_lora started from other weights than .*lora has now")


def test_a_base_moves_with_its_runs(tiny: Compose, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tiny(*BASE, "output_dir=runs")) == 0
    for name, start in (
        ("by_name", "base"),
        ("by_path", "runs/base"),
        ("by_step", "runs/base/checkpoints/step_00000004"),
    ):
        assert run(tiny(f"name={name}", "output_dir=runs", *LORA, f"stage.init_from={start}")) == 0
    shutil.move(runs, tmp_path / "moved")
    for name in ("by_name", "by_path", "by_step"):
        folder = tmp_path / "moved" / name
        assert loss_of(folder) == pytest.approx(series(folder, "val/loss")[-1], abs=1e-6)


def test_a_base_that_moved_alone_is_found_when_its_place_is_given(
    tiny: Compose, power_cut: PowerCut, runs: Path, tmp_path: Path
) -> None:
    settings = (*LORA, "stage.init_from=base", "checkpoint.every=2")
    assert run(tiny(*BASE)) == 0
    assert run(tiny("name=whole", *settings)) == 0
    power_cut(tiny("name=cut", *settings), 4)
    moved = Path(shutil.move(runs / "base", tmp_path / "away"))
    for folder, task in ((runs / "whole", "evaluate"), (runs / "cut", "train")):
        refused(of(folder, f"task={task}"), r"stage\.init_from: no run 'base'")
    last = series(runs / "whole", "val/loss")[-1]
    assert loss_of(runs / "whole", f"stage.init_from={moved}") == pytest.approx(last, abs=1e-6)
    assert run(of(runs / "cut", f"stage.init_from={moved}")) == 0
    assert losses(runs / "cut") == losses(runs / "whole")
    assert run(tiny("name=base2", *BASE[1:], "seed=3")) == 0
    refused(of(runs / "cut", "stage.init_from=base2", "task=evaluate"), "started from other weights than .*base2 has")


def test_the_start_of_a_run_cannot_be_changed_afterwards(tiny: Compose, power_cut: PowerCut, runs: Path) -> None:
    assert run(tiny(*BASE)) == 0
    assert run(tiny("name=another", *BASE[1:], "seed=3")) == 0
    power_cut(tiny("name=tuned", *TUNE, "stage.init_from=base", "checkpoint.every=2"), 4)
    refused(of(runs / "tuned", "stage.init_from=another"), "tuned started from other weights than .*another has")
    power_cut(tiny("name=first", *BASE[1:], "checkpoint.every=1"), 3)
    with pytest.raises(ConfigError, match=r"stage\.init_from: None -> base: .*first did not start there"):
        run(of(runs / "first", "stage.init_from=base"))
    # All weights are in its own checkpoints: it goes on without its base.
    shutil.rmtree(runs / "base")
    assert run(of(runs / "tuned")) == 0


def test_an_adapter_keeps_the_checkpoint_that_it_was_trained_on(tiny: Compose, runs: Path, tmp_path: Path) -> None:
    settings = ("name=base", "budget.steps=8", "checkpoint.every=4", "checkpoint.keep=null")
    assert run(tiny(*settings)) == 0
    later = runs / "base" / "checkpoints" / "step_00000008"
    shutil.move(later, tmp_path / "later")
    assert run(tiny("name=lora", *LORA, "stage.init_from=base")) == 0
    shutil.move(tmp_path / "later", later)
    assert loss_of(runs / "lora") == pytest.approx(series(runs / "lora", "val/loss")[-1], abs=1e-6)


def test_the_adapter_to_start_from_is_read_with_its_hash(tiny: Compose, runs: Path) -> None:
    assert run(tiny(*BASE)) == 0
    assert run(tiny("name=lora", *LORA, "stage.init_from=base")) == 0
    path = runs / "lora" / "checkpoints" / "step_00000006" / "adapter_model.safetensors"
    flip(path, -2)
    refused(
        tiny("name=on", *LORA, "stage.init_from=base", "adapter.init_from=lora"), "adapter_model.safetensors is dam"
    )
    refused(of(runs / "lora", "task=evaluate"), "adapter_model.safetensors is damaged")


TOKENIZER_DAMAGE: dict[str, Callable[[Path], object]] = {
    "tokenizer.json": lambda folder: flip(folder / "tokenizer.json"),
    "tokenizer_config.json": lambda folder: flip(folder / "tokenizer_config.json"),
    "another eos": lambda folder: (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}'),
    "empty": lambda folder: (folder / "tokenizer_config.json").write_text(""),
    "a template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "missing": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("damage", TOKENIZER_DAMAGE)
def test_a_damaged_tokenizer_is_not_used(damage: str, tiny: Compose, runs: Path) -> None:
    assert run(tiny(*BASE)) == 0
    folder = runs / "base" / "tokenizer"
    TOKENIZER_DAMAGE[damage](folder)
    for task in ("evaluate", "generate", "export"):
        refused(
            of(runs / "base", f"task={task}", "generate.prompt=The"), r"the tokenizer in .*base/tokenizer is damaged"
        )
    inherits = tiny("name=next", *LORA, "stage.init_from=base")
    inherits["data"]["tokenizer"] = {"kind": "inherited", "add_tokens": []}
    refused(inherits, "is damaged")
    shutil.rmtree(folder)  # as the message says
    assert loss_of(runs / "base") == series(runs / "base", "val/loss")[-1]


def test_another_tokenizer_in_the_place_of_a_runs_own_is_not_used(tiny: Compose, runs: Path) -> None:
    assert run(tiny(*BASE)) == 0
    assert run(tiny("name=other", *BASE[1:], "data.tokenizer.vocab_size=280")) == 0
    shutil.rmtree(runs / "base" / "tokenizer")
    shutil.copytree(runs / "other" / "tokenizer", runs / "base" / "tokenizer")
    for task in ("evaluate", "generate", "export"):
        refused(of(runs / "base", f"task={task}", "generate.prompt=The"), "base was trained with another tokenizer")
    shutil.rmtree(runs / "base" / "tokenizer")
    refused(
        of(runs / "base", "task=generate", "generate.prompt=x", "data.tokenizer.vocab_size=290"), "another tokenizer"
    )


def test_weights_are_the_same_whatever_the_run_is_called(tiny: Compose, runs: Path) -> None:
    assert run(tiny(*BASE)) == 0
    assert run(tiny("name=again", *BASE[1:])) == 0
    assert weights(runs / "base", 4).keys() == weights(runs / "again", 4).keys()
    assert run(tiny("name=lora", *LORA, "stage.init_from=base")) == 0
    shutil.rmtree(runs / "base")
    (runs / "again").rename(runs / "base")
    assert loss_of(runs / "lora") == pytest.approx(rows(runs / "lora")[-1]["val/loss"], abs=1e-6)


def test_results_of_one_checkpoint_do_not_replace_those_of_another(tiny: Compose, runs: Path) -> None:
    assert run(tiny(*BASE, "checkpoint.every=2", "checkpoint.keep=null")) == 0
    found = {loss_of(runs / "base", f"checkpoint.use={step}") for step in (2, 4)}
    found.add(loss_of(runs / "base", "quantization=int8_int4", "quantization.group_size=16"))
    found.add(loss_of(runs / "base", "data.sequence_length=16"))
    kept = list((runs / "base" / "evaluations").glob("step-*.json"))
    assert len(kept) == len(found) == 4
    assert {json.loads(path.read_text())["val/loss"] for path in kept} == found
    loss_of(runs / "base", "checkpoint.use=2")
    assert set((runs / "base" / "evaluations").glob("step-*.json")) == set(kept)
