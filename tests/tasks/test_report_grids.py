"""Pictures of tasks of grids in the report."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import colors, image

from pretune.dispatch import run
from pretune.tasks.report.grids import COLORS, answered_tests, draw_tests

TEST: dict[str, Any] = {
    "task": "a1", "test": 1, "input": [[0, 1, 2], [3, 4, 5]], "wanted": [[9]], "grid": [[8]], "right": False,
    "votes": [{"grid": [[9]], "count": 2, "log_probability": -1.0}], "samples": [], "text": "8",
}  # fmt: skip
NONE = TEST | {"grid": None, "votes": [], "wanted": None}


def shown(tests: list[dict[str, Any]]) -> set[int]:
    """The colours of ARC, by their numbers, that a picture has."""
    pixels = image.imread(io.BytesIO(draw_tests(tests)))[..., :3]
    rgb = {tuple((cell * 255).round().astype(int)) for cell in pixels.reshape(-1, 3)}
    return {n for n, color in enumerate(COLORS) if tuple(round(255 * part) for part in colors.to_rgb(color)) in rgb}


def test_each_cell_has_its_colour() -> None:
    assert shown([TEST]) >= {1, 2, 3, 4, 5, 8, 9}
    assert not shown([TEST]) & {6, 7}
    assert not shown([NONE]) & {8, 9}
    assert 7 in shown([NONE, TEST | {"trained": TEST | {"grid": [[7]]}}])


def test_the_report_has_a_picture_of_each_run_that_answered(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    mapping = tiny("name=one", "budget.steps=1", "samples.prompts=[]")
    assert run(mapping) == 0
    folder = tmp_path / "runs" / "one"
    assert answered_tests(folder) == []
    (folder / "evaluations").mkdir(exist_ok=True)
    (folder / "evaluations" / "arc.jsonl").write_text("".join(json.dumps(test) + "\n" for test in (TEST, NONE)))
    assert run(mapping | {"task": "report"}) == 0
    page = (folder / "report.html").read_text()
    assert page.count("<img ") == 2
    assert 'alt="Tasks as one answers them"' in page
