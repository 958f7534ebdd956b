"""A run whose numbers are no longer finite ends, says why, and leaves a good checkpoint as its newest."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import losses, rows
from safetensors.torch import load_file, save_file

from pretune.checkpoint import store as checkpoint
from pretune.core.config import InputError
from pretune.core.files import measure, read_sealed, write_sealed
from pretune.dispatch import run
from pretune.optim.budget import Step
from pretune.tasks.train.running import Instruments, Run
from pretune.training.divergence import EXIT_DIVERGED
from pretune.training.signals import EXIT_STOPPED

Compose = Callable[..., dict[str, Any]]
BASE = ("name=a", "tracker=none", "budget.steps=40", "checkpoint.every=5", "log_every=5", "samples.prompts=[]")


def broken_from(first: int, last: float = math.inf, then: Callable[[], None] = lambda: None) -> Instruments:
    """Instruments with which steps `first` to `last`, counted from 1, read an embedding that is not finite. `then` is
    called as the third of them begins."""
    hooks: list[Any] = []

    def begin(training: Run, what: object) -> None:
        step = training.state.step + 1
        broken = first <= step <= last
        if hooks and not broken:
            hooks.pop().remove()
        if broken and not hooks:
            embedding = training.parts.model.embedding
            hooks.append(embedding.register_forward_hook(lambda *read: read[-1] * math.nan))
        if isinstance(what, Step) and step == first + 2:
            then()

    return Instruments(on_begin=begin)


def saved_steps(folder: Path) -> list[int]:
    return sorted(checkpoint.step_of(path) for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_diverged_run_ends_with_its_last_good_checkpoint(
    precision: str, tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mapping = tiny(*BASE, f"precision={precision}", "precision.compile=false", "evaluation.every=null")
    assert run(mapping, broken_from(8)) == EXIT_DIVERGED
    said = capsys.readouterr().err.splitlines()[-1]
    for part in ("diverged", "since step 8", "the checkpoint of step 5 is kept", "name=a-2", "optimizer.lr"):
        assert part in said
    folder = tmp_path / "runs" / "a"
    assert saved_steps(folder) == [5]
    assert not (folder / "summary.json").exists()
    assert rows(folder)[-1]["step"] == 20  # the first report after ten such steps in a row
    # The cause gone, the same command goes on.
    assert run(mapping) == 0


def test_patience_is_a_key(tiny: Compose, tmp_path: Path) -> None:
    settings = (*BASE, "evaluation.every=null")
    assert run(tiny(*settings, "divergence.patience=3"), broken_from(8)) == EXIT_DIVERGED
    assert rows(tmp_path / "runs" / "a")[-1]["step"] == 10
    assert run(tiny(*settings, "name=b", "divergence.patience=null"), broken_from(8, 35)) == 0
    assert saved_steps(tmp_path / "runs" / "b") == [5, 40]


def test_a_few_bad_steps_are_no_divergence(tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny(*BASE, "checkpoint.keep=null", "evaluation.every=null"), broken_from(8, 12)) == 0
    assert saved_steps(tmp_path / "runs" / "a") == [5, 15, 20, 25, 30, 35, 40]  # not 10, where nothing was known


def test_a_loss_scale_that_is_too_high_is_no_divergence(tiny: Compose) -> None:
    failed: list[int] = []

    def begin(training: Run, what: object) -> None:
        training.state.loss_scale.factor = 2.0**120  # the gradients of each step overflow a hundred times
        failed.append(training.state.failed)

    mapping = tiny(*BASE, "precision=fp16", "precision.compile=false", "budget.steps=3", "divergence.patience=1")
    assert run(mapping, Instruments(on_begin=begin)) == 0
    assert set(failed) == {0}


def test_an_evaluation_without_a_finite_loss_ends_it_at_once(tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny(*BASE, "evaluation.every=10"), broken_from(10)) == EXIT_DIVERGED
    assert rows(tmp_path / "runs" / "a")[-1]["step"] == 10
    assert run(tiny(*BASE, "name=b", "evaluation.every=null"), broken_from(39)) == EXIT_DIVERGED
    assert saved_steps(tmp_path / "runs" / "b") == [30, 35]
    assert not (tmp_path / "runs" / "b" / "summary.json").exists()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_saves_no_weights_that_are_not_finite(tiny: Compose, tmp_path: Path) -> None:
    def begin(training: Run, what: object) -> None:
        if isinstance(what, Step) and training.state.step == 7:
            next(iter(training.parts.model.parameters())).data[0, 0] = math.inf
            stop()

    assert run(tiny(*BASE), Instruments(on_begin=begin)) == EXIT_DIVERGED
    assert saved_steps(tmp_path / "runs" / "a") == [5]


@pytest.mark.parametrize(("first", "start"), [(1, "begin again"), (8, "resume from step 5")])
def test_a_signal_among_bad_steps_puts_nothing_before_the_good_checkpoint(
    first: int, start: str, tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights may be lost although they are finite. Steps are taken again instead, and nothing else is different."""
    folder = tmp_path / "runs" / "a"
    mapping = tiny(*BASE, "checkpoint.keep=1", "evaluation.every=5", "budget.steps=20", "model.dropout=0.1")
    assert run(mapping, broken_from(first, then=stop)) == EXIT_STOPPED
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"stopped at step {first + 1}, after 2 steps without a finite loss and gradient")
    assert said.endswith(f"the same command will {start}.")
    assert checkpoint.pick(folder / "checkpoints", "best") == checkpoint.newest(folder / "checkpoints")
    assert run(mapping) == 0
    assert run(mapping | {"name": "whole"}) == 0
    assert losses(folder) == losses(tmp_path / "runs" / "whole")


def spoil(path: Path, file: str) -> None:
    """Give a checkpoint a weight that is not finite, as an older version may have saved it."""
    tensors = load_file(path / file)
    name = min(name for name in tensors if tensors[name].ndim == 2)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path / file, {"format": "pt"})
    state = read_sealed(path / "state.json")
    state["files"][file] = measure(path / file)
    write_sealed(path / "state.json", state)


@pytest.mark.parametrize("task", ["generate", "evaluate", "export", "train"])
@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_weights_that_are_not_finite_are_refused(task: str, adapter: bool, tiny: Compose, tmp_path: Path) -> None:
    short = ("tracker=none", "budget.steps=2", "evaluation.every=null")
    tune = ("stage=finetune", "stage.init_from=base")
    lora = (*tune, "data.tokenizer.kind=trained", "adapter=lora", "adapter.rank=2")
    assert run(tiny("name=base", *short)) == 0
    if adapter:
        assert run(tiny("name=lora", *short, *lora)) == 0
    name, file = ("lora", "adapter_model.safetensors") if adapter else ("base", "model.safetensors")
    spoil(next((tmp_path / "runs" / name / "checkpoints").iterdir()), file)
    more = lora if adapter else ()
    asked = (f"name={name}", *more, f"task={task}", "generate.prompt=hi")
    if task == "train":
        asked = ("name=next", *tune, "data.tokenizer.kind=trained", f"stage.init_from={name}")
    with pytest.raises(InputError, match=r"are not finite \(.*checkpoint\.use=STEP"):
        run(tiny(*short, *asked))
    if task == "export" and adapter:
        with pytest.raises(InputError, match="are not finite"):
            run(tiny(*short, *asked, "export.adapter=keep"))
