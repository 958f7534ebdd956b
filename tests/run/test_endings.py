"""What ends a text: the end of the document, of a turn, and what a decoding section adds."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from pretune.core.config import ConfigError, validate
from pretune.data.formats.build import build_formatter
from pretune.data.formats.config import ChatFormat
from pretune.data.formats.formatter import Formatter
from pretune.data.tokenizer import TRAINED_EOS, Tokenizer, train_byte_level
from pretune.run.endings import endings

CHAT = {
    "kind": "chat", "columns": ["messages"], "role_keys": ["role"], "content_keys": ["content"],
    "roles": {"user": "user", "assistant": "assistant"}, "variables": {}, "assistant_turns": "together",
    "score_keys": [], "prompt_columns": [], "input_columns": [], "completion_columns": [], "system_columns": [],
    "history_columns": [], "tools_columns": [], "variables_columns": [],
}  # fmt: skip


def tokenizer() -> Tokenizer:
    backend = train_byte_level(iter(["a"]), 257, False)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<turn>", special=False)])
    return Tokenizer(backend, TRAINED_EOS)


def chat(end: str) -> Formatter:
    template = "{% for one in messages %}{{ one.role + ': ' + one.content + END }}{% endfor %}".replace(
        "END", repr(end)
    )
    return build_formatter(validate(ChatFormat, CHAT | {"template": template}), tokenizer().template_tokens)


@pytest.mark.parametrize(
    ("end", "ids", "strings"),
    [
        ("<|im_end|>\n", {0, 258}, ()),
        (f"<|im_end|>{TRAINED_EOS}", {0, 258}, ()),
        (f"{TRAINED_EOS}\n", {0}, ()),
        ("<turn>\n", {0, 259}, ()),
        ("\n## User", {0}, ("## User",)),
        (f"\nend{TRAINED_EOS}", {0}, (f"end{TRAINED_EOS}",)),
    ],
)
def test_a_chat_template_ends_a_turn(end: str, ids: set[int], strings: tuple[str, ...]) -> None:
    found = endings(tokenizer(), chat(end))
    assert found.ids == ids
    assert found.strings == strings


def test_a_section_adds_tokens_and_strings() -> None:
    found = endings(tokenizer(), chat("\n"), ["<|im_start|>"], ["<|im_end|>", "\n\n"])
    assert found.ids == {0, 257, 258}
    assert found.strings == ("<|im_end|>", "\n\n")
    with pytest.raises(ConfigError, match=r"no token '<\|im_end>'; did you mean '<\|im_end\|>'"):
        endings(tokenizer(), chat("\n"), ["<|im_end>"])
