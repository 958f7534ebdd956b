"""Benchmarks keep up with the code: each imports, what it configures is valid, and its shortest form runs."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pretune.core.config import validate
from pretune.data.config import DataConfig
from pretune.run.config import RunConfig

FOLDER = Path(__file__).parents[1] / "benchmarks"
Compose = Callable[..., dict[str, Any]]
SMALLER = ("precision.compile=false", "model.num_layers=1", "data.validation.fraction=0.1")
SMALLER_PACKING = ("data.source.num_problems=400", "batch.tokens=1024", "batch.micro_batch=1")
SHORTEST = {
    "ablations": ["--seconds", "1", "--seeds", "1", "--only", "tied head", "--data", "TEXTS", "--", *SMALLER],
    "adapters_speed": ["--shape", "tiny", "--device", "cpu", "--bursts", "1", "--seconds", "0.1",
                       "--sides", "full", "lora", "qlora"],
    "agreement": ["--steps", "4", "--processes", "2", "--optimizers", "adamw", "--data", "TEXTS", "--", *SMALLER],
    "arc": ["--base-seconds", "1", "--seconds", "1", "--tasks", "2", "--steps", "1", "--seeds", "1", "--", *SMALLER,
            "data.source.num_tasks=60", "data.source.max_size=3", "batch.tokens=1024", "batch.micro_batch=2"],
    "cross_entropy": ["--rounds", "1", "--shapes", "nano", "--device", "cpu"],
    "data_preparation": ["--rounds", "1", "--files", "TEXTS"],
    "distillation": ["--seconds", "1", "--teacher-seconds", "1", "--seeds", "1", "--data", "TEXTS", "--", *SMALLER],
    "finetune_packing": ["--seconds", "1", "--", *SMALLER, *SMALLER_PACKING],
    "finetuning": ["--quick", "--methods", "full", "qlora"],
    "generation": ["--shapes", "tiny", "--batches", "1", "--new", "4", "--repeats", "1"],
    "gpu_check": ["--only", "plan"],
    "long_context": ["--seconds", "1", "--examples", "1", "--", "precision.compile=false",
                     "data.source.num_examples=100"],
    "interconnect": ["--processes", "2", "--mib", "0.01", "0.1", "--repeats", "1"],
    "loader_speed": ["--tokens", "300000"],
    "memory": ["--cases", "nano", "--device", "cpu"],
    "phone": ["--shape", "tiny", "--sides", "eager", "pte", "--new", "4", "--repeats", "1"],
    "pretrained": ["--shape", "tiny", "--import-shape", "tiny", "--bursts", "1", "--seconds", "0.1", "--length", "32"],
    "prefetch": ["tiny", "--device", "cpu", "--bursts", "1", "--seconds", "0.1"],
    "precision": ["--steps", "3", "--seeds", "1", "--data", "TEXTS", "--only", "fp32", "auto"],
    "processes": ["--seconds", "1", "--turns", "1", "--data", "TEXTS", "--", *SMALLER],
    "quantization": ["--quick"],
    "startup": ["--runs", "1"],
    "throughput": ["tiny", "--device", "cpu", "--bursts", "1", "--seconds", "0.1"],
    "time_budget": ["--runs", "1", "--seconds", "2"],
    "time_to_loss": ["--minutes", "0.02", "--seeds", "1", "--shares", "1", "--data", "TEXTS", "--", *SMALLER],
}  # fmt: skip
"""The options with which each benchmark ends soonest. TEXTS is a file of short texts."""


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_each_can_be_imported(name: str, benchmark: Callable[[str], ModuleType]) -> None:
    assert Path(str(benchmark(name).__file__)).parent == FOLDER


def test_each_has_a_shortest_form(benchmark: Callable[[str], ModuleType]) -> None:
    names = {path.stem for path in FOLDER.glob("*.py")}
    assert {name for name in names if hasattr(benchmark(name), "main")} == set(SHORTEST)


def test_cases_of_memory_are_valid(benchmark: Callable[[str], ModuleType]) -> None:
    memory = benchmark("memory")
    configured = [memory.configured(case, "cpu") for case in memory.CASES]
    assert all(config.precision.compute != "auto" for config in configured)


def test_models_are_valid(benchmark: Callable[[str], ModuleType]) -> None:
    throughput = benchmark("throughput")
    for shape in throughput.SHAPES.values():
        assert throughput.model_config(shape).max_sequence_length == shape.sequence_length
    for sizes in [*benchmark("generation").SHAPES.values(), *benchmark("phone").SHAPES.values()]:
        assert benchmark("side_by_side").llama(**sizes, max_sequence_length=512).dim == sizes["dim"]


def test_sections_of_data_are_valid(benchmark: Callable[[str], ModuleType]) -> None:
    section = benchmark("data_preparation").section
    assert validate(DataConfig, section(None, None)).source.kind == "python_docs"
    assert validate(DataConfig, section(["a.jsonl"], "tokenizer.json")).tokenizer.kind == "file"
    for mode in ("stream", "documents"):
        assert benchmark("loader_speed").section(mode, True).packing.mode == mode


def test_switches_of_ablations_are_valid_and_change_something(
    composed: Compose, benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    ablations = benchmark("ablations")
    study = ablations.Study(["data=python_docs"], tmp_path)
    recipe = composed(ablations.OURS, *study.overrides("run", 60.0, 1))
    for name, switches in ablations.SWITCHES.items():
        mapping = composed(ablations.OURS, *study.overrides("run", 60.0, 1, *switches))
        validate(RunConfig, mapping)
        assert (mapping == recipe) == (name == "the recipe"), name


@pytest.mark.parametrize("files", [(None, None), ("a.jsonl", None), ("a.jsonl", "b.jsonl")])
def test_runs_of_time_to_loss_are_valid(
    files: tuple[str | None, str | None], composed: Compose, benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = benchmark("time_to_loss")
    study = module.Study(module.data(argparse.Namespace(data=files[0], validation=files[1])), tmp_path)
    for recipe, more in ((module.OURS, ()), (module.BASELINE, ("optimizer.lr=4e-3",))):
        run = validate(RunConfig, composed(recipe, *study.overrides("run", 75.0, 2, *more)))
        assert (run.budget.time, run.seed) == (75, 2)


def test_runs_of_precision_are_valid(composed: Compose, benchmark: Callable[[str], ModuleType]) -> None:
    precision = benchmark("precision")
    for data in (None, "a.jsonl"):
        options = argparse.Namespace(steps=300, data=data, overrides=["optimizer.lr=1e-3"])
        for name in ("fp32", "bf16", "fp16", "auto"):
            run = validate(RunConfig, composed(precision.RECIPE, *precision.overrides(options, name)))
            assert run.budget.steps == 300


def test_sides_of_arc_are_valid(composed: Compose, benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module = benchmark("arc")
    study = module.Study([], tmp_path, {"base": 9.0, "plain": 5.0, "variants": 5.0}, 20, 4)
    sides = {side: validate(RunConfig, composed(module.RECIPE, *study.of_side(side, 2))) for side in module.SIDES}
    assert [side.data.source for side in sides.values()] == [sides["base"].data.source] * 3
    assert [side.data.validation for side in sides.values()] == [sides["base"].data.validation] * 3
    assert [(side.stage.kind, side.budget.time) for side in sides.values()] == [
        ("pretrain", 9), ("finetune", 5), ("finetune", 5)
    ]  # fmt: skip
    answered = validate(RunConfig, composed(module.RECIPE, *study.of_evaluation()))
    assert answered.evaluation.arc is not None
    assert answered.evaluation.arc.train_each.steps == 4


@pytest.mark.parametrize("texts", [["data=python_docs"], ["data=files", "data.source.files=['a.jsonl']"]])
def test_sides_of_distillation_are_valid(
    texts: list[str], composed: Compose, benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = benchmark("distillation")
    study = module.Study(texts, tmp_path, ("alpha=0.9",))
    teacher = validate(RunConfig, composed(module.TEACHER, *study.of_teacher(240.0)))
    sides = {
        side: validate(RunConfig, composed(module.MODEL, *study.of_side(side, 60.0, 2)))
        for side in ("plain", "distilled", "stored")
    }
    kinds = {side: run.stage.objective.kind for side, run in sides.items()}
    assert kinds == {"plain": "language_modeling", "distilled": "distillation", "stored": "distillation"}
    assert sides["distilled"].stage.objective.teacher == str(tmp_path / teacher.name)
    assert (sides["stored"].stage.objective.cached, sides["stored"].stage.objective.alpha) == (True, 0.9)
    for run in sides.values():
        assert (run.seed, run.budget.time, run.batch.tokens) == (2, 60, teacher.batch.tokens)
        assert run.model == sides["plain"].model


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--train", "a.json", "--tokenizer", "tokenizer.json", "--seconds", "9"],
        ["--train", "a.json", "--validation", "b.json"],
        ["--set", "alpaca", "--train", "a.json", "--no-preamble", "--", "seed=3"],
    ],
)
def test_sides_of_finetune_packing_are_valid(
    options: list[str], composed: Compose, benchmark: Callable[[str], ModuleType]
) -> None:
    module = benchmark("finetune_packing")
    sides = module.sides(module.arguments().parse_args(options))
    found = [validate(RunConfig, composed(module.BASE, "name=side", *overrides)) for overrides in sides.values()]
    assert [side.data.packing.mode == "none" for side in found] == [True, False]


@pytest.fixture
def shared(
    composed: Compose, benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> Callable[[bool], tuple[str, ...]]:
    """`shared(quick)`: what all runs of a study of fine-tuning have in common, on files unless it is quick."""
    studies = benchmark("studies")
    # JSON is YAML.
    (tmp_path / "config.yaml").write_text(json.dumps(composed("smoke", *studies.QUICK_BASE)))
    records = studies.records(argparse.Namespace(train=tmp_path / "a.json", validation=tmp_path / "b.json"))
    return lambda quick: (*studies.start(tmp_path, 20), *(studies.QUICK if quick else records))


@pytest.mark.parametrize("quick", [True, False])
def test_runs_of_finetuning_are_valid(
    quick: bool,
    shared: Callable[[bool], tuple[str, ...]],
    composed: Compose,
    benchmark: Callable[[str], ModuleType],
    tmp_path: Path,
) -> None:
    module = benchmark("finetuning")
    study = module.Study(tmp_path, shared(quick), 1)
    for method in module.METHODS:
        job = module.Job(method, 0.5 * module.rate(method), 2)
        run = validate(RunConfig, composed(f"mathqa_{method}", *study.overrides(job)))
        assert (run.name, run.optimizer.lr, run.budget.steps, run.model.dim) == (job.name, job.lr, 20, 64)


def test_runs_of_quantization_are_valid(
    shared: Callable[[bool], tuple[str, ...]], composed: Compose, benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module, decoding = benchmark("quantization"), benchmark("decoding_speed")
    rounding = module.rounding(argparse.Namespace(group_size=32, stored="int8"))
    study = module.Study(tmp_path, shared(True), rounding)
    for variant, kind in module.TRAINED.items():
        trained = composed(module.RECIPE, *study.overrides("qat_int8_int4" if kind == "qat" else "bf16", 1))
        validate(RunConfig, trained)
        tasks = [["task=evaluate"], module.export(variant, tmp_path)]
        tasks += [module.export_program(tmp_path)] if variant in module.PROGRAMS else []
        done = [validate(RunConfig, composed(module.RECIPE, *study.overrides(variant, 1, *task))) for task in tasks]
        done.append(decoding.configured(trained, variant, rounding))
        assert {run.quantization.kind for run in done} == {"none" if variant == "bf16" else variant}


@pytest.fixture
def short_texts(tmp_path: Path) -> Path:
    """A file of 5,000 short texts, so that one in a thousand is a validation set."""
    rng = random.Random(5)
    texts = (" ".join(f"{rng.getrandbits(24):x}" for _ in range(20)) for _ in range(5000))
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORTEST)
def test_the_shortest_form_ends_with_its_claim(name: str, short_texts: Path, tmp_path: Path) -> None:
    if name == "phone":
        pytest.importorskip("executorch", reason="executorch is not installed (req-phone.txt)")
    options = [str(short_texts) if option == "TEXTS" else option for option in SHORTEST[name]]
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    # Benchmarks keep their runs in the current folder, unless they are told where.
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["claim"]
