"""data.tokenizer.add_tokens: special tokens after the last, as transformers adds them; what cannot be is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from published import CHATML, model_folder, write
from small_data import data_config, files

from pretune.core.config import ConfigError, InputError, UserError, validate
from pretune.data.config import FileTokenizer
from pretune.data.formats.build import build_formatter
from pretune.data.formats.segments import Segment
from pretune.data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer

TALK = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Ho."}]
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]


def load(folder: Path, add: Any, template: str | None = None, eos: str | None = None) -> Tokenizer:
    config = data_config(format={"kind": "chat", "template": template}) if template else data_config()
    section = {"kind": "file", "path": str(folder), "eos": eos, "add_tokens": add}
    return load_tokenizer(validate(FileTokenizer, section), config, folder)


@pytest.mark.parametrize("family", ["gpt2", "llama3", "mistral", "gemma", "t5", "bert"])
def test_tokens_come_after_the_last_as_in_transformers(family: str, tmp_path: Path) -> None:
    folder, new = model_folder(tmp_path / "theirs", family), ["<call>", "[é]"]
    before, found = load(folder, []), load(folder, new)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.add_special_tokens({"additional_special_tokens": new}) == 2
    assert [*found.added_ids] == theirs.convert_tokens_to_ids(new) == [before.vocab_size, before.vocab_size + 1]
    assert found.vocab_size == before.vocab_size + 2
    text = "The cat<call>sat[é] on the <call>"
    wanted = [*found.beginning, *found.encode_segments([Segment(text, False, True)])[0]]
    assert [
        one for one in theirs(text)["input_ids"] if one not in theirs.all_special_ids or one in found.added_ids
    ] == [one for one in wanted if one not in found.special_tokens or one in found.added_ids]
    assert set(found.encode(text)).isdisjoint(found.added_ids), "text that spells a token is text"
    assert found.decode(wanted).count("<call>") == 0
    assert not found.token_bytes()[list(found.added_ids)].any()
    # A run keeps them, and what reads its folder has them.
    found.save(tmp_path / "saved")
    again = saved_tokenizer(tmp_path / "saved", data_config())
    assert (again.added_ids, again.fingerprint) == (found.added_ids, found.fingerprint)
    loaded: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.convert_tokens_to_ids(new) == [*found.added_ids]
    # Another run's new tokens are its own.
    further = saved_tokenizer(tmp_path / "saved", data_config(), ("<more>",))
    assert further.added_ids == (found.vocab_size,)
    assert saved_tokenizer(tmp_path / "saved", data_config(), ()).added_ids == ()


@pytest.mark.parametrize("template", ["chatml", "a file", "a model", "the tokenizer's own"])
def test_a_template_brings_its_tokens(template: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "base", "gpt2")
    if template == "a file":
        template = str(tmp_path / "chat.jinja")
        Path(template).write_text(CHATML)
    elif template == "a model":
        template = str(model_folder(tmp_path / "instruct", "qwen2"))
    elif template != "chatml":
        about = json.loads((folder / "tokenizer_config.json").read_text())
        write(folder / "tokenizer_config.json", about | {"chat_template": CHATML})
    named = template if Path(template).exists() or template == "chatml" else None
    config = data_config(format={"kind": "chat", "template": named})
    section = {"kind": "file", "path": str(folder), "eos": None, "add_tokens": "template"}
    tokenizer = load_tokenizer(validate(FileTokenizer, section), config, folder)
    assert [tokenizer.backend.id_to_token(one) for one in tokenizer.added_ids] == CHATML_TOKENS
    formatter = build_formatter(config.format, tokenizer.template_tokens)
    prompt = [token for part in tokenizer.encode_segments(formatter.render_prompt(TALK[:1])) for token in part]
    start, end = tokenizer.added_ids
    assert (prompt.count(start), prompt.count(end)) == (2, 1), "the user's own <|im_end|> is text"
    assert tokenizer.encode_segments([Segment(formatter.end_of_turn, True, True)]) == [[end]]
    # Nothing is lacking where they are.
    tokenizer.save(tmp_path / "saved")
    assert saved_tokenizer(tmp_path / "saved", config, "template").added_ids == ()


def test_a_tokenizer_that_is_trained_does_not_learn_them(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    talks = [[{"role": "user", "content": f"{n} cats?"}, TALK[1]] for n in range(40)]
    rows.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    section = {
        "kind": "trained",
        "vocab_size": 290,
        "max_bytes": 10_000,
        "split_digits": True,
        "add_tokens": "template",
    }
    config = data_config(format={"kind": "chat", "template": "chatml"}, source=files(rows), tokenizer=section)
    for _ in range(2):  # the second time from the cache
        found = load_tokenizer(config.tokenizer, config, tmp_path / "cache")
        assert [found.backend.id_to_token(one) for one in found.added_ids] == CHATML_TOKENS
        assert not any("im_" in token for token in found.backend.get_vocab() if token not in CHATML_TOKENS)


def test_eos_may_be_a_new_token(tmp_path: Path) -> None:
    found = load(model_folder(tmp_path, "gpt2"), ["<stop>"], eos="<stop>")
    assert (found.eos, found.eos_id) == ("<stop>", found.added_ids[0])


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (["<a>", "<|endoftext|>"], r"the tokenizer has '<\|endoftext\|>' already, as token \d+; leave it out"),
        (["at"], r"the tokenizer has 'at' already"),
        (["<a>", "<b>", "<a>"], "add_tokens names <a> twice: once is enough"),
        ([""], "add_tokens has an empty token: leave it out"),
        ([" \n"], r"add_tokens has a token of white space alone \(' .n'\): leave it out"),
        (["<a>", 3], "add_tokens"),
    ],
)
def test_what_cannot_be_added_is_one_line(add: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(model_folder(tmp_path, "gpt2"), add)


def test_a_template_needs_chats() -> None:
    section = {"kind": "inherited", "add_tokens": "template"}
    with pytest.raises(ConfigError, match=r"add_tokens = template, but format.kind = text has no chat template: list"):
        data_config(tokenizer=section)
    data_config(tokenizer=section, format={"kind": "chat", "template": "chatml"})


def test_ids_with_gaps_are_refused(tmp_path: Path) -> None:
    vocabulary = {"a": 0, "b": 1, "</s>": 2, "c": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"'<new>' would become token 4, not 5: .* gaps"):
        load(tmp_path, ["<new>"], eos="</s>")


def test_chats_without_these_tokens_are_told_the_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"append them with data\.tokenizer\.add_tokens=template, or choose"):
        load(model_folder(tmp_path, "gpt2"), [], template="chatml")
