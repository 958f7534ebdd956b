"""Precision of a run: what `auto` chooses, float16 with loss scaling, and skipped steps."""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from operators import Operators
from preference_data import write_preferences
from recorded import series
from safetensors.torch import load_file
from torch import Tensor

from pretune.compute import loss_scale
from pretune.core.config import ConfigError, validate
from pretune.dispatch import run
from pretune.optim.budget import Step
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, read_config
from pretune.run.precision import print_notes, resolve
from pretune.tasks.train.running import Instruments, Run

Compose = Callable[..., dict[str, Any]]
PowerCut = Callable[..., None]
TUNE = ("stage=finetune", "stage.init_from=base", "data.tokenizer.kind=trained", "budget.steps=6", "optimizer.lr=1e-2")
QAT = ("quantization=qat_int8_int4", "quantization.group_size=16")
QLORA = ("adapter=lora", "quantization=qlora_nf4", "quantization.block_size=32")


def tensors(folder: Path, step: int) -> dict[str, Tensor]:
    path = folder / "checkpoints" / f"step_{step:08d}"
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """`cpu(bfloat16)`: torch says that this machine's CPU has instructions for bfloat16, or that it has none."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    return lambda bfloat16: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16})


def forty_times_slower(precision: str) -> float:
    """FLOP/s of a CPU without instructions for 16 bits."""
    return 4e10 if precision == "float32" else 1e9


# ---- what `auto` chooses


@pytest.mark.parametrize(
    ("bfloat16", "expected", "why"),
    [(True, "bfloat16", "AVX-512-BF16"), (False, "float32", "this CPU has no bf16 instructions")],
)
def test_auto_is_decided_said_and_written_down(
    bfloat16: bool, expected: str, why: str, cpu: Callable[[bool], None], tiny: Compose, tmp_path: Path, capsys: Any
) -> None:
    cpu(bfloat16)
    assert run(tiny("name=one", "precision=auto", "precision.compile=false", "budget.steps=2")) == 0
    shown = {"bfloat16": "bf16", "float32": "fp32"}[expected]
    assert f"on cpu in {shown} ({why}), from random weights" in capsys.readouterr().out
    assert read_config(tmp_path / "runs" / "one" / "config.yaml")["precision"]["compute"] == expected


def test_a_run_goes_on_as_it_began_unless_told_otherwise(
    cpu: Callable[[bool], None], tiny: Compose, tmp_path: Path, power_cut: PowerCut, capsys: Any
) -> None:
    settings = ("name=one", "precision.compile=false", "budget.steps=20")
    file = tmp_path / "runs" / "one" / "config.yaml"
    cpu(True)
    power_cut(tiny(*settings, "precision=auto"), 12)
    # On another machine, without instructions for it: done all the same, after a line with the way out.
    cpu(False)
    (note,) = resolve(
        validate(RunConfig, tiny(*settings, "precision=auto")), RunFolder(file.parent), forty_times_slower
    ).notes
    assert "bf16, which this run was trained in, is 40 times slower here than fp32" in note
    assert "precision=fp32 switches to that" in note
    capsys.readouterr()
    power_cut(tiny(*settings, "precision=auto"), 2)
    assert "in bf16 (as the run began), resumed at step 10" in capsys.readouterr().out
    assert read_config(file)["precision"]["compute"] == "bfloat16"
    # The alternative works.
    assert run(tiny(*settings, "precision=fp32")) == 0
    out, err = capsys.readouterr()
    assert "from here on fp32, as asked; so far this run was trained in bf16" in err
    assert "in fp32, resumed at step 10" in out
    assert read_config(file)["precision"]["compute"] == "float32"


def test_what_was_asked_for_by_name_is_done_after_a_line(
    cpu: Callable[[bool], None], tiny: Compose, capsys: Any
) -> None:
    cpu(False)
    mapping = tiny("name=one", "precision=bf16", "precision.compile=false", "budget.steps=2")
    found = resolve(validate(RunConfig, mapping), None, forty_times_slower)
    (note,) = found.notes
    assert "bf16, as asked, is 40 times slower here than fp32; precision=fp32" in note
    print_notes(found)
    assert capsys.readouterr().err == f"note: {note}\n"
    assert run(mapping) == 0
    assert "on cpu in bf16, from random weights" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["evaluate", "generate", "plan"])
def test_other_tasks_compute_as_the_run_did(
    task: str, cpu: Callable[[bool], None], tiny: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu(True)
    assert run(tiny("name=one", "precision=auto", "precision.compile=false", "budget.steps=1")) == 0
    cpu(False)
    opened: list[torch.dtype] = []
    genuine = torch.autocast

    def watched(device: str, dtype: torch.dtype | None = None, **more: Any) -> Any:
        opened.extend([] if dtype is None else [dtype])
        return genuine(device, dtype=dtype, **more)

    monkeypatch.setattr(torch, "autocast", watched)
    settings = ("precision=auto", "precision.compile=false", "generate.prompt=The", f"task={task}")
    assert run(tiny("name=one", *settings)) == 0
    assert set(opened) == {torch.bfloat16}


def test_8_bits_that_are_not_here_are_one_line_with_a_way_out(
    cpu: Callable[[bool], None], tiny: Compose, tmp_path: Path, power_cut: PowerCut
) -> None:
    cpu(True)
    power_cut(tiny("name=one", "precision=bf16", "precision.compile=false"), 12)
    file = tmp_path / "runs" / "one" / "config.yaml"  # as an H100 would have left it
    file.write_text(file.read_text().replace("compute: bfloat16", "compute: float8"))
    with pytest.raises(ConfigError, match=r"8-bit matrix products.*Use precision=bf16, or precision.emulate"):
        run(tiny("name=one", "precision=auto", "precision.compile=false"))
    assert run(tiny("name=one", "precision=bf16", "precision.compile=false")) == 0


def test_without_a_compiler_the_step_is_uncompiled(
    tiny: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setenv("CXX", "/nowhere/g++")  # which inductor has read by now
    with inductor.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        assert run(tiny("name=one", "precision.compile=true", "budget.steps=2")) == 0
    out, err = capsys.readouterr()
    assert "not compiled: there is no C++ compiler (/nowhere/g++) on this machine" in err
    assert "compiled in" not in out
    with inductor.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        assert run(tiny("name=one", "task=generate", "generate.prompt=The", "generate.compile=true")) == 0
        with pytest.raises(ConfigError, match=r"adamw_8bit compiles its update, but there is no C\+\+ compiler"):
            run(tiny("name=two", "optimizer=adamw_8bit"))
    # The run's configuration is unchanged: on another machine it is compiled.
    assert read_config(tmp_path / "runs" / "one" / "config.yaml")["precision"]["compile"] is True


def test_threads_are_set(tiny: Compose) -> None:
    before = torch.get_num_threads()
    try:
        assert run(tiny("name=one", "budget.steps=1", "threads=2")) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- nothing computes in another precision


def narrow() -> Operators:
    """Collects the operators that take or return 16-bit numbers."""
    return Operators(lambda tensor: tensor.dtype in (torch.bfloat16, torch.float16))


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=adamw", "ema.decay=0.9"),
        ("optimizer=muon", "optimizer.neuron_beta=0.95", "optimizer.cautious_decay=true"),
        ("optimizer=lion", "model=fast_5m", "model.dim=32", "model.num_layers=2", "model.vocab_size=320"),
        (*TUNE, "adapter=dora"),
        (*TUNE, "adapter=loha"),
        (*TUNE, "adapter=lokr"),
        (*TUNE, *QLORA),
        (*TUNE, *QAT),
    ],
    ids=["adamw", "muon", "fast_5m", "dora", "loha", "lokr", "qlora", "qat"],
)
def test_float32_is_float32_everywhere(overrides: tuple[str, ...], tiny: Compose) -> None:
    """Training, evaluation and samples, operator by operator."""
    unmeasured = Instruments(peak_flops=lambda device, precisions: 1e12)  # it would be measured in all of them
    if "stage=finetune" in overrides:
        assert run(tiny("name=base", "budget.steps=2")) == 0
    with narrow() as found:
        mapping = tiny("name=one", *overrides, "budget.steps=2", "precision=fp32", "precision.compile=false")
        assert run(mapping, unmeasured) == 0
    # Scales of groups are stored as bfloat16 numbers, and so rounded to them: two conversions, no arithmetic.
    assert found.found <= ({"aten._to_copy.default", "aten.to.dtype"} if QAT[0] in overrides else set())


def test_the_check_can_fail(tiny: Compose) -> None:
    with narrow() as found:
        assert run(tiny("name=one", "budget.steps=1", "precision=bf16", "precision.compile=false")) == 0
    assert {"aten.mm.default", "aten._to_copy.default"} < found.found


# ---- float16

HALF = ("precision=fp16", "precision.compile=false")


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=adamw", "batch.micro_batch=2"),
        ("optimizer=muon", "optimizer.lr=0.02"),
        ("optimizer=lion", "optimizer.lr=1e-3"),
        (*TUNE, "adapter=lora"),
        (*TUNE, *QLORA),
        (*TUNE, *QAT),
    ],
    ids=["adamw", "muon", "lion", "lora", "qlora", "qat"],
)
def test_float16_trains_as_float32_does(overrides: tuple[str, ...], tiny: Compose, tmp_path: Path) -> None:
    if "stage=finetune" in overrides:
        assert run(tiny("name=base")) == 0
    for name, precision in (("half", HALF), ("whole", ("precision=fp32", "precision.compile=false"))):
        assert run(tiny(f"name={name}", *overrides, *precision, "log_every=1")) == 0
    half, whole = (series(tmp_path / "runs" / name, "train/loss") for name in ("half", "whole"))
    assert half == pytest.approx(whole, abs=0.02)
    if "stage=finetune" not in overrides:  # six steps of an adapter are less than what batches differ by
        assert half[-1] < half[0]
    half, whole = (series(tmp_path / "runs" / name, "train/grad_norm") for name in ("half", "whole"))
    assert half == pytest.approx(whole, rel=0.05)
    assert set(series(tmp_path / "runs" / "half", "train/skipped_steps")) == {0}
    assert series(tmp_path / "runs" / "whole", "train/loss_scale") == []


def test_float16_learns_preferences(tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny("name=base", "budget.steps=4", "model.max_sequence_length=256")) == 0
    file = write_preferences(tmp_path / "preferences.jsonl")
    mapping = tiny(
        "name=one", "stage=dpo", "stage.init_from=base", "model.max_sequence_length=256", "budget.steps=6", *HALF,
        "batch.tokens=1024", "batch.micro_batch=4", "log_every=1", "optimizer.lr=1e-2", "schedule=constant",
        "data/format=preference", "data.packing.mode=pairs", "data.packing.too_long=drop", "data.packing.isolate=true",
        f"data.source.files=[{file}]", "data.validation.fraction=0.3", "data.validation.group_by=prompt",
        "data.tokenizer.kind=inherited", "data.sequence_length=256",
    )  # fmt: skip
    mapping["data"]["tokenizer"] = {"kind": "inherited", "add_tokens": []}
    assert run(mapping) == 0
    losses = series(tmp_path / "runs" / "one", "train/loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_costs_neither_a_batch_nor_a_step_and_resumes_are_exact(
    optimizer: str, tiny: Compose, tmp_path: Path, power_cut: PowerCut
) -> None:
    def scaled(first: float) -> Callable[[Run, object], None]:
        """Lets the loss scale begin with `first`, and grow in step 5 and, from what step 10 has saved, in step 13."""

        def scale(training: Run, what: object) -> None:
            found = training.state.loss_scale
            if isinstance(what, Step) and training.state.step == 0:
                found.factor = first
            if isinstance(what, Step) and training.state.step in (4, 8):
                found.steps = loss_scale.INTERVAL - (1 if training.state.step == 4 else 5)

        return scale

    settings = (*HALF, f"optimizer={optimizer}", "model.dropout=0.1", "batch.micro_batch=4", "log_every=1")
    assert run(tiny("name=whole", *settings), Instruments(on_begin=scaled(2.0**40))) == 0
    power_cut(tiny("name=cut", *settings), 14, scaled(2.0**40))
    assert run(tiny("name=cut", *settings)) == 0
    whole, cut = (tmp_path / "runs" / name for name in ("whole", "cut"))
    for name in ("train/loss", "train/loss_scale", "train/overflows"):
        assert series(cut, name) == series(whole, name)
    kept, resumed = tensors(whole, 20), tensors(cut, 20)
    assert all(torch.equal(kept[name], resumed[name]) for name in kept)
    # The scale fell from 2^40, and grew again later.
    scales, overflows = series(whole, "train/loss_scale"), series(whole, "train/overflows")
    assert scales[0] < 2.0**30
    assert overflows[0] > 10
    assert any(later == 2 * before for before, later in itertools.pairwise(scales))
    # Every step was taken on its own batch, with the same dropout: that of a run whose loss was never too large.
    assert run(tiny("name=low", *settings), Instruments(on_begin=scaled(scales[0] / 16))) == 0
    low = tmp_path / "runs" / "low"
    assert series(low, "train/overflows")[0] == 0
    assert series(low, "train/loss") == pytest.approx(series(whole, "train/loss"), abs=5e-3)
    assert (low / "progress.txt").read_text() == (whole / "progress.txt").read_text()
    assert set(series(whole, "train/skipped_steps")) == {0}


# ---- skipped steps


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_whose_gradients_are_not_finite_is_left_out_counted_and_said(
    precision: str, tiny: Compose, tmp_path: Path, capsys: Any
) -> None:
    hooks: list[Any] = []
    states: list[list[Tensor]] = []

    def spoil(training: Run, what: object) -> None:
        """Let the fourth step read an embedding that is not finite."""
        while hooks:
            hooks.pop().remove()
        if isinstance(what, Step):  # the weights, their averages, the optimizer's moments with their counters
            assert training.ema is not None
            slots = [one for state in training.optimizer.state.values() for one in state.values()]
            tensors = [*training.parts.model.parameters(), *training.ema.model.parameters(), *slots]
            states.append([one.detach().clone() for one in tensors])
        if isinstance(what, Step) and training.state.step == 3:
            embedding = training.parts.model.embedding
            hooks.append(embedding.register_forward_hook(lambda *read: read[-1] * torch.nan))

    settings = (f"precision={precision}", "precision.compile=false", "ema.decay=0.9")
    more = ("log_every=2", "budget.steps=8", "schedule=constant")
    assert run(tiny("name=one", *settings, *more), Instruments(on_begin=spoil)) == 0
    folder = tmp_path / "runs" / "one"
    three, four, five = states[3:6]
    assert all(torch.equal(a, b) for a, b in zip(three, four, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(four, five, strict=True))
    assert series(folder, "train/skipped_steps") == [0, 1, 1, 1]
    assert json.loads((folder / "summary.json").read_text())["train/skipped_steps"] == 1
    out = capsys.readouterr().out
    assert out.count("were skipped because their gradients were not finite") == 1
