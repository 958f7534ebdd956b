"""Nothing that a terminal obeys reaches it, wherever the text comes from."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pretune.core.config import UserError
from pretune.core.terminal import printable, say, shown
from pretune.dispatch import run

Compose = Callable[..., dict[str, Any]]
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r[red]\x00"


def obeyed(text: str) -> set[str]:
    """The characters of a text that a terminal obeys."""
    return {one for one in text if unicodedata.category(one) == "Cc"} - {"\n", "\t"}


@given(st.text())
def test_any_text_can_be_printed_anywhere(text: str) -> None:
    for encoding in ("utf-8", "ascii", "latin-1", "cp1252", None):
        found = printable(text, encoding)
        assert obeyed(found) == set()
        found.encode(encoding or "utf-8")
        assert len(found) == len(text)


@given(st.text(alphabet=st.characters(exclude_categories=["Cc", "Cs"])))
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text
    file = io.StringIO()
    say(text, file=file)
    assert file.getvalue() == text + "\n"


@given(st.text(alphabet="[]/ab=#"))
def test_cells_are_not_markup(text: str) -> None:
    console = Console(file=io.StringIO(), width=1000)
    console.print(shown(text), highlight=False, emoji=False)
    assert console.file.getvalue() == text + "\n"  # type: ignore[attr-defined]


@pytest.fixture
def hostile(tiny: Compose, tmp_path: Path) -> Compose:
    """A run on chats, whose texts, keys, file name and template hold escapes."""
    path = tmp_path / f"chats{EVIL[:12]}.jsonl"
    rows = [
        {
            "messages": [{"role": "user", "content": f"{EVIL} {n}"}, {"role": "assistant", "content": f"{EVIL}!"}],
            EVIL: 1,
        }
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% for m in messages %}" + EVIL[:14] + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

    def compose(*overrides: str) -> dict[str, Any]:
        mapping = tiny("name=a", "data/format=chat_plain", "budget.steps=2", "tracker=none", *overrides)
        mapping["data"]["source"]["files"] = [str(path)]
        mapping["data"]["format"]["template"] = template
        mapping["samples"]["prompts"] = [EVIL]
        mapping["generate"]["max_new_tokens"] = 4
        return mapping

    return compose


def test_no_task_prints_what_a_terminal_obeys(hostile: Compose, capfd: pytest.CaptureFixture[str]) -> None:
    for overrides in (
        ("task=prepare", "prepare.show=2"),
        ("task=train",),
        ("task=report",),
        ("task=evaluate",),
        ("task=plan",),
        ("task=generate",),
    ):
        mapping = hostile(*overrides)
        mapping["generate"]["prompt"] = EVIL
        assert run(mapping) == 0
    out, err = capfd.readouterr()
    assert "owned" in out
    assert obeyed(out) == set()
    assert obeyed(err) == set()


def test_nor_does_an_error(hostile: Compose, capfd: pytest.CaptureFixture[str]) -> None:
    from pretune.launch.command_line import main

    assert main([f"optimizer.lr={EVIL}"]) == 2
    mapping = hostile()
    mapping["data"]["format"]["template"] = "{{ raise_exception('" + EVIL[:12] + "') }}"
    with pytest.raises(UserError):
        run(mapping)
    assert obeyed("".join(capfd.readouterr())) == set()
