"""The parts of gpu_check.py: what each runs, and what its output says.

On its own it measures nothing.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from studies import MAIN, ROOT, RUN_FILES, series

HOLDS, MISSED, FAILED, NOT_MEASURED = "holds", "**missed**", "**failed**", "not measured"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    part: str
    figure: str
    expected: str
    verdict: str


@dataclass(frozen=True)
class Part:
    name: str
    measures: str
    seconds: int
    """How long it usually takes, when nothing has been compiled before."""
    limit: int
    """When it is stopped, in seconds."""
    command: Callable[[Path], list[str]]
    """What Python is called with, given the folder in which all parts leave what they find."""
    rows: Callable[[Path], list[Row]]
    """Reads what the command left there; what it printed is in NAME.log."""
    codes: tuple[int, ...] = (0,)
    """Exit codes with which it has done its work."""


def judged(part: str, figure: str, expected: str, holds: bool) -> Row:
    return Row(part, figure, expected, HOLDS if holds else MISSED)


def objects(log: Path) -> list[dict[str, Any]]:
    """The JSON objects that a benchmark has printed, its claim last."""
    found = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    if not found or "claim" not in found[-1]:
        raise ValueError(f"{log.name} has no claim")
    return found


def script(name: str, *options: str) -> Callable[[Path], list[str]]:
    """The command of a part that is a benchmark."""
    return lambda folder: [str(ROOT / "benchmarks" / f"{name}.py"), *options]


SUBJECTS = {
    "test_gpu_transformer": "Loss and gradients of the model, against float64 on the CPU and transformers",
    "test_gpu_loss": "Chunked loss, compiled, against torch's own in float64",
    "test_gpu_attention": "Flex attention against the mask written out",
    "test_gpu_optimizers": "AdamW (fused), Lion, Muon, 8-bit AdamW, against the CPU",
    "test_gpu_adapters": "LoRA, DoRA, LoHa, LoKr, against peft's own layers",
    "test_gpu_precision": "fp8 against its emulation; runs in fp8, fp16 and bf16",
    "test_gpu_generation": "Greedy decoding, compiled, against uncompiled",
    "test_gpu_resume": "Resume with `deterministic=true`, bit for bit",
    "test_prefetch": "Prefetched batches are the right ones, and no step waits for the host",
}
"""What the files of tests show, by name."""


def tests(folder: Path) -> list[str]:
    # In parallel, because most of their time is compilation.
    parallel = ["-n", "auto", "--maxprocesses", "4"]
    return ["-m", "pytest", str(ROOT / "tests"), "-m", "gpu", *parallel, f"--junitxml={folder / 'tests.xml'}"]


def test_rows(folder: Path) -> list[Row]:
    """A row for each file of tests."""
    counts: dict[str, Counter[str]] = {}
    notes: dict[str, list[str]] = {}
    for case in ElementTree.parse(folder / "tests.xml").iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2]
        states = [child for child in case if child.tag in ("failure", "error", "skipped")]
        state = states[0].tag if states else "passed"
        counts.setdefault(file, Counter())[{"error": "failure"}.get(state, state)] += 1
        if states:
            note = states[0].get("message", "") if state == "skipped" else case.get("name", "")
            notes.setdefault(file, []).append(note)
    return [_tested(file, found, notes.get(file, [])) for file, found in counts.items()]


def _tested(file: str, counts: Counter[str], notes: list[str]) -> Row:
    words = {"passed": "passed", "failure": "failed", "skipped": "skipped"}
    figure = ", ".join(f"{counts[state]} {word}" for state, word in words.items() if counts[state])
    if notes:
        # A name of a test may contain what ends a cell.
        figure += f" ({'; '.join(sorted(set(notes)))})".replace("|", "/")
    verdict = MISSED if counts["failure"] else HOLDS if counts["passed"] else NOT_MEASURED
    return Row(SUBJECTS.get(file, file), figure, "all pass", verdict)


def loss_rows(folder: Path) -> list[Row]:
    *sides, claim = objects(folder / "loss.log")
    rows = [judged("Chunked loss against the fastest other: time", f"{claim['ratio']}x", "at most 1x", claim["holds"])]
    times = {(one["side"], one["shape"]): one["milliseconds"] for one in sides}
    ratios = [times["ours", shape] / time for (side, shape), time in times.items() if side == "liger"]
    part = "... against Liger's kernel"
    if not ratios:
        return [*rows, Row(part, "liger-kernel is not installed", "at most 1x", NOT_MEASURED)]
    return [*rows, judged(part, f"{max(ratios):.2f}x", "at most 1x", max(ratios) <= 1)]


def throughput_rows(folder: Path) -> list[Row]:
    claim = objects(folder / "throughput.log")[-1]
    ours, theirs = (claim[side]["tokens_per_second"] for side in ("pretune", "transformers"))
    share, memory = claim["pretune"]["matmul_share"], claim["memory_ratio"]
    speeds = f"{claim['ratio']}x ({ours:,.0f} against {theirs:,.0f})"
    reached = f"{share:.1%} of {claim['matmul_flops'] / 1e12:,.0f} TFLOP/s"
    return [
        judged("Training step against transformers' Llama compiled, 180M: tokens/s", speeds, "at least 1.2x",
               claim["ratio"] >= 1.2),
        judged("... share of the measured rate of a matrix product", reached, "at least 40%", share >= 0.4),
        judged("... peak memory of training", f"{memory}x", "at most 0.7x", memory <= 0.7),
    ]  # fmt: skip


def memory_rows(folder: Path) -> list[Row]:
    claim = objects(folder / "memory.log")[-1]
    ratios = [side["predicted_over_measured"] for side in claim["sides"].values()]
    part = f"Predicted against measured peak memory of a step, {len(ratios)} configurations"
    return [judged(part, f"{min(ratios):.2f}x to {max(ratios):.2f}x", "within 10%", claim["holds"])]


def prefetch_rows(folder: Path) -> list[Row]:
    claim = objects(folder / "prefetch.log")[-1]
    there, ahead, late = (claim[way]["milliseconds"] for way in ("there", "prefetched", "copied"))
    figure = f"{claim['ratio']}x ({ahead} ms against {there}; copied when needed: {late})"
    part = "Step with prefetched batches against one with its batch there"
    return [judged(part, figure, "at most 1.02x", claim["holds"])]


# The run file as it is, but for what needs a network, and what takes time without being measured.
FLAGSHIP = (
    *("name=flagship", "tracker=none", "data=python_docs", "data.sequence_length=512", "budget.time=60s"),
    *("evaluation={every: null, at_start: false}", "checkpoint.every=null", "samples={every: null, prompts: []}"),
)


def flagship(folder: Path) -> list[str]:
    return [MAIN, "--config", str(RUN_FILES / "slimpajama_3h.yaml"), *FLAGSHIP, f"output_dir={folder}"]


def flagship_rows(folder: Path) -> list[Row]:
    # The first reports include the warming up of caches and clocks.
    speeds, shares = (
        [value for _, value in series(folder / "flagship", f"train/{name}")] for name in ("tokens_per_second", "mfu")
    )
    speed, mfu = (statistics.median(values[len(values) // 4 :]) for values in (speeds, shares))
    part = "`slimpajama_3h` for a minute: tokens/s, and share of the card's peak (mfu)"
    return [judged(part, f"{speed:,.0f}, {mfu:.1%}", "at least 40%", mfu >= 0.4)]


def plan(folder: Path) -> list[str]:
    """Plan the run with the micro-batch that it found."""
    size = read(folder / "flagship" / "micro_batch.json")["size"]
    return [*again(folder), "task=plan", f"batch.micro_batch={size}", f"plan.file={folder / 'plan.json'}"]


def plan_rows(folder: Path) -> list[Row]:
    plan, measured = read(folder / "plan.json"), read(folder / "flagship" / "summary.json")["peak_memory_bytes"]
    predicted = sum(plan["memory"].values())
    ratio, sizes = predicted / measured, f"{predicted / 2**30:.1f} GiB against {measured / 2**30:.1f}"
    figure = f"{ratio:.2f}x ({sizes}, micro-batches of {plan['micro_batch']})"
    return [judged("... its predicted against its measured peak memory", figure, "within 10%", abs(ratio - 1) <= 0.1)]


def evaluation_rows(folder: Path) -> list[Row]:
    files = ("evaluation.json", "summary.json")
    found, wanted = (read(folder / "flagship" / name)["val/loss"] for name in files)
    part = "... its validation loss by `task=evaluate`, and as it ended"
    return [judged(part, f"{found:.4f}, {wanted:.4f}", "equal to 0.1%", abs(found / wanted - 1) <= 1e-3)]


def again(folder: Path) -> list[str]:
    """The command of another task of the flagship's run."""
    return [MAIN, "--config", str(folder / "flagship" / "config.yaml")]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


MEMORY_CASES = ("nano", "nano, eager", "nano, muon, documents apart")
PARTS = (
    Part("tests", "every result against a reference: `pytest -m gpu`", 150, 240, tests, test_rows, (0, 1)),
    Part("flagship", "a minute of slimpajama_3h: tokens/s, mfu", 150, 220, flagship, flagship_rows),
    Part("plan", "its peak memory against what task=plan predicts", 15, 60, plan, plan_rows),
    Part("evaluation", "its validation loss by task=evaluate", 20, 60,
         lambda folder: [*again(folder), "task=evaluate"], evaluation_rows),
    Part("throughput", "tokens/s against compiled transformers and the rate of a matrix product", 100, 180,
         script("throughput", "180m", "--device", "cuda", "--bursts", "2", "--seconds", "3"), throughput_rows),
    Part("loss", "the chunked loss against torch's and, where it is installed, Liger's", 40, 90,
         script("cross_entropy", "--device", "cuda", "--shapes", "gpt2"), loss_rows),
    Part("memory", "peak memory of a step against the prediction", 70, 120,
         script("memory", "--device", "cuda", "--cases", *MEMORY_CASES), memory_rows),
    Part("prefetch", "a step with prefetched batches, with its batch there, and with a copy", 40, 80,
         script("prefetch", "14m", "--device", "cuda", "--bursts", "3", "--seconds", "1"), prefetch_rows),
)  # fmt: skip
"""In the order in which they run: what is most worth knowing comes first, should the time not suffice."""
