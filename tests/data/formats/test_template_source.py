"""Where a chat template comes from: one of Pretune's, a file, another model; and what is wrong with one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from published import CHATML, model_folder, write
from small_data import byte_tokenizer, data_config, files, write_lines

from pretune.core.config import ConfigError, InputError, validate
from pretune.data.config import DataConfig, FileTokenizer
from pretune.data.formats.build import build_formatter
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.segments import Place
from pretune.data.shards import prepare
from pretune.data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer

TALK = [
    {"role": role, "content": text}
    for role, text in (
        ("system", "Be brief."),
        ("user", " Hi "),
        ("assistant", "Ho."),
        ("user", "And?"),
        ("assistant", "So."),
    )
]
PLACE = Place(data_config().source, 0)


def chatting(template: str | None, **changes: Any) -> DataConfig:
    return data_config(format={"kind": "chat", "template": template}, **changes)


def load(folder: Path, template: str | None) -> tuple[Tokenizer, Formatter]:
    """The tokenizer of a folder with a template, and the formatter of a run on chats."""
    config, section = chatting(template), {"kind": "file", "path": str(folder), "eos": None, "add_tokens": []}
    tokenizer = load_tokenizer(validate(FileTokenizer, section), config, folder)
    return tokenizer, build_formatter(config.format, tokenizer.template_tokens)


def ids(folder: Path, template: str | None, talk: list[dict[str, str]] = TALK) -> list[int]:
    tokenizer, formatter = load(folder, template)
    (document,) = formatter.documents({"messages": talk}, PLACE)
    parts = tokenizer.encode_segments(document)
    return [*tokenizer.document_start(parts), *(token for part in parts for token in part)]


@pytest.mark.parametrize(("family", "name"), [("qwen2", "chatml"), ("llama3", "llama3"), ("gemma", "gemma")])
def test_a_template_by_name_writes_what_the_family_does(tmp_path: Path, family: str, name: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(model_folder(tmp_path, family))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": theirs.eos_token, "bos_token": theirs.bos_token}
    write(tmp_path / "tokenizer_config.json", about)  # a base model: without a template
    talk = TALK if family != "gemma" else [{"role": "user", "content": "Be brief.\n\nHi"}, *TALK[2:]]
    found = ids(tmp_path, name)
    assert found == theirs.apply_chat_template(talk, return_dict=False)[: len(found)]
    _, formatter = load(tmp_path, name)
    asked = "".join(segment.text for segment in formatter.render_prompt(TALK[:2]))
    wanted = theirs.apply_chat_template(talk[: len(talk) - 3], add_generation_prompt=True, tokenize=False)
    assert asked == wanted.removeprefix(theirs.bos_token or "")
    assert formatter.end_of_turn in theirs.get_vocab()


def test_a_file_a_model_and_jinja_text_give_the_same(tmp_path: Path) -> None:
    other = model_folder(tmp_path / "other", "qwen2")
    base = model_folder(tmp_path / "base", "qwen2")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    write(base / "tokenizer_config.json", about)
    (tmp_path / "chat.jinja").write_text(CHATML)
    wanted = ids(base, CHATML)
    for template in (str(other), str(tmp_path / "chat.jinja"), "chatml"):
        assert ids(base, template) == wanted
    (base / "chat_template.jinja").write_text(CHATML)
    assert ids(base, None) == wanted


def test_a_run_keeps_what_it_copied(tmp_path: Path) -> None:
    other = model_folder(tmp_path / "other", "qwen2")
    tokenizer, _ = load(model_folder(tmp_path / "base", "qwen2"), str(other))
    tokenizer.save(tmp_path / "saved")
    shutil.rmtree(other)
    config = chatting(str(other))
    again = saved_tokenizer(tmp_path / "saved", config)
    assert again.chat_template == CHATML
    assert build_formatter(config.format, again.template_tokens).end_of_turn == "<|im_end|>"
    plain = data_config()
    assert saved_tokenizer(tmp_path / "saved", plain).chat_template == CHATML


def test_prepared_data_depends_on_what_a_file_says(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}"}]}
            for n in range(40)]  # fmt: skip
    source, path = files(write_lines(tmp_path / "rows.jsonl", rows)), tmp_path / "chat.jinja"
    folders = []
    for text in (CHATML, CHATML.replace("assistant\n", "assistant "), CHATML):
        path.write_text(text)
        base = model_folder(tmp_path / "base", "qwen2")
        tokenizer, _ = load(base, str(path))
        folders.append(prepare(chatting(str(path), source=source), tokenizer, tmp_path / "cache").folder)
    assert folders[0] == folders[2] != folders[1]


def test_tokens_of_another_tokenizer_are_named(tmp_path: Path) -> None:
    llama3, gpt2 = model_folder(tmp_path / "llama3", "llama3"), model_folder(tmp_path / "gpt2", "gpt2")
    with pytest.raises(
        ConfigError, match=r"template = chatml writes <\|im_start\|>, <\|im_end\|>, which the tokenizer"
    ):
        load(llama3, "chatml")
    with pytest.raises(ConfigError, match=r"writes <\|start_header_id\|>, <\|end_header_id\|>, <\|eot_id\|>, which"):
        load(gpt2, str(llama3))
    section = {"kind": "trained", "vocab_size": 300, "max_bytes": 10_000, "split_digits": True, "add_tokens": []}
    rows = write_lines(tmp_path / "rows.jsonl", [{"messages": TALK}] * 9)
    config = chatting("chatml", source=files(rows), tokenizer=section)
    with pytest.raises(
        ConfigError, match="choose a template that needs no tokens of its own, such as data/format=chat"
    ):
        load_tokenizer(config.tokenizer, config, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"the tokenizer has none; set data\.format\.template"):
        load(gpt2, None)


def test_what_is_no_template_is_one_line(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path / "base")
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}{{ m.content }")
    (tmp_path / "none").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\xfe{{")
    for template, kind, message in (
        ("chatm", ConfigError, "'chatm' is no Jinja text, .* did you mean 'chatml'"),
        ("./nowhere.jinja", ConfigError, "there is no such file or folder; the templates .* chatml, llama3, gemma"),
        (str(tmp_path / "none"), InputError, "none' has no chat template; name an instruction-tuned model"),
        (str(tmp_path / "binary"), InputError, "cannot read .*binary as text"),
        (str(tmp_path / "bad.jinja"), ConfigError, "the chat template is not valid Jinja: line 1"),
    ):
        with pytest.raises(kind, match=message) as caught:
            load(tmp_path / "base", template)
        assert "\n" not in str(caught.value)
