"""Processes that share out weights, gradients and optimizer state train what one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damaged import flip
from preference_data import preference_data, write_preferences
from recorded import series
from same_training import assert_same
from together import together

from pretune.core.config import ConfigError, InputError
from pretune.dispatch import run

Compose = Callable[..., dict[str, Any]]
FSDP = "parallel=fsdp"
SMALL = ("batch.micro_batch=2", "batch.tokens=512", "evaluation.micro_batch=3", "log_every=1")
SETTINGS: dict[str, tuple[str, ...]] = {
    "adamw": (),
    "lion": ("optimizer=lion", "optimizer.lr=3e-4"),
    "muon": ("optimizer=muon", "model.num_kv_heads=1"),
    "untied": ("model.tied_embeddings=false", "data.packing.mode=documents", "optimizer.clip_norm=0.1"),
    "ema": ("ema.decay=0.9", "ema.evaluate_raw=true", "precision.activation_checkpointing=true"),
    "compiled": (
        "precision.compile=true",
        "model.num_layers=12",
        "model.window={size: 8, pattern: SSL, full_last_layer: true}",
    ),
    "qat": ("quantization=qat_int8_int4", "quantization.group_size=16"),
}
LORA = ("stage=finetune", "stage.init_from=adamw", "adapter=lora", "adapter.rank=2", "optimizer.lr=1e-3")
DPO = (
    "stage=dpo", "stage.init_from=adamw", "stage.objective.reference=model", "model.max_sequence_length=256",
    "batch.tokens=2048", "adapter=lora", "adapter.rank=2", "optimizer.lr=1e-3",
)  # fmt: skip


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_and_weights_are_those_of_one_process(
    tiny: Compose, composed: Compose, tmp_path: Path, processes: int
) -> None:
    preferences = write_preferences(tmp_path / "preferences.jsonl")

    def mappings(end: str, *more: str) -> list[dict[str, Any]]:
        found = [tiny(f"name={name}{end}", *SMALL, *settings, *more) for name, settings in SETTINGS.items()]
        dpo = tiny(f"name=dpo{end}", *SMALL, *DPO, *more)
        dpo["data"] |= preference_data(preferences, composed, "drop")
        return [*found, tiny(f"name=lora{end}", *SMALL, *LORA, *more), dpo]

    for mapping in mappings(""):
        assert run(mapping) == 0
    done = together(mappings("-together", FSDP), processes, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"in {processes} processes (fsdp)") == len(SETTINGS) + 2, "one of them prints"
    for name in (*SETTINGS, "lora", "dpo"):
        assert_same(tmp_path / "runs" / name, tmp_path / "runs" / f"{name}-together")
        assert "shards" in {path.name for path in (tmp_path / "runs" / f"{name}-together" / "checkpoints").glob("*/*")}
    assert "recompile_limit" not in done.stderr


@pytest.mark.parametrize(
    "kinds",
    [
        (("fsdp", 2), ("single", 1)),
        pytest.param((("single", 1), ("fsdp", 3), ("fsdp", 2)), marks=pytest.mark.slow),
        pytest.param((("fsdp", 4), ("ddp", 2), ("fsdp", 2)), marks=pytest.mark.slow),
        pytest.param((("fsdp", 2), ("fsdp", 4), ("single", 1)), marks=pytest.mark.slow),
    ],
    ids=lambda kinds: "-".join(f"{kind}{processes}" for kind, processes in kinds),
)
@pytest.mark.parametrize("name", ["muon", pytest.param("ema", marks=pytest.mark.slow)])
def test_a_run_goes_on_in_any_number_of_processes(
    tiny: Compose, tmp_path: Path, kinds: tuple[tuple[str, int], ...], name: str
) -> None:
    settings = ("batch.micro_batch=1", "batch.tokens=768", "data.sequence_length=64", "log_every=1", *SETTINGS[name])
    assert run(tiny("name=whole", *settings)) == 0
    stops = [*(7, 14)[: len(kinds) - 1], None]
    for (kind, processes), stop in zip(kinds, stops, strict=True):
        signals = "" if stop is None else f"0 {stop} SIGTERM"
        done = together([tiny("name=moved", *settings, f"parallel={kind}")], processes, tmp_path, signals=signals)
        assert stop is None or f"stopped at step {stop + (processes > 1)}; everything is saved" in done.stdout
        assert stop is not None or done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "runs" / "whole", tmp_path / "runs" / "moved")


def test_a_run_whose_parameters_were_shared_out_is_used_as_any(tiny: Compose, tmp_path: Path) -> None:
    """Evaluated, exported, and fine-tuned by one process alone."""
    done = together([tiny("name=one", "ema.decay=0.9", FSDP, "checkpoint.keep_best=true")], 2, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "one"
    assert run(tiny("name=one", "ema.decay=0.9", "task=evaluate")) == 0
    assert json.loads((folder / "evaluation.json").read_text())["val/loss"] == pytest.approx(
        series(folder, "val/loss")[-1], abs=1e-6
    )
    assert run(tiny("name=one", "ema.decay=0.9", "task=export", "export.format=huggingface")) == 0
    assert [*folder.glob("export/*/model.safetensors")]
    assert run(tiny("name=two", "stage=finetune", "stage.init_from=one")) == 0
    assert series(tmp_path / "runs" / "two", "val/loss")[0] == pytest.approx(series(folder, "val/loss")[-1], abs=1e-6)


@pytest.mark.slow
def test_a_damaged_share_is_found(tiny: Compose, tmp_path: Path) -> None:
    assert together([tiny("name=one", FSDP, "checkpoint.keep=null")], 2, tmp_path).returncode == 0
    checkpoints = tmp_path / "runs" / "one" / "checkpoints"
    share = sorted((checkpoints / "step_00000020" / "shards").iterdir())[1]
    flip(share, -1)
    with pytest.raises(InputError, match=f"{share.name} is damaged"):
        run(tiny("name=two", "stage=finetune", "stage.init_from=one"))
    (tmp_path / "runs" / "one" / "summary.json").unlink()
    assert run(tiny("name=one")) == 0
    assert (checkpoints / "damaged_step_00000020").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("more", [("parallel.reshard_after_forward=false",), ("parallel.mesh=[2,2]",)])
def test_other_arrangements(tiny: Compose, tmp_path: Path, more: tuple[str, ...]) -> None:
    for settings in (("optimizer=muon",), ("batch.micro_batch=1",)):
        name = "muon" if "optimizer=muon" in settings else "accumulated"
        wide = ("batch.tokens=1024", "log_every=1", "batch.micro_batch=2", *settings)
        assert run(tiny(f"name={name}", *wide)) == 0
        done = together([tiny(f"name={name}-together", *wide, FSDP, *more)], 4, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert_same(tmp_path / "runs" / name, tmp_path / "runs" / f"{name}-together")


@pytest.mark.slow
def test_weights_gathered_in_bfloat16_train_nearly_as_well(tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny("name=one", "log_every=1")) == 0
    done = together([tiny("name=two", "log_every=1", FSDP, "parallel.param_dtype=bfloat16")], 2, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (series(tmp_path / "runs" / name, "train/loss") for name in ("one", "two"))
    assert one != two
    assert two == pytest.approx(one, abs=0.02)


@pytest.mark.slow
def test_a_mesh_for_another_number_of_processes_is_refused(tiny: Compose, tmp_path: Path) -> None:
    done = together([tiny("name=one", FSDP, "parallel.mesh=[2,2]")], 2, tmp_path)
    expected = "parallel.mesh = [2, 2] is for 4 processes, and 2 were started: set parallel.mesh=[1,2], or null"
    assert done.stderr.count(expected) == 1, done.stderr[-3000:]
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer=adamw_8bit",),
        ("precision=fp8",),
        ("quantization=qlora_nf4", "adapter=lora", "stage=finetune", "stage.init_from=x"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_by_name(tiny: Compose, settings: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=f"{settings[0]} does not work with parallel=fsdp: use parallel=ddp"):
        run(tiny("name=one", FSDP, *settings))
