"""Every command of the page on ARC runs, at tiny size, on a stand-in for SmolLM and a few tasks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from page_commands import commands_of
from stand_ins import RUNS, TINY, stand_in

from pretune.launch.command_line import main

ANSWERS = ("evaluation.max_problems=3", "evaluation.arc.max_new_tokens=8", "evaluation.arc.votes.variants=2")
PUZZLES = ("data.source.num_tasks=60", "data.source.max_size=3", "data.source.num_pairs=2", "model.dim=32",
           "model.num_layers=1", "model.mlp_dim=64", "model.num_heads=2", "model.num_kv_heads=2", "model.head_dim=16",
           "budget.time=null", "evaluation.every=null")  # fmt: skip
SMOLLM = ("data.format.augment.variants=2", "data.format.instruction=Go.", "adapter.rank=2")


def write_tasks(folder: Path) -> None:
    """Twenty tasks that turn a row around, in both layouts."""
    draw, tasks, solutions = random.Random(1), {}, {}
    (folder / "ARC-AGI" / "data" / "training").mkdir(parents=True)
    for number in range(20):
        rows = [[draw.randrange(10) for _ in range(2)] for _ in range(3)]
        pairs = [{"input": [row], "output": [row[::-1]]} for row in rows]
        name, task = f"task{number}", {"train": pairs[:2], "test": pairs[2:]}
        (folder / "ARC-AGI" / "data" / "training" / f"{name}.json").write_text(json.dumps(task))
        tasks[name] = task | {"test": [{"input": pairs[2]["input"]}]}
        solutions[name] = [pairs[2]["output"]]
    (folder / "challenges.json").write_text(json.dumps(tasks))
    (folder / "solutions.json").write_text(json.dumps(solutions))


@pytest.mark.slow
def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path)
    stand_in(Path("HuggingFaceTB/SmolLM-135M-Instruct"), "llama tied, wide heads", "qwen2")
    found = commands_of("how-to/arc.md")
    assert len(found) >= 7
    for file, *given in found:
        shipped, name = file.startswith("src/config/run/"), Path(file).stem
        more: list[str] = []
        if shipped:
            kept = [one for one in SMOLLM if "adapter" not in one or "lora" in name]
            more = [*TINY, *ANSWERS, *(PUZZLES if name == "grid_puzzles" else kept), "data.validation.fraction=0.3"]
        place = str(RUNS / Path(file).name) if shipped else file
        assert main(["--config", place, *given, *more]) == 0, f"{file} {given}: {capsys.readouterr().err[-900:]}"
    figures = json.loads(Path("runs/grid_puzzles/evaluation.json").read_text())
    assert {"arc/accuracy", "arc/trained_accuracy"} <= figures.keys()
    assert Path("runs/grid_puzzles/report.html").read_text().count("<img ") == 2
