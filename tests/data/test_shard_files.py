"""Prepared data that is damaged on disk is prepared again, never used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_data import MATHQA, byte_tokenizer, data_config, files, write_lines, write_texts

from pretune.core.config import InputError
from pretune.data.encoding import Sizes
from pretune.data.shards import Prepared, prepare
from pretune.data.tokenizer import load_tokenizer
from pretune.data.tokens import TokenData

SMALL = Sizes(shard_tokens=1500, chunk_characters=400)


class Cache:
    """Prepared data in several shards, partly scored; it can be damaged, and compared with what it was."""

    def __init__(self, tmp_path: Path) -> None:
        rows = ({"prompt": f"{number}?", "completion": "ab c" * (number % 7 + 1)} for number in range(300))
        self._source, self._cache = write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "cache"
        self.folder = self.open().folder
        self._whole = self._bytes()

    def open(self) -> Prepared:
        config = data_config(source=files(self._source), num_workers=1, format={"kind": "prompt_completion"})
        return prepare(config, byte_tokenizer(), self._cache, SMALL)

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name != ".lock")

    def is_as_it_was(self) -> bool:
        return self._bytes() == self._whole

    def _bytes(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _swap(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[len(content) // 2 :] + content[: len(content) // 2])


def _becomes_a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "one bit": _flip,
    "another order": _swap,
    "truncated": lambda path, rng: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)]),
    "empty": lambda path, rng: path.write_bytes(b""),
    "longer": lambda path, rng: path.write_bytes(path.read_bytes() + rng.randbytes(3)),
    "removed": lambda path, rng: path.unlink(),
    "other bytes": lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
    "a folder": _becomes_a_folder,
    "nested": lambda path, rng: path.write_bytes(b"[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_is_repaired(cache: Cache, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {path.name: path for path in cache.files()}
    assert {path.rpartition(".")[2] for path in kinds} == {"tokens", "ends", "hashes", "scored", "json"}
    for path in kinds.values():
        size = path.stat().st_size
        DAMAGES[damage](path, random.Random(size))
        cache.open()
        assert cache.is_as_it_was(), path
        lines = capsys.readouterr().err.splitlines()
        # Without complete.json, it is a preparation that was killed.
        assert len(lines) == (0 if (path.name, damage) == ("complete.json", "removed") else 1), path
        assert all("is damaged" in line and "prepared again from row" in line for line in lines)


@pytest.mark.slow
def test_five_hundred_random_damages_are_repaired(cache: Cache) -> None:
    for seed in range(500):
        rng = random.Random(seed)
        for path in rng.sample(cache.files(), rng.randint(1, 3)):
            rng.choice(list(DAMAGES.values()))(path, rng)
        cache.open()
        assert cache.is_as_it_was(), seed


def test_shards_in_the_wrong_place_are_noticed(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = cache.folder / "shard-00000", cache.folder / "shard-00001"
    shutil.rmtree(first)
    shutil.copytree(second, first)
    cache.open()
    assert cache.is_as_it_was()
    assert "does not follow the shard before it" in capsys.readouterr().err
    capsys.readouterr()
    shutil.rmtree(second)
    cache.open()
    assert cache.is_as_it_was()
    assert "shard-00001/shard.json cannot be read" in capsys.readouterr().err


def test_prepared_data_under_the_name_of_other_data_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (files(write_texts(tmp_path, (text * n for n in range(1, 40)), f"{text}.jsonl")) for text in "ab")

    def tokens(source: dict[str, Any]) -> TokenData:
        return prepare(data_config(source=source), byte_tokenizer(), tmp_path / "cache").train

    a, b = tokens(one), tokens(other)
    shutil.rmtree(b.folder)
    shutil.copytree(a.folder, b.folder)
    assert tokens(other).fingerprint == b.fingerprint != a.fingerprint
    assert "complete.json is of other data" in capsys.readouterr().err


def test_only_what_comes_after_the_damage_is_prepared_again(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    before = (cache.folder / "shard-00000").stat().st_mtime_ns
    _flip(cache.folder / "shard-00001" / "train.tokens", random.Random(0))
    cache.open()
    assert (cache.folder / "shard-00000").stat().st_mtime_ns == before
    assert "shard-00001/train.tokens is not what was written" in capsys.readouterr().err


def test_a_preparation_goes_on_from_whole_shards_only(cache: Cache, capsys: pytest.CaptureFixture[str]) -> None:
    (cache.folder / "complete.json").unlink()
    cache.open()
    assert (cache.is_as_it_was(), capsys.readouterr().err) == (True, "")
    (cache.folder / "complete.json").unlink()
    _flip(cache.folder / "shard-00001" / "validation.hashes", random.Random(0))
    cache.open()
    assert cache.is_as_it_was()


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    blocked = tmp_path / "cache"
    blocked.write_text("")
    config = data_config(source=files(write_texts(tmp_path, ["a", "b", "c"])))
    with pytest.raises(InputError, match=r"cannot write prepared data to .*PRETUNE_CACHE"):
        prepare(config, byte_tokenizer(), blocked)


@pytest.mark.parametrize("damage", ["one bit", "truncated", "empty", "removed", "other bytes"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_trained_tokenizer_is_trained_again(
    name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = data_config(format=MATHQA)
    before = load_tokenizer(config.tokenizer, config, tmp_path).fingerprint
    (path,) = (tmp_path / "tokenizers").glob(f"*/{name}")
    content = path.read_bytes()
    DAMAGES[damage](path, random.Random(1))
    assert load_tokenizer(config.tokenizer, config, tmp_path).fingerprint == before
    assert path.read_bytes() == content
    assert capsys.readouterr().err.count("is damaged: it is trained again") == 1
