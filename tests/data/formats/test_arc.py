"""Tasks of grids as documents: what is written, what is scored, variants that can be undone, and what is refused."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import CHAT, TOKENS, byte_tokenizer, data_config, files, with_defaults, write_lines

from pretune.core.config import InputError, validate
from pretune.data.formats.arc import Arc
from pretune.data.formats.build import build_formatter
from pretune.data.formats.grid_config import AugmentConfig, GridConfig
from pretune.data.formats.grid_variants import Variant, leave_one_out, variants
from pretune.data.formats.grids import Grid, GridTask, GridText, Pair, read_task
from pretune.data.formats.segments import Absent, Place, Unusable
from pretune.data.shards import prepare

PLACE = Place(data_config(source=files("a.jsonl")).source, 6)
PLAIN: dict[str, Any] = {"separator": "", "row_numbers": False, "shape": False, "fence": False}
ALONE: dict[str, Any] = {"variants": 1, "dihedral": True, "colors": "all_but_0", "pair_order": True, "seed": 1}
FORMAT: dict[str, Any] = {
    "kind": "arc", "instruction": "", "grid": PLAIN, "augment": ALONE, "leave_one_out": False,
    "template": with_defaults({"kind": "prompt_completion"}),
}  # fmt: skip
ROW: dict[str, Any] = {
    "id": "a1",
    "train": [{"input": [[0, 1]], "output": [[1, 0]]}, {"input": [[2], [3]], "output": [[3], [2]]}],
    "test": [{"input": [[4, 5, 6]], "output": [[6, 5, 4]]}],
}
colors = st.integers(0, 9)
grids = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.tuples(*[colors] * width), min_size=1, max_size=5).map(tuple)
)


def arc(**changes: Any) -> Arc:
    found = build_formatter(data_config(format=FORMAT | changes).format, TOKENS)
    assert isinstance(found, Arc)
    return found


def texts(formatter: Arc, row: dict[str, Any] = ROW) -> list[list[tuple[str, bool]]]:
    return [[(part.text, part.scored) for part in document] for document in formatter.documents(row, PLACE)]


def test_the_output_of_the_test_alone_is_scored() -> None:
    prompt = "input\n01\noutput\n10\n\ninput\n2\n3\noutput\n3\n2\n\ninput\n456\noutput\n"
    assert texts(arc()) == [[(prompt, False), ("654", True)]]
    assert [part.text for part in arc().prompt(ROW, PLACE)] == [prompt]
    without = ROW | {"test": [{"input": [[4, 5, 6]]}]}
    assert [part.text for part in arc().prompt(without, PLACE)] == [prompt]
    assert texts(arc(instruction="Go on."))[0][0][0] == f"Go on.\n\n{prompt}"


def test_a_chat_scores_the_turn_of_the_assistant() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = arc(template=with_defaults(CHAT | {"template": template}), grid=PLAIN | {"fence": True, "shape": True})
    (document,) = texts(chat)
    assert [text for text, scored in document if scored] == ["```grid shape: 1x3\n654\n```</>"]
    assert "".join(text for text, scored in document if not scored).startswith("<user>input\n```grid shape: 1x2\n01\n")
    assert [part.text for part in chat.prompt(ROW, PLACE)] == [document[0][0]]
    assert chat.end_of_turn == "</>"


def test_each_test_with_an_output_is_an_example_and_each_pair_can_be() -> None:
    two = ROW | {"test": [*ROW["test"], {"input": [[7]], "output": [[8]]}, {"input": [[9]]}]}
    assert [document[1][0] for document in texts(arc(), two)] == ["654", "8"]
    assert [document[1][0] for document in texts(arc(leave_one_out=True), two)] == ["654", "8", "10", "3\n2"]
    # Neither the pair itself nor a test is shown.
    assert texts(arc(leave_one_out=True))[1][0][0] == "input\n2\n3\noutput\n3\n2\n\ninput\n01\noutput\n"
    with pytest.raises(Unusable, match="none of its tests has an output"):
        arc().documents(ROW | {"test": [{"input": [[1]]}]}, PLACE)
    assert texts(arc(leave_one_out=True), ROW | {"test": [{"input": [[1]]}]})[0][1] == ("10", True)


EVERY_GRID = [
    dict(zip(("separator", "row_numbers", "shape", "fence"), values, strict=True))
    for values in product(("", " ", ","), (False, True), (False, True), (False, True))
]


@pytest.mark.parametrize("section", EVERY_GRID)
@given(grid=grids)
def test_what_is_written_is_read_again(section: dict[str, Any], grid: Grid) -> None:
    text = GridText(validate(GridConfig, section))
    written = text.write(grid)
    assert text.read(written) == grid
    assert text.read(f"\n{written}\n\ninput\n11\n1") == grid


@pytest.mark.parametrize("section", EVERY_GRID)
@given(said=st.text("0123456789 ,\n`grid shape:x-", max_size=40) | st.text(max_size=30))
def test_any_text_is_a_grid_or_none(section: dict[str, Any], said: str) -> None:
    found = GridText(validate(GridConfig, section)).read(said)
    assert found is None or {len(row) for row in found} == {len(found[0])}


@pytest.mark.parametrize(("said", "changes"), [
    ("", {}), ("12\n3", {}), ("1a", {}), ("one", {}), ("1 2", {}), ("1" * 31, {}), ("1\n" * 31, {}), ("\u0661", {}),
    ("1 12\n3 12", {"row_numbers": True}), ("12", {"row_numbers": True}), ("1,,2", {"separator": ","}),
    ("12\n34", {"fence": True}), ("```grid\n12", {"fence": True}), ("```grid\n```", {"fence": True}),
])  # fmt: skip
def test_what_is_no_grid(said: str, changes: dict[str, Any]) -> None:
    assert GridText(validate(GridConfig, PLAIN | changes)).read(said) is None


def test_grids_as_people_write_them() -> None:
    """The forms of the reference system: https://github.com/ironbar/arc24."""
    grid = ((0, 0, 1), (0, 2, 0))
    assert GridText(validate(GridConfig, PLAIN)).write(grid) == "001\n020"
    assert GridText(validate(GridConfig, PLAIN | {"row_numbers": True})).write(grid) == "1 001\n2 020"
    fenced = GridText(validate(GridConfig, PLAIN | {"fence": True, "shape": True}))
    assert fenced.write(grid) == "```grid shape: 2x3\n001\n020\n```"


@given(grids, st.integers(0, 3), st.booleans(), st.permutations(range(10)))
def test_a_variant_is_undone(grid: Grid, turns: int, mirrored: bool, new: list[int]) -> None:
    variant = Variant(turns, mirrored, tuple(new), (0,))
    assert variant.undo(variant.apply(grid)) == grid
    assert Counter(cell for row in variant.apply(grid) for cell in row) == Counter(
        new[cell] for row in grid for cell in row
    )


def test_the_eight_symmetries_are_those_of_the_square() -> None:
    grid = np.arange(6).reshape(2, 3)
    expected = {np.rot90(one, turns).tobytes() + bytes(np.rot90(one, turns).shape)
                for one in (grid, grid.T) for turns in range(4)}  # fmt: skip
    found = [
        np.array(Variant(turns, mirrored, tuple(range(10)), (0,)).apply(tuple(map(tuple, grid.tolist()))))
        for turns, mirrored in product(range(4), (False, True))
    ]
    assert {one.astype(grid.dtype).tobytes() + bytes(one.shape) for one in found} == expected


TASK = GridTask("a1", tuple(Pair(((n, 0),), ((0, n),)) for n in range(1, 5)), (Pair(((5, 0),), ((0, 5),)),))


def test_variants_are_seeded_and_the_first_is_the_task() -> None:
    section = validate(AugmentConfig, ALONE | {"variants": 30})
    found = list(variants(TASK, section))
    assert found == list(variants(TASK, section))
    assert found != list(variants(TASK, section.model_copy(update={"seed": 2})))
    assert found[0].of_task(TASK) == TASK
    assert len(set(found)) > 25
    assert all(one.colors[0] == 0 for one in found)
    renamed = GridTask("other", TASK.train, ())
    assert list(variants(renamed, section)) == found


@pytest.mark.parametrize(("key", "value"), [("dihedral", False), ("colors", "none"), ("pair_order", False)])
def test_what_is_off_stays_as_it_is(key: str, value: Any) -> None:
    for one in variants(TASK, validate(AugmentConfig, ALONE | {"variants": 20, key: value})):
        if key == "dihedral":
            assert (one.turns, one.mirrored) == (0, False)
        elif key == "colors":
            assert one.colors == tuple(range(10))
        else:
            assert one.order == (0, 1, 2, 3)


def test_no_pair_is_shown_and_asked() -> None:
    found = list(leave_one_out(TASK))
    assert [one.test[0] for one in found] == list(TASK.train)
    assert all(one.test[0] not in one.train and len(one.train) == 3 for one in found)
    assert list(leave_one_out(GridTask("a", TASK.train[:1], ()))) == []


def test_all_variants_of_a_task_are_on_one_side(tmp_path: Path) -> None:
    rows = [ROW | {"id": f"t{n}", "train": [{"input": [[n % 10, n // 10]], "output": [[n % 10]]}]} for n in range(60)]
    # The same task under another name, and with another test.
    rows += [row | {"id": f"{row['id']}x", "test": [{"input": [[1]], "output": [[2]]}]} for row in rows]
    source = files(write_lines(tmp_path / "a.jsonl", rows))
    unchanging = ALONE | {"variants": 5, "dihedral": False, "colors": "none"}
    config = data_config(source=source, format=FORMAT | {"augment": unchanging}, validation={"fraction": 0.5})
    tokenizer = byte_tokenizer()
    prepared = prepare(config, tokenizer, tmp_path / "cache")
    assert prepared.held_out is not None
    held_out = [task.name for task in prepared.held_out.tasks(None)]
    assert 20 < len(held_out) < 100
    assert {f"{name}x" for name in held_out if not name.endswith("x")} == {n for n in held_out if n.endswith("x")}
    shown: list[set[str]] = []
    for side in (prepared.train, prepared.validation):
        begins = [0, *side.document_ends[:-1]]
        spans = zip(begins, side.document_ends, strict=True)
        read = [tokenizer.decode(side.read(int(b), int(e))[0].tolist()) for b, e in spans]
        shown.append({text.partition("\n\n")[0] for text in read})
        assert len(read) == 5 * 2 * len(shown[-1])
    assert not shown[0] & shown[1]


@pytest.mark.parametrize(("changes", "fault"), [
    ({"train": [{"input": [[1, 2], [3]], "output": [[1]]}]}, "task a1, train pair 1, input: row 2 has 1 cells"),
    ({"test": [{"input": [[1]], "output": [[10]]}]}, "task a1, test pair 1, output: row 1 has the cell 10"),
    ({"test": [{"input": [[-1]]}]}, "the cell -1"),
    ({"test": [{"input": [[True]]}]}, "the cell True"),
    ({"test": [{"input": [["1"]]}]}, "the cell '1'"),
    ({"test": [{"input": [[0.5]]}]}, "the cell 0.5"),
    ({"test": [{"input": []}]}, "is no grid"),
    ({"test": [{"input": [[]]}]}, "row 1 is no list"),
    ({"test": [{"input": [1]}]}, "row 1 is no list"),
    ({"test": [{"output": [[1]]}]}, "test pair 1: it has no input"),
    ({"train": [{"input": [[1]]}]}, "train pair 1: it has no output"),
    ({"train": 3}, "is no list of pairs"),
    ({"train": "[{"}, "not JSON"),
])  # fmt: skip
def test_grids_that_are_none_are_errors_with_their_place(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        read_task(ROW | changes, PLACE)


def test_tasks_without_pairs_are_left_out() -> None:
    for side in ("train", "test"):
        with pytest.raises(Unusable, match=f"no pairs in {side}"):
            read_task(ROW | {side: []}, PLACE)
        with pytest.raises(Absent):
            read_task({key: value for key, value in ROW.items() if key != side}, PLACE)
