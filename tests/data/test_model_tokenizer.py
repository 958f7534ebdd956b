"""The tokenizer of a model of others: the ids of transformers' AutoTokenizer, and what the folder's files say."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from published import AFTER, BEGINNINGS, FAMILIES, TEXTS, model_folder, write
from small_data import data_config
from tokenizers import Tokenizer as Backend

from pretune.core.config import ConfigError, InputError, validate
from pretune.data.config import FileTokenizer
from pretune.data.formats.build import build_formatter
from pretune.data.formats.segments import Place, Segment
from pretune.data.tokenizer import Tokenizer, load_tokenizer

HARD = ["the cat", " ", "  ", "\n", "\n\n", "\t", "é", "e\u0301", "日本", "🎉", "👩\u200d👧", "12345", "'s", "##", "▁",
        "<0x0A>", "x", "\u00a0", "\u200b", "\r\n", "[INST]", "fi\ufb01", "."]  # fmt: skip
TALK = [{"role": role, "content": text} for role, text in
        (("user", "Hi  there"), ("assistant", "Ho.\nYes"), ("user", "And 12?"), ("assistant", "So 🎉."))]  # fmt: skip
PLACE = Place(data_config().source, 0)


@cache
def both(family: str) -> tuple[Tokenizer, Any]:
    """A family's tokenizer here and in transformers."""
    folder = model_folder(Path(mkdtemp()), family)
    return load(folder), transformers.AutoTokenizer.from_pretrained(folder)


def load(folder: Path, eos: str | None = None, **changes: Any) -> Tokenizer:
    section = validate(FileTokenizer, {"kind": "file", "path": str(folder), "eos": eos, "add_tokens": []})
    return load_tokenizer(section, data_config(**changes), folder)


def pieces(family: str) -> st.SearchStrategy[str]:
    special = [one for one in both(family)[0].special_tokens.values() if one != "<unk>"]
    return st.lists(st.sampled_from([*HARD, *special]) | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_a_text_has_the_ids_of_transformers(family: str, data: st.DataObject) -> None:
    tokenizer, theirs = both(family)
    text = data.draw(pieces(family))
    after = [theirs.convert_tokens_to_ids(AFTER[family])] if family in AFTER else []
    for parsed in (False, True):
        ours = tokenizer.encode_segments([Segment(text, True, parsed)])
        wanted = theirs(text, split_special_tokens=not parsed)["input_ids"]
        assert [*tokenizer.beginning, *ours[0], *after] == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_document_begins_as_transformers_begins_a_text(family: str) -> None:
    tokenizer, theirs = both(family)
    before = BEGINNINGS.get(family)
    begins = () if before is None else (theirs.convert_tokens_to_ids(before),)
    assert tokenizer.beginning == begins
    assert tokenizer.document_start(tokenizer.encode_segments([Segment("a cat", True)])) == begins
    if before is not None:
        written = tokenizer.encode_segments([Segment(before, False, True), Segment(" a", True)])
        assert tokenizer.document_start(written) == ()
        spelled = tokenizer.encode_segments([Segment(before, False), Segment(" a", True)])
        assert tokenizer.document_start(spelled) == begins
    assert tokenizer.document_start([]) == tokenizer.document_start([[]]) == begins


@pytest.mark.parametrize("family", ["qwen2", "llama3", "llama2", "mistral", "gemma"])
def test_a_conversation_has_the_ids_of_transformers(family: str) -> None:
    tokenizer, theirs = both(family)
    config = data_config(format={"kind": "chat", "columns": ["messages"]})
    formatter = build_formatter(config.format, tokenizer.template_tokens)
    (document,) = formatter.documents({"messages": TALK}, PLACE)
    ids = tokenizer.encode_segments(document)
    found = [*tokenizer.document_start(ids), *(token for part in ids for token in part)]
    wanted = theirs.apply_chat_template(TALK, return_dict=False)
    assert found == wanted[: len(found)]
    # The white space or EOS after the last turn is the end of the document here.
    assert theirs.decode(wanted[len(found) :]).strip() in ("", tokenizer.eos)
    asked = [part for part in tokenizer.encode_segments(formatter.render_prompt(TALK[:1])) if part]
    prompt = [*tokenizer.document_start(asked), *(token for part in asked for token in part)]
    assert prompt == theirs.apply_chat_template(TALK[:1], add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5", "llama2"])
def test_real_tokenizers_have_the_ids_of_transformers(shared_data: Path, name: str) -> None:
    folder = shared_data / "tokenizers" / name
    if name == "llama2":
        folder = shared_data.parent / "cases" / "data" / "tok" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    tokenizer = load(folder, "<|endoftext|>" if name == "gpt2" else None)
    theirs = (
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        if name == "gpt2"
        else transformers.AutoTokenizer.from_pretrained(folder)
    )
    special = "".join(f" a{one} b{one}" for one in [*tokenizer.special_tokens.values()][:8])
    for text in [*TEXTS[:3], "".join(HARD), special, *HARD]:
        for parsed in (False, True):
            ours = tokenizer.encode_segments([Segment(text, True, parsed)])[0]
            assert [*tokenizer.beginning, *ours] == theirs(text, split_special_tokens=not parsed)["input_ids"]


def test_what_ends_a_text_is_what_the_model_says(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "llama3")
    tokenizer = load(folder)
    wanted = {tokenizer.backend.token_to_id(one) for one in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")}
    assert (tokenizer.eos, tokenizer.end_ids) == ("<|eot_id|>", wanted)
    tokenizer.save(tmp_path / "saved")
    assert load(tmp_path / "saved").end_ids == wanted
    assert load(folder / "tokenizer.json").end_ids == {tokenizer.eos_id}
    # config.json where there is no generation_config.json, also for the text part of a larger model; padding is no end.
    (folder / "generation_config.json").unlink()
    for content in ({"eos_token_id": [5, 999]}, {"text_config": {"eos_token_id": 5}}):
        write(folder / "config.json", content)
        assert load(folder).end_ids == {tokenizer.eos_id, 5}


def test_eos_is_what_one_of_the_files_says(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "llama2")
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    write(folder / "special_tokens_map.json", {"eos_token": {"content": "<s>"}, "bos_token": "<s>"})
    assert (load(folder).eos, load(folder).bos) == ("<s>", "<s>")
    (folder / "special_tokens_map.json").unlink()
    assert (load(folder).eos, load(folder).bos) == ("</s>", "<s>")
    write(folder / "generation_config.json", {})
    write(folder / "config.json", {"eos_token_id": 2})
    assert load(folder).eos == "</s>"
    write(folder / "config.json", {})
    with pytest.raises(ConfigError, match=r"eos is null and neither .*tokenizer_config\.json nor generation_config"):
        load(folder)
    for value in ("</s>", [2.5], True, -1):
        write(folder / "generation_config.json", {"eos_token_id": value})
        with pytest.raises(InputError, match=r"generation_config\.json: its end tokens are .*neither an id nor a list"):
            load(folder)


def test_tokens_that_only_other_files_have_are_added(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "gpt2")
    size = load(folder).vocab_size
    about = json.loads((folder / "tokenizer_config.json").read_text())
    added = {str(size): {"content": "<|im_end|>", "special": True}}
    write(folder / "tokenizer_config.json", about | {"added_tokens_decoder": added})
    write(folder / "added_tokens.json", {"<tool>": size + 1, "<|im_end|>": size})
    tokenizer, theirs = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size == size + 2
    assert tokenizer.special_tokens[size] == "<|im_end|>"
    text = "a <|im_end|>b"
    assert tokenizer.encode_segments([Segment(text, True, True)])[0] == theirs(text)["input_ids"]
    write(folder / "added_tokens.json", {"<tool>": size + 5})
    with pytest.raises(InputError, match=rf"token '<tool>' is {size + 5} beside tokenizer\.json, where {size + 1}"):
        load(folder)


def test_damaged_lists_are_one_line(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "llama2")
    about = json.loads((folder / "tokenizer_config.json").read_text())
    for wrong in ({"x": {"content": "a"}}, {"1": "a"}, {"900": {"special": True}}, {"900": {"content": 3}}, ["a"]):
        write(folder / "tokenizer_config.json", about | {"added_tokens_decoder": wrong})
        with pytest.raises(InputError, match=r"(cannot read the added tokens in .*tokenizer_config\.json)|disagree"):
            load(folder)
    write(folder / "tokenizer_config.json", about)
    write(folder / "generation_config.json", {"eos_token_id": [2, 10**12]})
    assert load(folder).end_ids == {2}
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["special_tokens"]["<s>"]["ids"] = [4_000]
    write(folder / "tokenizer.json", content)
    with pytest.raises(InputError, match="puts 4000 before a text, which no token has"):
        load(folder)


def test_a_model_made_for_shorter_texts_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path, "gpt2")
    load(folder, sequence_length=4096)
    assert capsys.readouterr().err == ""
    about = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder / "tokenizer_config.json", about | {"model_max_length": 1024})
    load(folder, sequence_length=1024).save(tmp_path / "saved")
    assert capsys.readouterr().err == ""
    load(folder, sequence_length=1025)
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.sequence_length = 1,025" in line
    assert "1,024 tokens (model_max_length)" in line
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["model_max_length"] == 1024


def test_other_vocabularies_are_converted(tmp_path: Path) -> None:
    """GPT-2's two files, and a sentencepiece model without a tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = model_folder(tmp_path / "gpt2", "gpt2")
    parts = json.loads((folder / "tokenizer.json").read_text())
    tokens = parts["model"]["vocab"] | {one["content"]: one["id"] for one in parts["added_tokens"]}
    write(folder / "vocab.json", tokens)
    merges = "\n".join(" ".join(pair) for pair in parts["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer.json").unlink()
    write(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"})
    write(folder / "config.json", {"model_type": "gpt2"})
    (tmp_path / "texts.txt").write_text("\n".join(text.replace("\n", " ") for text in TEXTS))
    other = tmp_path / "llama2"
    other.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts.txt"), model_prefix=str(other / "tokenizer"), vocab_size=350, model_type="bpe",
        byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    about = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    write(other / "tokenizer_config.json", about | {"legacy": False})
    write(other / "config.json", {"model_type": "llama"})
    for place, begins in ((folder, 0), (other, 1)):
        tokenizer, theirs = load(place), transformers.AutoTokenizer.from_pretrained(place)
        assert len(tokenizer.beginning) == begins
        for text in [*TEXTS[:3], *HARD]:
            ours = tokenizer.encode_segments([Segment(text, True)])[0]
            assert [*tokenizer.beginning, *ours] == theirs(text, split_special_tokens=True)["input_ids"]
        tokenizer.save(place / "saved")
        assert load(place / "saved").fingerprint == tokenizer.fingerprint


def test_a_vocabulary_that_needs_code_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    write(tmp_path / "config.json", {"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}})
    about = {"eos_token": "</s>", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    write(tmp_path / "tokenizer_config.json", about)
    with pytest.raises(InputError, match=r"has no tokenizer\.json, and transformers cannot convert .*save_pretrained"):
        load(tmp_path)


def test_a_tokenizer_without_a_beginning_is_what_it_was(tmp_path: Path) -> None:
    for family in ("gpt2", "qwen2"):
        folder = model_folder(tmp_path / family, family)
        before = Backend.from_file(str(folder / "tokenizer.json"))
        assert load(folder).backend.to_str() == before.to_str()
