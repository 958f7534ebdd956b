from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import byte_tokenizer, data_config, files, sentencepiece_tokenizer, write_texts
from tokenizers import Tokenizer as Backend
from tokenizers import models

from pretune.core.config import ConfigError, InputError, validate
from pretune.data.config import FileTokenizer, TrainedTokenizer
from pretune.data.tokenizer import TRAINED_EOS, Tokenizer, load_tokenizer

TEXTS = ["the cat sat on 123 mats", "the dog ate 456 cats", "über 日本 naïve"] * 20


def from_file(path: Path, eos: str | None = TRAINED_EOS) -> Tokenizer:
    section = validate(FileTokenizer, {"kind": "file", "path": str(path), "eos": eos, "add_tokens": []})
    return load_tokenizer(section, data_config(), path / "unused")


def trained(cache: Path, source: Path, **changes: object) -> Tokenizer:
    section = {
        "kind": "trained",
        "vocab_size": 300,
        "max_bytes": 10_000,
        "split_digits": True,
        "add_tokens": [],
    } | changes
    config = data_config(source=files(source), validation={"fraction": 0.01})
    return load_tokenizer(validate(TrainedTokenizer, section), config, cache)


@given(st.text())
def test_any_text_survives_and_its_bytes_are_counted(text: str) -> None:
    tokenizer = byte_tokenizer(300, TEXTS)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, ""]) == [ids, []]
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5"])
def test_bytes_of_real_tokenizers(shared_data: Path, name: str) -> None:
    tokenizer = from_file(shared_data / "tokenizers" / name)
    lengths = tokenizer.token_bytes()
    assert lengths.dtype == np.int32
    assert len(lengths) == tokenizer.vocab_size
    assert lengths[tokenizer.eos_id] == 0
    text = "Ünïcode 日本語 🎉 12,345\n\n\tdef f(x): <|endoftext|> <tool_call>\u200b" * 3
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_text_that_spells_a_special_token_is_text(shared_data: Path) -> None:
    for tokenizer in (byte_tokenizer(), from_file(shared_data / "tokenizers" / "gpt2")):
        text = f"before {tokenizer.eos} after"
        assert tokenizer.eos_id not in tokenizer.encode(text)
        assert tokenizer.eos_id not in tokenizer.encode_batch([text])[0]
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([tokenizer.eos_id]) == ""


@pytest.mark.parametrize("scheme", ["prepend", "always", "first", "never"])
@given(text=st.text())
def test_bytes_of_sentencepiece_are_those_of_the_decoded_text(scheme: str, text: str) -> None:
    tokenizer = sentencepiece_tokenizer(scheme, [*TEXTS, "### ## a##b"])
    ids = tokenizer.encode(text)
    decoded = tokenizer.backend.decode([tokenizer.encode("x")[-1], *ids], skip_special_tokens=True).removeprefix("x")
    assert decoded.strip(" ") == text.replace("▁", " ").strip(" ")
    assert tokenizer.token_bytes()[ids].sum() == len(decoded.encode())


def test_marks_are_no_text_only_where_the_tokenizer_says_so() -> None:
    def lengths(tokens: list[str], model: type, **options: Any) -> list[int]:
        vocabulary = {token: number for number, token in enumerate([*tokens, "</s>"])}
        backend = Backend(model(vocabulary, **options))
        backend.add_special_tokens(["</s>"])
        return Tokenizer(backend, "</s>").token_bytes().tolist()

    assert lengths(["##ing", "▁the", "<0x0A>", "ü"], models.WordLevel, unk_token="</s>") == [5, 6, 6, 2, 0]
    assert lengths(["##ing", "#", "ü"], models.WordPiece, unk_token="</s>") == [3, 1, 2, 0]
    assert lengths(["the</w>", "##"], models.BPE, merges=[], end_of_word_suffix="</w>") == [3, 2, 0]
    fallback = lengths(["<0x41>", "##", "<0x4>"], models.BPE, merges=[], byte_fallback=True, unk_token="</s>")
    assert fallback == [1, 2, 5, 0]


def test_a_saved_tokenizer_adds_what_training_added(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer(texts=TEXTS)
    tokenizer.save(tmp_path)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("the cat")["input_ids"] == [theirs.bos_token_id, *tokenizer.encode("the cat")]
    assert theirs.bos_token == "<s>"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is True
    assert from_file(tmp_path, None).fingerprint == tokenizer.fingerprint


def test_a_trained_tokenizer_is_deterministic_and_kept(tmp_path: Path) -> None:
    source = write_texts(tmp_path, TEXTS)
    first, second = trained(tmp_path / "one", source), trained(tmp_path / "two", source)
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size <= 300
    assert first.eos_id == 0
    # What is kept is what is used, whatever it is by now; another section trains another.
    (kept,) = (tmp_path / "one" / "tokenizers").iterdir()
    byte_tokenizer(280, TEXTS).save(kept)
    assert trained(tmp_path / "one", source).vocab_size == 280
    assert trained(tmp_path / "one", source, vocab_size=270).vocab_size == 270


def test_digits_stand_alone_when_split(tmp_path: Path) -> None:
    source = write_texts(tmp_path, ["in 1234 and 1234 and 1234"] * 50)
    split = trained(tmp_path, source)
    assert [split.decode([token]) for token in split.encode("1234")] == ["1", "2", "3", "4"]
    assert len(trained(tmp_path, source, split_digits=False).encode("1234")) < 4


def test_a_saved_tokenizer_is_itself_again(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(300, TEXTS)
    tokenizer.save(tmp_path / "saved")
    for again in (from_file(tmp_path / "saved", None), from_file(tmp_path / "saved" / "tokenizer.json")):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.eos == TRAINED_EOS
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_tokenizer().backend
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(from_file(tmp_path).encode("12345")) == 5


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "good")
    with pytest.raises(ConfigError, match=r"no token '<\|endoftxt\|>'; did you mean '<\|endoftext\|>'"):
        from_file(tmp_path / "good", "<|endoftxt|>")
    with pytest.raises(InputError, match="no tokenizer at"):
        from_file(tmp_path / "absent")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(InputError, match=r"bad/tokenizer\.json is not a tokenizer\.json"):
        from_file(tmp_path / "bad")
    shutil.copy(tmp_path / "good" / "tokenizer.json", tmp_path / "bad" / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"eos is null and neither .*tokenizer_config\.json nor .* say it"):
        from_file(tmp_path / "bad", None)
