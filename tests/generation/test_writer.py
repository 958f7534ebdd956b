"""Streamed text: only complete characters, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from decoding import Numbers, decoder, decoding, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from pretune.generation.texts import stream
from pretune.generation.writer import Writer


def decode_bytes(ids: Sequence[int]) -> str:
    """Tokens are bytes, as in a byte-level tokenizer."""
    return bytes(ids).decode("utf-8", "replace")


def write(tokens: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], Writer]:
    writer, shown = Writer(decode_bytes, stop), []
    for token in tokens:
        shown.append(writer.add(token))
        if writer.stopped:
            break
    shown.append(writer.finish())
    return shown, writer


def test_halves_of_a_character_are_held_back() -> None:
    shown, _ = write("aé😀b".encode())
    assert shown == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    assert write("a😀".encode()[:-1])[0][-1] == "\ufffd"
    shown, writer = write([0xFF, ord("a")])
    assert "".join(shown) == writer.text == "\ufffda"


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo\n", ["\n\n"], "one\ntwo\n"),
        ("aaab", ["aab"], "a"),
        ("abcabd", ["abd", "cab"], "ab"),
        ("x<|end|>y", ["<|end|>", "<|en"], "x"),
        ("é😀!", ["😀"], "é"),
        ("stop", ["stop"], ""),
    ],
)
def test_a_text_ends_before_the_first_stop_string(text, stop, wanted) -> None:
    shown, writer = write(text.encode(), stop)
    assert writer.text == "".join(shown) == wanted
    assert writer.stopped == (wanted != text)


@settings(max_examples=200)
@given(
    tokens=st.one_of(st.binary(max_size=30), st.text("ab\n😀é", max_size=15).map(str.encode)),
    stop=st.lists(st.text("ab\n😀é", min_size=1, max_size=4), max_size=3),
)
def test_whatever_comes_the_pieces_are_the_whole_cut_at_the_first_stop(tokens, stop) -> None:
    shown, writer = write(tokens, stop)
    whole = decode_bytes(tokens)
    # The text up to the first complete stop string.
    read = next((whole[:n] for n in range(len(whole) + 1) if any(one in whole[:n] for one in stop)), whole)
    ends = [at for at in (read.find(one) for one in stop) if at >= 0]
    assert "".join(shown) == writer.text == (whole[: min(ends)] if ends else whole)
    # A piece never shows text that a later one would take back.
    assert writer.stopped == bool(ends)


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (["<end>"], "ab"),
        (["<end>\n"], "ab"),
        (["b<end>"], "a"),
        (["\n<stop>"], "ab"),  # the special token in between is not shown
        (["<stop>"], "ab\n"),
        (["<other>"], "ab\nc"),
        ([], "ab\nc"),
    ],
)
def test_a_stop_string_may_contain_a_special_token_which_is_never_shown(stop: list[str], wanted: str) -> None:
    special = {256: "<end>", 257: "<stop>", 258: "<other>"}

    def decode(ids: Sequence[int]) -> str:
        return decode_bytes([token for token in ids if token not in special])

    writer = Writer(decode, stop, special=special)
    shown = []
    for token in [*b"ab", 256, *b"\n", 257, *b"c"]:
        shown.append(writer.add(token))
        if writer.stopped:
            break
    shown.append(writer.finish())
    assert writer.text == "".join(shown) == wanted


def test_a_continuation_keeps_the_space_that_its_prompt_lacks() -> None:
    """As SentencePiece decodes: the space before the first word of a text is not part of it."""
    pieces = {1: "▁the", 2: "▁cat", 3: "s"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(pieces[token] for token in ids).replace("▁", " ").removeprefix(" ")

    writer = Writer(decode, [], before=[1])
    assert [writer.add(token) for token in (2, 3, 2)] == [" cat", "s", " cat"]
    assert Writer(decode, []).add(2) == "cat"


def test_a_stop_string_ends_the_row_and_no_other() -> None:
    class Letters(Numbers):
        def decode(self, ids: Sequence[int]) -> str:
            return "".join(chr(97 + token % 26) for token in ids)

    one, prompts = decoder(tiny_model(seed=2), -1), [[1, 2, 3], [7], [4, 5]]
    free = texts(one, Letters(), prompts, decoding(max_new_tokens=12))
    stop = free[0].text[4:7]
    cut = texts(one, Letters(), prompts, decoding(max_new_tokens=12, stop=[stop]))
    assert cut[0].text == free[0].text[: free[0].text.find(stop)]
    assert cut[0].reason == "stop"
    assert cut[0].num_tokens < 12
    for before, after in zip(free[1:], cut[1:], strict=True):
        assert after.text == before.text.split(stop)[0]
    pieces = list(stream(one, Letters(), prompts, decoding(max_new_tokens=12, stop=[stop])))
    assert "".join(piece.text for piece in pieces if piece.place == 0) == cut[0].text
    assert [piece.reason for piece in pieces if piece.place == 0 and piece.reason] == ["stop"]
