"""A long text is tokenized in pieces, and has the ids of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import byte_tokenizer, data_config, sentencepiece_tokenizer

from pretune.core.config import validate
from pretune.data.config import FileTokenizer
from pretune.data.formats.segments import Segment
from pretune.data.long_texts import cut, groups
from pretune.data.segment_encoding import SegmentEncoder
from pretune.data.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["the cat sat on the mat", "a dog ate the cats food", "## 12 houses"] * 20
WORDS = st.lists(
    st.sampled_from(["the", " cat", "##", "a ", "日本", " 12", "é\n", "\n\n", "   ", "<s>", "<|end|>"]), max_size=60
)


def check(tokenizer: Tokenizer, segments: list[Segment], length: int) -> None:
    whole, pieces = SegmentEncoder(tokenizer.backend), SegmentEncoder(tokenizer.backend, piece_characters=length)
    assert pieces.encode([segments, segments[:1]]) == whole.encode([segments, segments[:1]])


@pytest.mark.parametrize("scheme", ["prepend", "always", "first", "never", None])
@given(words=WORDS, special=st.booleans(), length=st.integers(1, 40))
def test_pieces_have_the_ids_of_the_whole(scheme: str | None, words: list[str], special: bool, length: int) -> None:
    tokenizer = byte_tokenizer(300, TEXTS) if scheme is None else sentencepiece_tokenizer(scheme, TEXTS)
    check(tokenizer, [Segment("".join(words), True, special), Segment(" and" + "".join(words), False)], length)


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5"])
def test_pieces_of_real_text_with_real_tokenizers(shared_data: Path, name: str) -> None:
    path = str(shared_data / "tokenizers" / name)
    section = validate(FileTokenizer, {"kind": "file", "path": path, "eos": "<|endoftext|>", "add_tokens": []})
    text = (Path(__file__).parents[2] / "docs" / "log.md").read_text()[:60_000]
    check(load_tokenizer(section, data_config(), Path()), [Segment(text, True)], 700)


def test_where_nothing_can_be_cut_the_piece_is_longer() -> None:
    def never(texts: list[str]) -> list[list[int]]:
        return [[len(text)] for text in texts]

    assert cut("x" * 1000, never, 100) == ["x" * 1000]
    pieces = cut("word " * 1000, lambda texts: [[ord(letter) for letter in text] for text in texts], 100)
    assert "".join(pieces) == "word " * 1000
    assert max(map(len, pieces)) <= 100


def test_groups_are_as_large_as_asked() -> None:
    assert list(groups(range(5), [3, 3, 9, 1, 1], 6)) == [[0, 1], [2], [3, 4]]
    assert list(groups([], [], 6)) == []
