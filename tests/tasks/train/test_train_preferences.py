"""DPO runs: their start, their files, and resuming."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_data import preference_data, preferences, write_preferences
from recorded import rows, series
from safetensors.torch import load_file

from pretune.core.config import ConfigError, InputError
from pretune.core.files import measure, write_sealed
from pretune.dispatch import run
from pretune.run.folder import cache_folder

Compose = Callable[..., dict[str, Any]]
PowerCut = Callable[..., None]
LN2 = math.log(2)
QLORA = ("quantization=qlora_nf4", "quantization.block_size=32")
QAT = ("quantization=qat_int8_int4", "quantization.group_size=16", "quantization.start=0.0")


@pytest.fixture
def dpo(tiny: Compose, composed: Compose, tmp_path: Path) -> Compose:
    """`dpo(*overrides)`: a DPO run that starts from the run `base`, which is trained here."""
    assert run(tiny("name=base", "budget.steps=4", "model.max_sequence_length=256")) == 0
    file = write_preferences(tmp_path / "preferences.jsonl")

    def compose(*overrides: str) -> dict[str, Any]:
        mapping = tiny(
            "stage=dpo", "stage.init_from=base", "model.max_sequence_length=256", "budget.steps=6", "precision=fp32",
            "precision.compile=false", "batch.tokens=1024", "batch.micro_batch=4", "log_every=1",
            "evaluation.every=3", "checkpoint.every=2", "optimizer.lr=1e-2", "schedule=constant", *overrides,
        )  # fmt: skip
        mapping["data"] |= preference_data(file, composed, "drop")
        return mapping

    return compose


def test_the_first_loss_is_ln_2_and_the_held_out_loss_goes_below_it(dpo: Compose, tmp_path: Path) -> None:
    assert run(dpo("name=one")) == 0
    folder = tmp_path / "runs" / "one"
    assert series(folder, "train/loss")[0] == pytest.approx(LN2, abs=1e-6)
    assert series(folder, "train/accuracy")[0] == 0.5
    assert series(folder, "train/reward_margin")[0] == pytest.approx(0, abs=1e-5)
    assert series(folder, "val/loss")[0] == pytest.approx(LN2, abs=1e-6)
    last = rows(folder)[-1]
    assert last["val/loss"] < LN2 - 2 * last["val/loss_error"]
    assert last["preference/accuracy"] > 0.9
    assert last["preference/margin"] == pytest.approx(
        last["preference/reward_chosen"] - last["preference/reward_rejected"], abs=1e-6
    )
    assert run(dpo("name=one", "task=evaluate")) == 0
    measured = json.loads((folder / "evaluation.json").read_text())
    assert measured["val/loss"] == pytest.approx(last["val/loss"], abs=1e-5)
    assert measured["preference/pairs"] == last["preference/pairs"]


def test_the_same_updates_whatever_the_micro_batch(dpo: Compose, tmp_path: Path) -> None:
    for micro_batch in (4, 2, 1):
        assert run(dpo(f"name=m{micro_batch}", f"batch.micro_batch={micro_batch}", "evaluation.every=null")) == 0
    runs = tmp_path / "runs"
    for other in ("m2", "m1"):
        for name in ("train/loss", "train/accuracy", "train/reward_margin", "train/grad_norm"):
            assert series(runs / other, name) == pytest.approx(series(runs / "m4", name), abs=2e-4), name


@pytest.mark.parametrize("reference", ["model", "cached"])
def test_resumed_is_bit_for_bit_the_uninterrupted_run(
    reference: str, dpo: Compose, tmp_path: Path, power_cut: PowerCut
) -> None:
    settings = [f"stage.objective.reference={reference}"]
    assert run(dpo("name=whole", *settings)) == 0
    power_cut(dpo("name=cut", *settings), 4)
    assert run(dpo("name=cut", *settings)) == 0
    for name in ("train/loss", "val/loss", "preference/margin"):
        assert series(tmp_path / "runs" / "cut", name) == series(tmp_path / "runs" / "whole", name)
    files = (tmp_path / "runs" / name / "checkpoints" / "step_00000006" for name in ("whole", "cut"))
    whole, cut_ = ({**load_file(f / "model.safetensors"), **load_file(f / "optimizer.safetensors")} for f in files)
    assert whole.keys() == cut_.keys()
    assert all(torch.equal(whole[name], cut_[name]) for name in whole)


def test_a_cached_reference_is_the_second_model(dpo: Compose, tmp_path: Path) -> None:
    for kind in ("model", "cached"):
        assert run(dpo(f"name={kind}", f"stage.objective.reference={kind}")) == 0
    runs = tmp_path / "runs"
    for name in ("train/loss", "val/loss", "preference/margin"):
        assert series(runs / "cached", name) == pytest.approx(series(runs / "model", name), abs=1e-5)
    assert run(dpo("name=again", "stage.objective.reference=cached")) == 0
    assert series(runs / "again", "train/loss") == series(runs / "cached", "train/loss")
    # Other weights: everything is computed again.
    assert run(dpo("name=next", "stage.objective.reference=cached", "stage.init_from=again", "budget.steps=1")) == 0
    assert series(runs / "next", "train/loss")[0] == pytest.approx(LN2, abs=1e-6)


def test_what_is_cached_is_read_and_a_reference_that_is_not_the_start_is_found_out(dpo: Compose) -> None:
    settings = ("stage.objective.reference=cached", "budget.steps=1")
    assert run(dpo("name=right", *settings)) == 0
    tables = list(cache_folder().glob("reference-*/*.npy"))
    assert len(tables) == 2  # of training and validation
    for table in tables:
        np.save(table, np.load(table) + np.array([1.0, 0.0], np.float32))  # a model that likes the chosen better
        write_sealed(table.with_name("complete.json"), {table.name: measure(table)})
    with pytest.raises(RuntimeError, match=r"the first loss is .* not ln 2"):
        run(dpo("name=wrong", *settings))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("adapter=lora",), "adapter_off"),
        (("adapter=dora",), "adapter_off"),
        (("adapter=lora", "adapter.init=pissa"), "model"),
        (("adapter=lora", "stage.objective.reference=cached"), "cached"),
        (("adapter=lora", "quantization=qlora_nf4", "quantization.block_size=32"), "adapter_off"),
        (("adapter=lora", "quantization=qlora_nf4", "quantization.block_size=32", "adapter.init=pissa"), "model"),
        (
            (
                "adapter=lora",
                "quantization=qlora_nf4",
                "quantization.block_size=32",
                "stage.objective.reference=cached",
            ),
            "cached",
        ),
    ],
)
def test_an_adapter_is_measured_against_where_it_starts(
    overrides: tuple[str, ...], expected: str, dpo: Compose, tmp_path: Path
) -> None:
    from pretune.core.config import validate
    from pretune.run.config import RunConfig

    mapping = dpo("name=one", "adapter.rank=4", *overrides)
    assert validate(RunConfig, mapping).reference == expected
    assert run(mapping) == 0
    folder = tmp_path / "runs" / "one"
    assert series(folder, "train/loss")[0] == pytest.approx(LN2, abs=1e-5)
    last = rows(folder)[-1]
    assert last["val/loss"] < LN2 - 0.04
    # After the run the adapter is merged, and the starting model is a different one.
    assert run(mapping | {"task": "evaluate"}) == 0
    measured = json.loads((folder / "evaluation.json").read_text())
    assert measured["val/loss"] == pytest.approx(last["val/loss"], abs=1e-3)


class TestBadInput:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (("model.dropout=0.1",), "differ randomly from its reference"),
            (("neftune_alpha=5",), "differ randomly from its reference"),
            (("stage.objective.beta=0",), "beta"),
            (("stage.objective.label_smoothing=0.5",), "label_smoothing"),
            (("stage.objective.reference=adapter_off",), "needs a new adapter"),
            (("adapter=lora", "adapter.init=pissa", "stage.objective.reference=adapter_off"), "needs a new adapter"),
            (("stage.init_from=null",), "DPO compares the model"),
            (("stage=finetune", "stage.init_from=base"), "needs data.format.kind = preference"),
        ],
    )
    def test_of_the_configuration(self, overrides: tuple[str, ...], message: str, dpo: Compose, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=message):
            run(dpo("name=bad", *overrides))
        assert not (tmp_path / "runs" / "bad").exists()

    def test_rows_without_a_side_are_named(self, dpo: Compose, tmp_path: Path) -> None:
        data = [{"prompt": pair["prompt"], "chosen": "b", "rejectd": "c"} for pair in preferences(6)]
        write_preferences(tmp_path / "preferences.jsonl", data)
        with pytest.raises(InputError, match=r"jsonl, row 1 has no field 'rejected'; did you mean 'rejectd'"):
            run(dpo("name=bad"))
        assert not (tmp_path / "runs" / "bad").exists()

    def test_only_equal_sides(self, dpo: Compose, tmp_path: Path) -> None:
        write_preferences(tmp_path / "preferences.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 20)
        with pytest.raises(InputError, match="because its sides are equal"):
            run(dpo("name=bad"))

    def test_only_pairs_that_are_too_long(self, dpo: Compose, tmp_path: Path) -> None:
        data = [{"prompt": f"{i}" + "a" * 400, "chosen": f"b{i}", "rejected": f"c{i}"} for i in range(20)]
        write_preferences(tmp_path / "preferences.jsonl", data)
        with pytest.raises(InputError, match=r"does not give one sequence .*packing\.too_long=cut"):
            run(dpo("name=bad"))


@pytest.mark.parametrize(
    "more", [(), ("adapter=lora", "adapter.rank=2"), ("quantization.start=0.5", "stage.objective.reference=cached")]
)
def test_preferences_are_learned_under_rounding_too(more: tuple[str, ...], dpo: Compose, tmp_path: Path) -> None:
    assert run(dpo("name=qat", *QAT, *more)) == 0  # the first loss is ln 2; otherwise the run would have stopped
    figures = json.loads((tmp_path / "runs" / "qat" / "summary.json").read_text())
    assert abs(figures["converted/difference"]) < 1e-4
    assert figures["train/loss"] < LN2
    assert run(dpo("name=qat", *QAT, *more, "task=evaluate")) == 0
    evaluated = json.loads((tmp_path / "runs" / "qat" / "evaluation.json").read_text())
    assert evaluated["val/loss"] == pytest.approx(figures["val/loss"], abs=1e-3)


def test_it_goes_on_against_the_reference_that_it_began_with(
    dpo: Compose, tiny: Compose, power_cut: PowerCut, tmp_path: Path
) -> None:
    power_cut(dpo("name=one"), 4)
    shutil.rmtree(tmp_path / "runs" / "base")
    assert run(tiny("name=base", "budget.steps=4", "model.max_sequence_length=256", "seed=5")) == 0
    with pytest.raises(InputError, match=r"one started from other weights than .*base has now"):
        run(dpo("name=one"))


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"", lambda content: content[::-1]])
def test_damaged_log_probabilities_of_the_reference_are_computed_again(
    damage: Callable[[bytes], bytes], dpo: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dpo("name=one", "stage.objective.reference=cached", "budget.steps=2")) == 0
    whole = {path: path.read_bytes() for path in cache_folder().glob("reference-*/*")}
    assert len(whole) == 4
    for number, (path, content) in enumerate(whole.items()):
        path.write_bytes(damage(content))
        again = dpo(f"name=again{number}", "stage.objective.reference=cached", "budget.steps=1")
        capsys.readouterr()
        assert run(again) == 0
        assert capsys.readouterr().err.count("were damaged: computed again") == 1
        assert path.read_bytes() == content
