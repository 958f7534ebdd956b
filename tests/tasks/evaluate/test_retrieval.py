"""What a model finds in long texts, by length and depth: counted, drawn, kept, and in the report."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from pretune.core.config import ConfigError
from pretune.dispatch import run
from pretune.tasks.evaluate.heat_map import HeatMap, draw
from pretune.tasks.evaluate.retrieval import is_right

Compose = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("text", "right"),
    [(" 123", True), ("123.\nThe pass", True), (" 1234", False), ("12", False), (" the 123", False), ("", False)],
)
def test_an_answer_begins_the_text_and_ends_there(text: str, right: bool) -> None:
    assert is_right(text, " 123") == right


def retrieval(tiny: Compose, texts: Path, *overrides: str) -> dict[str, Any]:
    text = ("data/source@evaluation.retrieval.source.text=files", f"evaluation.retrieval.source.text.files=[{texts}]")
    return tiny("name=one", "evaluation=passkey", *text, *overrides)


def test_every_cell_is_counted_drawn_kept_and_reported(tiny: Compose, texts: Path, tmp_path: Path) -> None:
    cells = ("evaluation.retrieval.lengths=[64,128]", "evaluation.retrieval.depths=[0,0.5,1]",
             "evaluation.retrieval.examples=2", "model.max_sequence_length=160")  # fmt: skip
    assert run(tiny("name=one", "budget.steps=2", "model.max_sequence_length=160")) == 0
    assert run(retrieval(tiny, texts, "task=evaluate", "budget.steps=2", *cells)) == 0
    folder = tmp_path / "runs" / "one"
    found = json.loads((folder / "evaluations" / "passkey.json").read_text())
    assert found["trained_length"] == 32
    assert [(one["length"], one["depth"]) for one in found["cells"]] == [(n, d) for n in (64, 128) for d in (0, 0.5, 1)]
    answers = found["answers"]
    assert len(answers) == 12
    for cell in found["cells"]:
        own = [one for one in answers if (one["length"], one["depth"]) == (cell["length"], cell["depth"])]
        assert cell["accuracy"] == sum(is_right(one["text"], one["answer"]) for one in own) / 2
    assert len({one["answer"] for one in answers}) == 12, "each example has a key of its own"
    metrics = json.loads((folder / "evaluation.json").read_text())
    assert metrics["passkey/accuracy"] == sum(one["right"] for one in answers) / 12
    assert metrics["passkey/questions"] == 12
    assert {"passkey/accuracy_at_64", "passkey/accuracy_at_128"} <= metrics.keys()
    picture = folder / "evaluations" / "passkey.png"
    assert imread(picture).ndim == 3
    assert [one.read_bytes() for one in folder.glob("evaluations/step-2-*.png")] == [picture.read_bytes()]
    assert run(tiny("name=one", "budget.steps=2", "task=report")) == 0
    assert "passkey of one, as it was evaluated last" in (folder / "report.html").read_text()


def test_lengths_beyond_the_model_are_refused(tiny: Compose, texts: Path) -> None:
    assert run(tiny("name=one", "budget.steps=1")) == 0
    with pytest.raises(ConfigError, match=r"lengths has 512, with the answer 524 tokens.*sequence_length=524"):
        run(retrieval(tiny, texts, "task=evaluate", "budget.steps=1", "evaluation.retrieval.lengths=[64,512]"))


def test_a_heat_map_has_a_cell_for_each_length_and_depth() -> None:
    """A third of its cells is all right."""
    shares = {(length, depth): float(length == 64) for length in (64, 128, 256) for depth in (0.0, 1.0)}
    png = draw([("before", HeatMap("passkey", (64, 128, 256), (0.0, 1.0), shares, 128))])
    colours = imread(io.BytesIO(png))[..., :3]
    wrong, right = ((abs(colours - colormaps["viridis"](share)[:3]) < 0.02).all(-1).sum() for share in (0.0, 1.0))
    assert right / (right + wrong) == pytest.approx(1 / 3, abs=0.05)
