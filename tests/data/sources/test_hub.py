"""The real code path to the hub, in separate processes, because the libraries read HF_ENDPOINT on import."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import serve

from pretune.data.tokenizer import train_byte_level

SOURCE = Path(__file__).parents[3] / "src"

READ = """
import json, sys
from pretune.core.config import UserError
from pretune.data.sources import hub
from pretune.data.sources import rows as sources
from pretune.data.sources.config import HubSource

for section in json.load(sys.stdin):
    try:
        print(json.dumps(list(sources.rows(HubSource.model_validate(section)))))
    except UserError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""

TOKENIZER = """
import sys
from pathlib import Path
from pretune.core.config import UserError
from pretune.data.config import HubTokenizer
from pretune.data.tokenizer import load_tokenizer

sys.path.append(TESTS)
from small_data import CHAT, data_config

for name in ("me/tokens", "me/tokens", "me/nothing"):
    try:
        section = HubTokenizer(kind="hub", path=name, eos="<|endoftext|>", add_tokens=())
        tokenizer = load_tokenizer(section, data_config(FORMAT), Path("cache"))
        print(tokenizer.encode("the"), tokenizer.chat_template)
    except UserError as error:
        print(error)
""".replace("TESTS", repr(str(Path(__file__).parents[1])))
CHATS = TOKENIZER.replace("FORMAT", "format=CHAT")
COPIED = TOKENIZER.replace("FORMAT", "format=CHAT | {'template': 'me/tokens'}")
TEXTS = TOKENIZER.replace("FORMAT", "")

GONE = """
import json, os, sys
from pathlib import Path
sys.path += TESTS
from fake_hub import serve

rows = [{"question": f"{n}?", "choices": [str(n), "no"], "answer": "A"} for n in range(40)]
lines = "".join(json.dumps(row) + "\\n" for row in rows).encode()
with serve({"datasets/me/quiz": {"train.jsonl": lines}}) as endpoint:
    os.environ["HF_ENDPOINT"] = endpoint
    from pretune.data.sources import rows as sources
    from pretune.data.shards import prepare
    from small_data import byte_tokenizer, data_config

    config = data_config(source=json.load(sys.stdin), format={"kind": "multiple_choice", "name": "quiz"})
    prepare(config, byte_tokenizer(), Path("cache"))
prepared = prepare(config, byte_tokenizer(), Path("cache"))
print(len(list(prepared.held_out.problems(None))) + prepared.train.num_documents)
print(len(list(prepared.held_out.questions(4))))
""".replace("TESTS", repr([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]))

CLOSED = "http://127.0.0.1:9"


def run(program: str, endpoint: str, folder: Path, given: object = None, **environment: str) -> list[str]:
    """The lines that a fresh Python process prints; it must print nothing to stderr."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(given),
        env=inherited
        | {"PYTHONPATH": str(SOURCE), "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf")}
        | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def section(path: str, split: str = "train", streaming: bool = True, **other: object) -> dict[str, object]:
    defaults = {
        "kind": "hub",
        "path": path,
        "name": None,
        "revision": None,
        "split": split,
        "streaming": streaming,
        "max_rows": None,
    }
    return defaults | other


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", "three"], "n": [1, 2, 3]}), table)
    tokenizer = train_byte_level(iter(["the cat and the dog"] * 9), 300, True).to_str().encode()
    lines = b'{"text": "held out"}\n'
    repositories = {
        "datasets/me/parquet": {"data/train-00000-of-00001.parquet": table.getvalue()},
        "datasets/me/lines": {"train.jsonl": b'{"text": "a"}\n{"text": "b"}\n', "validation.jsonl": lines},
        "datasets/me/named": {
            "README.md": b"---\nconfigs:\n- config_name: small\n  data_files: part/*.json\n---\n",
            "part/b.json": json.dumps([{"text": "b", "n": "007"}]).encode(),
            "part/a.json": gzip.compress(b'{"text": "a", "args": {"x": 1}}\n{"text": 7, "args": {}}\n'),
            "other.json": b"[]",
        },
        "datasets/me/script": {"script.py": b"print('no')"},
        "models/me/tokens": {
            "tokenizer.json": tokenizer,
            "tokenizer_config.json": b"{}",
            "chat_template.jinja": b"the template",
        },
    }
    with serve(repositories) as endpoint:
        yield endpoint


def test_rows_streaming_and_downloaded_are_the_same(hub: str, tmp_path: Path) -> None:
    wanted = [
        section("me/parquet"), section("me/parquet", streaming=False), section("me/parquet", max_rows=2),
        section("me/lines"), section("me/lines", "validation", streaming=False),
    ]  # fmt: skip
    streamed, downloaded, two, lines, validation = (json.loads(line) for line in run(READ, hub, tmp_path, wanted))
    assert streamed == downloaded == [{"text": "one", "n": 1}, {"text": "two", "n": 2}, {"text": "three", "n": 3}]
    assert two == streamed[:2]
    assert lines == [{"text": "a"}, {"text": "b"}]
    assert validation == [{"text": "held out"}]


def test_json_files_are_read_as_local_ones_are(hub: str, tmp_path: Path) -> None:
    parts = ("train", "train[1:]", "train[:34%]+train[-1:]")
    wanted = [section("me/named", part, streaming, name="small") for part in parts for streaming in (True, False)]
    rows = [{"text": "a", "args": {"x": 1}}, {"text": 7, "args": {}}, {"text": "b", "n": "007"}]
    found = [json.loads(line) for line in run(READ, hub, tmp_path, wanted)]
    assert found == [part for part in (rows, rows[1:], [rows[0], rows[2]]) for _ in range(2)]
    assert [json.loads(line) for line in run(READ, CLOSED, tmp_path, wanted[1::2], HF_HUB_OFFLINE="1")] == found[1::2]
    (message,) = run(READ, hub, tmp_path, [section("me/lines", "train[oops")])
    assert "no split 'train[oops'" in message


def test_what_the_hub_does_not_have_is_one_clear_error(hub: str, tmp_path: Path) -> None:
    wanted = [
        section("me/nothing"), section("me/lines", "test"), section("me/lines", name="other"), section("me/script"),
        section("not a name"),
    ]  # fmt: skip
    messages = [json.loads(line) for line in run(READ, hub, tmp_path, wanted)]
    for message, word in zip(messages, ["me/nothing", "test", "other", "me/script", "owner/name"], strict=True):
        assert message.startswith("InputError: ")
        assert word in message


def test_a_tokenizer_is_downloaded_and_then_needs_no_network(hub: str, tmp_path: Path) -> None:
    first, second, missing = run(TEXTS, hub, tmp_path)
    assert first == second
    assert "no model 'me/nothing'" in missing
    assert run(TEXTS, CLOSED, tmp_path)[:2] == [first, second]


def test_chats_bring_the_template_of_the_tokenizer_along(hub: str, tmp_path: Path) -> None:
    first, second, _ = run(CHATS, hub, tmp_path)
    assert first == second
    assert first.endswith("] the template")
    assert run(CHATS, CLOSED, tmp_path)[:2] == [first, second]
    assert run(COPIED, CLOSED, tmp_path)[:2] == [first, second]


def test_a_template_is_copied_from_the_hub(hub: str, tmp_path: Path) -> None:
    assert run(COPIED, hub, tmp_path)[0].endswith("] the template")
    (message, *_) = run(COPIED.replace("'me/tokens'}", "'me/nothing'}"), hub, tmp_path)
    assert "no model 'me/nothing'" in message
    (message, *_) = run(COPIED.replace("'me/tokens'}", "'me/..no'}"), hub, tmp_path)
    assert "'me/..no' is no" in message


def test_no_network_is_said_at_once(tmp_path: Path) -> None:
    # The libraries' own retries take longer than the time `run` allows for all four.
    lines = run(READ, CLOSED, tmp_path, [section("me/lines"), section("me/lines", streaming=False)])
    lines += run(TEXTS, CLOSED, tmp_path)[:2]
    assert all("cannot reach the hub" in line and "HF_HUB_OFFLINE=1" in line for line in lines)


def test_a_downloaded_dataset_needs_no_network_in_offline_mode(hub: str, tmp_path: Path) -> None:
    wanted = [section("me/lines", streaming=False)]
    online = run(READ, hub, tmp_path, wanted)
    assert run(READ, CLOSED, tmp_path, wanted, HF_HUB_OFFLINE="1") == online
    (missing,) = run(READ, CLOSED, tmp_path, [section("me/parquet")], HF_HUB_OFFLINE="1")
    assert "InputError" in missing


def test_prepared_data_and_problems_need_no_hub(tmp_path: Path) -> None:
    assert run(GONE, CLOSED, tmp_path, section("me/quiz", streaming=False)) == ["40", "4"]
