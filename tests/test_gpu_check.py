"""The GPU check without a GPU: what it would run is valid, and it reads what that would print."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pretune.core.config import validate
from pretune.run.config import RunConfig

ROOT = Path(__file__).parents[1]
Compose = Callable[..., dict[str, Any]]
TESTS = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_gpu_loss" name="test_a[x|y]"/>
<testcase classname="tests.gpu.test_gpu_loss" name="test_b[x|y]"><failure message="off">...</failure></testcase>
<testcase classname="tests.gpu.test_gpu_loss" name="test_c"><error message="no">...</error></testcase>
<testcase classname="tests.gpu.test_gpu_precision" name="test_8"><skipped message="needs 8.9"/></testcase>
<testcase classname="tests.gpu.test_gpu_precision" name="test_16"/>
<testcase classname="tests.gpu.test_gpu_attention" name="test_d"><skipped message="needs 8.0"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def parts(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("gpu_parts")


@pytest.fixture
def check(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("gpu_check")


def log(folder: Path, name: str, *printed: Any) -> Path:
    """What a benchmark printed: anything, then these JSON objects."""
    (folder / f"{name}.log").write_text("\n".join(["a table", *map(json.dumps, printed), ""]))
    return folder


def verdicts(rows: list[Any]) -> list[str]:
    return [row.verdict.strip("*") for row in rows]


def test_every_file_of_tests_is_in_the_table(parts: ModuleType) -> None:
    marked = {path.stem for path in ROOT.glob("tests/**/test_*.py") if "pytest.mark.gpu" in path.read_text()}
    files = {path.stem for path in ROOT.glob("tests/gpu/test_*.py")}
    assert set(parts.SUBJECTS) == files | marked - {Path(__file__).stem}


def test_tests_are_counted_by_file(parts: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(TESTS)
    rows = parts.test_rows(tmp_path)
    assert [row.figure for row in rows] == [
        "1 passed, 2 failed (test_b[x/y]; test_c)",
        "1 passed, 1 skipped (needs 8.9)",
        "1 skipped (needs 8.0)",
    ]
    assert verdicts(rows) == ["missed", "holds", "not measured"]


def test_losses_with_and_without_ligers(parts: ModuleType, tmp_path: Path) -> None:
    ours = {"side": "ours", "shape": "gpt2", "milliseconds": 3.0}
    liger = {"side": "liger", "shape": "gpt2", "milliseconds": 2.5}
    claim = {"claim": "it is faster", "ratio": 1.2, "holds": False}
    rows = parts.loss_rows(log(tmp_path, "loss", ours, liger, claim))
    assert [row.figure for row in rows] == ["1.2x", "1.20x"]
    assert verdicts(rows) == ["missed", "missed"]
    rows = parts.loss_rows(log(tmp_path, "loss", ours, {**claim, "ratio": 0.9, "holds": True}))
    assert verdicts(rows) == ["holds", "not measured"]


def test_speed_and_memory(parts: ModuleType, tmp_path: Path) -> None:
    sides = {
        "pretune": {"tokens_per_second": 200e3, "matmul_share": 0.45},
        "transformers": {"tokens_per_second": 125e3, "matmul_share": 0.28},
    }
    claim = {"claim": "faster", "ratio": 1.6, "memory_ratio": 0.74, "matmul_flops": 250e12, **sides}
    rows = parts.throughput_rows(log(tmp_path, "throughput", claim))
    assert [row.figure for row in rows] == ["1.6x (200,000 against 125,000)", "45.0% of 250 TFLOP/s", "0.74x"]
    assert verdicts(rows) == ["holds", "holds", "missed"]
    cases = {"a": {"predicted_over_measured": 0.97}, "b": {"predicted_over_measured": 1.04}}
    claim = {"claim": "within 10%", "ratio": 0.4, "holds": True, "sides": cases}
    (row,) = parts.memory_rows(log(tmp_path, "memory", claim))
    assert (row.figure, row.verdict) == ("0.97x to 1.04x", "holds")
    ways = {way: {"milliseconds": time} for way, time in (("there", 5.0), ("prefetched", 5.05), ("copied", 6.0))}
    claim = {"claim": "as fast", "ratio": 1.01, "holds": True, **ways}
    (row,) = parts.prefetch_rows(log(tmp_path, "prefetch", claim))
    assert (row.figure, row.verdict) == ("1.01x (5.05 ms against 5.0; copied when needed: 6.0)", "holds")


def test_the_flagship(parts: ModuleType, tmp_path: Path) -> None:
    run = tmp_path / "flagship"
    run.mkdir()
    mfu = {10: 0.3, 20: 0.5, 30: 0.5, 40: 0.5}
    reports = [{"step": n, "train/tokens_per_second": 1e5 + n, "train/mfu": mfu[n]} for n in mfu]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*reports, {"step": 40, "val/loss": 5}])
    )
    files = {
        run / "micro_batch.json": {"size": 128},
        run / "summary.json": {"peak_memory_bytes": 30 * 2**30, "val/loss": 5.0},
        run / "evaluation.json": {"val/loss": 5.1},
        tmp_path / "plan.json": {"micro_batch": 128, "memory": {"weights": 2**30, "activations": 30 * 2**30}},
    }
    for path, content in files.items():
        path.write_text(json.dumps(content))
    assert "batch.micro_batch=128" in parts.plan(tmp_path)
    rows = [*parts.flagship_rows(tmp_path), *parts.plan_rows(tmp_path), *parts.evaluation_rows(tmp_path)]
    assert [row.figure for row in rows] == [
        "100,030, 50.0%",
        "1.03x (31.0 GiB against 30.0, micro-batches of 128)",
        "5.1000, 5.0000",
    ]
    assert verdicts(rows) == ["holds", "holds", "missed"]


def test_the_flagship_keeps_model_batch_and_precision(parts: ModuleType, composed: Compose) -> None:
    checked, whole = (validate(RunConfig, composed("slimpajama_3h", *more)) for more in (parts.FLAGSHIP, ()))
    for section in ("model", "batch", "precision", "optimizer", "stage"):
        assert getattr(checked, section) == getattr(whole, section)
    assert checked.data.sequence_length == whole.data.sequence_length
    assert (checked.data.source.kind, checked.tracker.kind, checked.budget.time) == ("python_docs", "none", 60)


def test_benchmarks_know_what_they_are_asked_for(parts: ModuleType, benchmark: Callable[[str], ModuleType]) -> None:
    asked = {part.name: part.command(ROOT) for part in parts.PARTS if part.name not in ("plan", "evaluation")}
    assert asked["throughput"][1] in benchmark("throughput").SHAPES
    assert asked["prefetch"][1] in benchmark("prefetch").SHAPES
    assert asked["loss"][-1] in benchmark("cross_entropy").SHAPES
    assert set(parts.MEMORY_CASES) <= set(benchmark("memory").CASES)
    for command in asked.values():
        assert command[0] == "-m" or Path(command[0]).is_file()


@pytest.mark.parametrize(
    ("code", "seconds", "figure"),
    [
        ("print('done')", 60, "figure"),
        ("raise SystemExit('broken | pipe')", 60, "exit code 1 (part.log): broken / pipe"),
        ("import time; time.sleep(60)", 0.3, "stopped after 0 s (part.log)"),
        ("", 0, "not begun: no time was left"),
        ("raise SystemExit(3)", 60, "not understood: FileNotFoundError"),
    ],
)
def test_a_part_that_fails_is_a_row(
    code: str, seconds: float, figure: str, parts: ModuleType, check: ModuleType, tmp_path: Path
) -> None:
    def rows(folder: Path) -> list[Any]:
        if "done" not in (folder / "part.log").read_text():
            (folder / "absent").read_text()
        return [parts.judged("part", "figure", "expected", True)]

    part = parts.Part("part", "what it measures", 1, 2, lambda folder: ["-c", code], rows, codes=(0, 3))
    (row,) = check.rows_of(part, tmp_path, seconds)
    assert row.figure.startswith(figure)
    assert row.verdict == (parts.HOLDS if figure == "figure" else parts.FAILED)


def test_the_table_goes_into_the_page(
    parts: ModuleType, check: ModuleType, benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    rows = [parts.judged("speed", "2x", "at least 1.2x", True), parts.Row("liger", "none", "", parts.NOT_MEASURED)]
    page = tmp_path / "performance.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text())
    benchmark("studies").publish(page, f"A card.\n\n{check.markdown(rows)}", "gpu_check")
    assert "A card.\n\n| part | figure | expected | verdict |\n|---|---|---|---|\n| speed | 2x |" in page.read_text()
    assert check.claim(rows, "A card.") | {"sides": None} == {
        "claim": "the GPU check holds: A card.",
        "ratio": 1.0,
        "holds": True,
        "sides": None,
    }
    assert not check.claim([*rows, parts.judged("memory", "0.8x", "at most 0.7x", False)], "A card.")["holds"]
    assert not check.claim(rows[1:], "A card.")["holds"]


def test_without_a_gpu_it_says_what_it_would_do(parts: ModuleType, check: ModuleType) -> None:
    text = check.outline(parts.PARTS)
    assert "needs a CUDA GPU" in text
    assert all(part.name in text and part.measures in text for part in parts.PARTS)
    assert sum(part.seconds for part in parts.PARTS) <= check.TOTAL
