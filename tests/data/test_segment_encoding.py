"""Segments are tokenized separately, and joined they are what transformers makes of the whole text."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from small_data import byte_tokenizer, data_config, sentencepiece_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from pretune.core.config import validate
from pretune.data.config import FileTokenizer
from pretune.data.formats.segments import Segment
from pretune.data.segment_encoding import prefix_of
from pretune.data.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["the cat sat on the mat", "a dog ate the cats food", "## 12 houses"] * 20
SCHEMES = ("prepend", "always", "first", "never")
WORDS = st.lists(st.sampled_from(["the", "cat", "##", "a ", "日本", "12", "é\n"]), min_size=1, max_size=6)


def whole(tokenizer: Tokenizer, text: str, split: bool) -> list[int]:
    """What transformers makes of a text; special tokens that it spells are text for `split`."""
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    return theirs(text, add_special_tokens=False, split_special_tokens=split)["input_ids"]


def joined(tokenizer: Tokenizer, segments: list[Segment]) -> list[int]:
    return [token for part in tokenizer.encode_segments(segments) for token in part]


@pytest.mark.parametrize("scheme", SCHEMES)
@given(words=WORDS)
def test_a_text_cut_between_words_has_the_ids_of_the_whole(scheme: str, words: list[str]) -> None:
    tokenizer = sentencepiece_tokenizer(scheme, TEXTS)
    texts = [word if number == 0 else f" {word}" for number, word in enumerate(words)]
    found = tokenizer.encode_documents([[Segment(text, False) for text in texts], [Segment(texts[0], True)]])
    assert [token for part in found[0] for token in part] == whole(tokenizer, "".join(texts), True)
    assert found[1] == [whole(tokenizer, texts[0], True)]


@pytest.mark.parametrize("scheme", SCHEMES)
@given(turns=st.lists(WORDS, min_size=1, max_size=4))
def test_a_chat_has_the_ids_of_the_rendered_text(scheme: str, turns: list[list[str]]) -> None:
    tokenizer = sentencepiece_tokenizer(scheme, TEXTS)
    segments = [Segment("<s>", False, True)]
    for number, words in enumerate(turns):
        # A turn that begins after a special token, one that continues a text, and one that a special token ends.
        lead = "" if number % 2 else "ask:"
        segments += [Segment(lead, False, True), Segment(" " + " ".join(words), True, False)]
        segments.append(Segment(" ok<|end|>", True, True))
    text = "".join(segment.text for segment in segments)
    assert joined(tokenizer, segments) == whole(tokenizer, text, False)


def test_a_prompt_does_not_depend_on_what_follows_it() -> None:
    tokenizer = sentencepiece_tokenizer("prepend", TEXTS)
    prompt, answer = Segment("the cat", False), Segment(" sat", True)
    assert tokenizer.encode_segments([prompt, answer])[0] == tokenizer.encode_segments([prompt])[0]
    assert tokenizer.decode(joined(tokenizer, [prompt, answer])) == "the cat sat"
    cut = tokenizer.encode_segments([Segment("the ca", False), Segment("t sat", True)])
    assert tokenizer.decode([token for part in cut for token in part]) == "the cat sat"


def test_where_a_space_is_put() -> None:
    for scheme, wanted in (("prepend", "always"), ("always", "always"), ("first", "first"), ("never", None)):
        assert prefix_of(sentencepiece_tokenizer(scheme).backend) == wanted
    assert prefix_of(byte_tokenizer().backend) is None
    # T5's way: each word begins with a mark, and taking it from a segment would take it from every word.
    words = Backend(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    assert prefix_of(words) is None
    roberta = Backend(models.BPE())
    roberta.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert prefix_of(roberta) == "always"


def test_a_real_tokenizer_of_this_kind(shared_data: Path) -> None:
    folder = shared_data.parent / "cases" / "data" / "tok" / "llama2"
    section = validate(FileTokenizer, {"kind": "file", "path": str(folder), "eos": None, "add_tokens": []})
    tokenizer = load_tokenizer(section, data_config(), folder)
    segments = [Segment("Question: what is 12 + 3?\nAnswer:", False), Segment(" 15.", True)]
    assert joined(tokenizer, segments) == whole(tokenizer, "Question: what is 12 + 3?\nAnswer: 15.", True)
