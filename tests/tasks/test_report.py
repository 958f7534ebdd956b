from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from pretune.core.config import InputError
from pretune.dispatch import run
from pretune.tasks.report.figure import Curves, draw, draw_losses
from pretune.tasks.report.groups import common_name
from pretune.tasks.report.task import report


def write_run(folder: Path, rows: list[dict[str, Any]], stage: str = "pretrain", **files: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(f"name: {folder.name}\nstage:\n  kind: {stage}\n")
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def falling(steps: int, start: float = 8.0, **last: float) -> list[dict[str, Any]]:
    """Rows of a run whose losses fall by a thousandth per step."""
    rows: list[dict[str, Any]] = []
    for step in range(0, steps + 1, 10):
        where = {"step": step, "tokens": step * 100, "seconds": step * 0.1}
        if step:
            rows.append({**where, "train/loss": start - step / 1000, "train/lr": 1e-3})
        if step % 50 == 0:
            rows.append({**where, "val/loss": start - step / 1000, "val/perplexity": 2.0})
    rows[-1] |= last
    return rows


class Page(HTMLParser):
    """The resources a page would load, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_stages_are_compared_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(
        tmp_path / "pre",
        falling(200),
        summary_json='{"step": 20, "parameters": 4200000}',
        samples_jsonl=json.dumps({"step": 3, "prompt": "<b>", "text": "</pre><script>x</script>"}) + "\n",
    )
    accuracy = {"mathqa/accuracy": 0.525, "mathqa/accuracy_error": 0.02, "mathqa/chance": 0.2}
    second = write_run(tmp_path / "fine", falling(100, 4.0, **accuracy), "finetune")
    report([first, second], tmp_path / "both")

    rows = list(csv.DictReader(io.StringIO((tmp_path / "both" / "report.csv").read_text())))
    assert [row["run"] for row in rows] == ["pre", "fine"]
    assert float(rows[0]["val loss"]) == pytest.approx(7.8)
    assert (rows[0]["complete"], rows[1]["complete"]) == ("True", "False")
    assert (rows[0]["mathqa/accuracy"], rows[1]["mathqa/accuracy"]) == ("", "0.525")
    assert float(rows[1]["tokens/s"]) == pytest.approx(1000)

    markdown = (tmp_path / "both" / "report.md").read_text().splitlines()
    assert markdown[0] == "| run | pre | fine |"
    assert "| mathqa/accuracy |  | 52.5% ± 2.0% |" in markdown
    assert "mathqa/accuracy" in capsys.readouterr().out

    page = Page((tmp_path / "both" / "report.html").read_text())
    assert page.open == []
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    picture = base64.b64decode(page.loads[0].partition(",")[2])
    assert picture == (tmp_path / "both" / "curves.png").read_bytes()
    text = "".join(page.words)
    for expected in ("</pre><script>x</script>", "kind: finetune", "4200000", "52.5%"):
        assert expected in text


def test_runs_that_differ_by_their_seed_stand_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = []
    for seed, loss in ((1, 4.0), (2, 4.2), (3, 4.4)):
        summary = {"step": 20, "parameters": 1000, "trainable_parameters": 20, "peak_memory_bytes": 2**30}
        rows = falling(100, loss, **{"mathqa/accuracy": loss / 10, "mathqa/accuracy_error": 0.02})
        rows[-1] |= {"train/tokens_per_second": 900.0, "train/scored_tokens_per_second": 90.0}
        run = write_run(tmp_path / f"lora_s{seed}", rows, "finetune", summary_json=json.dumps(summary))
        (run / "config.yaml").write_text(
            f"name: {run.name}\nseed: {seed}\nstage: {{kind: finetune}}\ndata: {{seed: 1}}\n"
        )
        runs.append(run)
    other = write_run(tmp_path / "full_s1", falling(100, 4.1), "finetune")
    (other / "config.yaml").write_text("name: full_s1\nseed: 1\nstage: {kind: finetune}\ndata: {seed: 2}\n")
    report([runs[0], other, *runs[1:]], tmp_path / "all")
    lines = (tmp_path / "all" / "report.md").read_text().splitlines()
    assert lines[0] == "| run | lora (3 seeds) | full_s1 |"
    assert "| val loss | 4.1000 ± 0.2000 | 4.0000 |" in lines
    assert "| mathqa/accuracy | 42.0% ± 2.0% |  |" in lines
    assert "| trained | 20 |  |" in lines
    assert "| steps | 100 | 100 |" in lines
    assert "| scored tokens/s | 100 |  |" in lines
    assert "| peak memory | 1.00 GiB |  |" in lines
    assert "standard deviation" in capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO((tmp_path / "all" / "report.csv").read_text())))
    assert [row["run"] for row in rows] == ["lora_s1", "full_s1", "lora_s2", "lora_s3"]
    assert [row["group"] for row in rows] == ["lora (3 seeds)", "full_s1", "lora (3 seeds)", "lora (3 seeds)"]
    assert [row["seed"] for row in rows] == ["1", "1", "2", "3"]
    assert rows[0]["mathqa/accuracy_error"] == "0.02"


@pytest.mark.parametrize(
    ("names", "together"),
    [
        (["lora_s1", "lora_s2"], "lora (2 seeds)"),
        (["tune,seed=1", "tune,seed=12"], "tune (2 seeds)"),
        (["lora-r16-1", "lora-r16-2"], "lora-r16 (2 seeds)"),
        (["axes1", "axes2"], "axes (2 seeds)"),
        (["one", "two"], "one (2 seeds)"),
        (["s1"], "s1"),
    ],
)
def test_a_group_has_a_name(names: list[str], together: str) -> None:
    assert common_name(names) == together


def test_a_run_reports_on_itself_while_it_trains(tmp_path: Path) -> None:
    run = write_run(tmp_path / "alone", falling(50))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "tra')
    report([run], run)
    assert (run / "report.html").is_file()
    assert "| complete | no |" in (run / "report.md").read_text()


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 0}],
        [{"step": 0, "val/loss": 8.0}],
        [{"step": 1, "tokens": 5, "train/loss": None, "val/loss": None, "mathqa/accuracy": None}],
        [{"step": 1, "tokens": 5, "train/loss": 1e30}, {"step": 2, "tokens": 6, "train/loss": 1e-30}],
        [{"step": step, "val/loss": 3.0} for step in range(3)],
        [{"step": 7, "tokens": 0, "seconds": 0.0, "mathqa/accuracy": 0.0, "mathqa/chance": 0.2}],
    ],
)
def test_sparse_and_strange_figures_can_be_shown(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    report([write_run(tmp_path / "run", rows)], tmp_path / "out")


@pytest.mark.parametrize("content", [None, "", '{"step": 1'])
def test_a_run_without_figures_is_refused(tmp_path: Path, content: str | None) -> None:
    good, empty = write_run(tmp_path / "good", falling(50)), tmp_path / "empty"
    empty.mkdir()
    if content is not None:
        (empty / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match="empty has no metrics yet"):
        report([good, empty], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_destination_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", falling(50))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=re.escape(os.fspath(tmp_path / "file"))):
        report([run], tmp_path / "file" / "inside")


def colors_in(picture: bytes) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(picture))[:, :, :3]


def test_stages_stand_side_by_side_and_runs_of_one_stage_share_a_panel() -> None:
    one = Curves("a", "pretrain", falling(100), "a")
    fine = Curves("b", "finetune", falling(100, **{"mathqa/accuracy": 0.5, "mathqa/chance": 0.2}), "b")
    other = Curves("c", "pretrain", falling(100, 7.5), "c")

    def width(*runs: Curves) -> int:
        return colors_in(draw(runs)).shape[1]

    assert width(one, other) == width(one)
    assert width(one, fine) > width(one)
    assert width(one, fine) == width(one, other, fine)
    # Each run has a color of its own: blue, then orange.
    picture = colors_in(draw([one, other]))
    for color in ((0x25, 0x63, 0xEB), (0xEA, 0x58, 0x0C)):
        assert np.isclose(picture, np.array(color) / 255, atol=0.01).all(axis=2).sum() > 100


def test_the_picture_is_the_same_each_time() -> None:
    runs = [Curves("a", "pretrain", falling(100), "a")]
    assert draw(runs) == draw(runs)


def test_the_task_reports_on_named_runs(tmp_path: Path, composed: Callable[..., dict[str, Any]]) -> None:
    from pretune.dispatch import run

    write_run(tmp_path / "first", falling(50))
    mapping = composed("smoke", "task=report", "report.runs=[first]", "name=comparison", f"output_dir={tmp_path}")
    assert run(mapping) == 0
    assert (tmp_path / "comparison" / "report.html").is_file()
    with pytest.raises(InputError, match="did you mean 'first'"):
        run(mapping | {"report": mapping["report"] | {"runs": ["frist"]}})


@pytest.mark.parametrize(
    ("losses", "accuracy", "code", "said"),
    [
        ((8.3, 3.6), None, 0, "one has learned: validation loss 8.30 -> 3.60"),
        ((8.3, 7.6), None, 1, "one has learned too little: validation loss 8.30 -> 7.60. It made 5 steps in 180 s"),
        ((4.8, 0.2), 0.93, 0, "93.0% of the problems right (guessing: 20%)"),
        ((4.8, 0.2), 0.25, 1, "25.0% of the problems right (guessing: 20%). It made 5 steps in 180 s (103 tokens/s)"),
        ((8.3,), None, 1, "evaluated only once"),
    ],
)
def test_runs_are_judged_where_that_is_asked_for(
    losses: tuple[float, ...], accuracy: float | None, code: int, said: str, tmp_path: Path, tiny: Any, capsys: Any
) -> None:
    rows = [{"step": step, "val/loss": loss, "tokens": step, "seconds": step} for step, loss in enumerate(losses)]
    summary: dict[str, Any] = {"step": 5, "seconds": 180.2, "train/tokens_per_second": 103.4}
    if accuracy is not None:
        summary |= {"quiz/accuracy": accuracy, "quiz/chance": 0.2}
    write_run(tmp_path / "runs" / "one", rows, summary_json=json.dumps(summary))
    task = ("name=both", "task=report", "report.runs=[one]")
    assert run(tiny(*task)) == 0
    assert "learned" not in "".join(capsys.readouterr())
    assert run(tiny(*task, "report.verify=true")) == code
    out, err = capsys.readouterr()
    assert said in (err if code else out)


def test_a_run_of_five_steps_has_a_curve_and_its_whole_axis() -> None:
    rows = [
        {"step": 0, "tokens": 0, "val/loss": 8.0},
        {"step": 5, "tokens": 500, "train/loss": 7.9},
        {"step": 5, "tokens": 500, "val/loss": 7.5},
    ]
    axes = Figure().subplots()
    draw_losses(axes, [(Curves("a", "pretrain", rows, "a"), "red")])
    assert axes.get_ylim()[0] < 7.5
    assert axes.get_ylim()[1] > 8.0
    training = [line for line in axes.lines if line.get_label() == "training"]
    assert [line.get_marker() for line in training] == ["o"]


def test_a_run_counts_once_however_often_it_is_named_or_copied(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    for name, seed in (("one", 1), ("two", 2)):
        assert run(tiny(f"name={name}", f"seed={seed}", "budget.steps=2", "samples.prompts=[]")) == 0
    shutil.copytree(runs / "one", runs / "copy")
    (runs / "link").symlink_to("one")
    named = f"report.runs=[one,{runs / 'one'},link,two]"
    capsys.readouterr()
    assert run(tiny("name=both", "task=report", named)) == 0
    assert "4 names of 2 runs" in capsys.readouterr().out
    header = (runs / "both" / "report.md").read_text().splitlines()[0]
    assert "(2 seeds)" in header
    assert run(tiny("name=all", "task=report", "report.runs=[one,two,copy]")) == 0
    header = (runs / "all" / "report.md").read_text().splitlines()[0]
    assert "(2 seeds) | copy |" in header
