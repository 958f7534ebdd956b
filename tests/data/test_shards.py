from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data import MATHQA, byte_tokenizer, data_config, files, write_texts

from pretune.core.config import ConfigError, InputError
from pretune.data.encoding import Sizes
from pretune.data.formats.build import build_formatter
from pretune.data.formats.documents import documents
from pretune.data.shards import prepare
from pretune.data.tokens import TokenData

ROOT = Path(__file__).parents[2]


def texts(count: int) -> list[str]:
    return [f"document {number} " + "ab c" * (number % 7) + "é" for number in range(count)]


def content(data: TokenData) -> list[tuple[list[int], list[bool]]]:
    """Each document as ids and flags."""
    begins = [0, *data.document_ends[:-1]]
    found = []
    for begin, end in zip(begins, data.document_ends, strict=True):
        tokens, scored = data.read(int(begin), int(end))
        found.append((tokens.tolist(), [True] * len(tokens) if scored is None else scored.tolist()))
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_documents_end_with_eos_and_keep_what_is_scored(tmp_path: Path) -> None:
    config, tokenizer = data_config(format=MATHQA), byte_tokenizer()
    prepared = prepare(config, tokenizer, tmp_path)
    for side, data in (("train", prepared.train), ("validation", prepared.validation)):
        expected = []
        for segments in documents(config, side, build_formatter(config.format, tokenizer.template_tokens)):
            ids, flags = [], []
            for segment in segments:
                new = tokenizer.encode(segment.text)
                ids += new
                flags += [segment.scored] * len(new)
            expected.append(([*ids, tokenizer.eos_id], [*flags, True]))
        assert content(data) == expected
        assert data.num_documents == len(expected)
        assert data.num_scored == sum(sum(flags) for _, flags in expected)


SMALL = Sizes(shard_tokens=1500, chunk_characters=400)


def test_many_shards_read_like_one_array(tmp_path: Path) -> None:
    source = files(write_texts(tmp_path, texts(400)))
    config, tokenizer = data_config(source=source), byte_tokenizer()
    whole = prepare(config, tokenizer, tmp_path / "one").train
    cut = prepare(config, tokenizer, tmp_path / "many", SMALL).train
    assert len(list(cut.folder.glob("shard-*"))) > 3
    assert cut.num_tokens == whole.num_tokens
    assert np.array_equal(cut.document_ends, whole.document_ends)
    for start in range(0, whole.num_tokens - 700, 333):
        assert np.array_equal(cut.read(start, start + 700)[0], whole.read(start, start + 700)[0])


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = [{src!r}, {tests!r}]
from small_data import byte_tokenizer, data_config, files
from pretune.data.encoding import Sizes
from pretune.data.shards import prepare

tokenizer = byte_tokenizer()
encode = tokenizer.encode_documents

def slowly(documents):
    print("chunk", flush=True)
    time.sleep({pause})
    return encode(documents)

tokenizer.encode_documents = slowly
config = data_config(source=files({source!r}), num_workers=1)
prepare(config, tokenizer, Path({cache!r}), Sizes(shard_tokens=1500, chunk_characters=400))
"""


def test_killed_and_continued_is_byte_for_byte_the_uninterrupted_one(tmp_path: Path) -> None:
    source = write_texts(tmp_path, texts(400))

    def script(cache: Path, pause: float) -> list[str]:
        names = {"src": str(ROOT / "src"), "tests": str(ROOT / "tests" / "data"), "source": str(source)}
        return [sys.executable, "-c", KILLED.format(cache=str(cache), pause=pause, **names)]

    subprocess.run(script(tmp_path / "whole", 0), check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(script(tmp_path / "killed", 0.1), stdout=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "killed").glob("tokens-*/shard-*")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (partial,) = (tmp_path / "killed").glob("tokens-*")
    assert len(list(partial.glob("shard-*"))) == 1
    (partial / ".shard-00001.left.tmp").mkdir()  # what a kill in the middle of a shard leaves
    first = (partial / "shard-00000").stat().st_mtime_ns
    subprocess.run(script(tmp_path / "killed", 0), check=True, stdout=subprocess.DEVNULL)
    assert (partial / "shard-00000").stat().st_mtime_ns == first
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_two_at_once_do_the_work_once(tmp_path: Path) -> None:
    source = write_texts(tmp_path, texts(400))
    names = {"src": str(ROOT / "src"), "tests": str(ROOT / "tests" / "data"), "source": str(source), "pause": 0.05}
    script = [sys.executable, "-c", KILLED.format(cache=str(tmp_path / "cache"), **names)]
    both = [subprocess.Popen(script, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    encoded = [process.communicate()[0].count("chunk") for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(encoded)[0] == 0
    assert sorted(encoded)[1] > 3


def test_the_cache_is_addressed_by_what_it_depends_on(tmp_path: Path) -> None:
    source = write_texts(tmp_path, texts(50))
    tokenizer = byte_tokenizer()

    def folder(**changes: object) -> Path:
        return prepare(data_config(source=files(source), **changes), tokenizer, tmp_path / "cache").folder

    same = folder()
    assert folder(sequence_length=64, shuffle=False, packing={"mode": "none"}, num_workers=1) == same
    assert folder(validation={"fraction": 0.3}) != same
    source.write_text(source.read_text() + '{"text": "one more"}\n')
    os.utime(source, (time.time() + 5,) * 2)
    assert folder() != same


def test_what_is_prepared_is_found_by_the_content_of_its_files(tmp_path: Path) -> None:
    source = write_texts(tmp_path, texts(50))
    first = prepare(data_config(source=files(source)), byte_tokenizer(), tmp_path / "cache")

    def fails(segments: object) -> None:
        raise AssertionError("it is tokenized again")

    deaf: Any = byte_tokenizer()
    deaf.encode_segments = fails
    (tmp_path / "elsewhere").mkdir()
    moved = source.rename(tmp_path / "elsewhere" / "renamed.jsonl")
    second = prepare(data_config(source=files(moved)), deaf, tmp_path / "cache")
    assert second.folder == first.folder
    assert second.fingerprints() == first.fingerprints()

    # Another file in its place, of the same size and with the same time of modification (`cp -p`).
    stat = moved.stat()
    moved.write_text(moved.read_text().replace("document 7 ", "document x "))
    os.utime(moved, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert moved.stat().st_size == stat.st_size
    third = prepare(data_config(source=files(moved)), byte_tokenizer(), tmp_path / "cache")
    assert third.folder != first.folder
    assert third.fingerprints() != first.fingerprints()


def test_what_cannot_be_prepared_is_one_message(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    source = files(write_texts(tmp_path, ["", "", "", "", ""]))
    with pytest.raises(InputError, match="its text is empty"):
        prepare(data_config(source=source), tokenizer, tmp_path / "cache")
    good = files(write_texts(tmp_path, texts(5)))
    own = {"source": good, "fraction": None}
    with pytest.raises(ConfigError, match="measured on what it was trained on"):
        prepare(data_config(source=good, validation=own), tokenizer, tmp_path / "cache")
    (tmp_path / "occupied").write_text("not a folder")
    with pytest.raises(InputError, match="cannot write prepared data"):
        prepare(data_config(source=good), tokenizer, tmp_path / "occupied")
