from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import MATHQA, TOKENS, byte_tokenizer, data_config, files, write_lines
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from pretune.core.config import ConfigError, InputError
from pretune.data.config import DataConfig
from pretune.data.formats.build import build_formatter
from pretune.data.formats.documents import problems, training_texts
from pretune.data.formats.mathqa import parse_options
from pretune.data.formats.problems import Problem, final_answer
from pretune.data.formats.segments import Place, Segment, Unusable
from pretune.data.formats.special_tokens import TemplateTokens
from pretune.data.tokenizer import Tokenizer

PLACE = Place(data_config(source=files("a.jsonl")).source, 6)
ROW = {"Problem": "what is 2 + 3 ? ", "Rationale": '"2 + 3 = 5 answer : c"',
       "options": "a ) 4 , b ) 6 , c ) 5 , d ) 1 , e ) none", "correct": "c"}  # fmt: skip


def problems_of(config: DataConfig) -> Iterator[Problem]:
    return problems(config, build_formatter(config.format, TOKENS))


def segments(row: dict[str, Any], **format: Any) -> list[Segment]:
    """The only document of a row; its prompt is the prompt that generation gets."""
    formatter = build_formatter(data_config(format=format).format, TOKENS)
    (document,) = formatter.documents(row, PLACE)
    if format["kind"] != "text":
        assert [segment.text for segment in formatter.prompt(row, PLACE)] == [document[0].text]
    return document


@pytest.mark.parametrize(("text", "options"), [
    ("a ) rs . 1,500 , b ) rs . 1 , 200 , c ) ( 3 , 4 ) , d ) none of these , e ) 2 : 3",
     ["rs . 1,500", "rs . 1 , 200", "( 3 , 4 )", "none of these", "2 : 3"]),
    ("a) 38, b) 27.675, c) 30, d) data inadequate, e) x", ["38", "27.675", "30", "data inadequate", "x"]),
    ("a ) 5 , 6 , b ) ( 1 , b ) , c ) ( b ) , d ) a , e ) a , b or c",
     ["5 , 6", "( 1 , b )", "( b )", "a", "a , b or c"]),
    ("['a ) 1 / 4', 'b ) 1 / 5', \"c ) it ' s\", 'd ) 1,000', 'e ) 1 / 9']",
     ["1 / 4", "1 / 5", "it ' s", "1,000", "1 / 9"]),
    ("a ) [ 22 ] , b ) [ 44 ] , c ) [ 45 ] , d ) [ 28 ] , e ) [ 10 ]",
     ["[ 22 ]", "[ 44 ]", "[ 45 ]", "[ 28 ]", "[ 10 ]"]),
    ("A ) 1 , B ) 2 , C ) 3 , D ) 4 , E ) 5", ["1", "2", "3", "4", "5"]),
    ("(a) 1, (b) 2, (c) 3, (d) 4, (e) 5", ["1", "2", "3", "4", "5"]),
    ("a ) a ) 3800 , b ) b ) 4,200 , c ) c ) 44 , d ) 45 , e ) d ) 46", ["3800", "4,200", "44", "45", "46"]),
])  # fmt: skip
def test_options_keep_commas_and_brackets(text: str, options: list[str]) -> None:
    assert parse_options(text) == dict(zip("abcde", options, strict=True))


@pytest.mark.parametrize(("text", "options"), [
    ("a ) 1 , b ) 2 , d ) 4 , e ) 5", {"a": "1", "b": "2", "d": "4", "e": "5"}),
    ("a ) 1 , b ) , c ) 3", {"a": "1", "c": "3"}),
    ("none", {}),
    ("", {}),
])  # fmt: skip
def test_missing_letters_are_missing(text: str, options: dict[str, str]) -> None:
    assert parse_options(text) == options


option_texts = st.lists(
    st.text("0123456789 .,:/%$()xyz", min_size=1).map(str.strip).filter(
        lambda text: text.strip(" ,") == text != "" and text.count("(") == text.count(")")
    ),
    min_size=5, max_size=5,
)  # fmt: skip


@given(option_texts)
def test_whatever_was_written_is_read_back(texts: list[str]) -> None:
    text = " , ".join(f"{letter} ) {option}" for letter, option in zip("abcde", texts, strict=True))
    assert list(parse_options(text).values()) == texts


def test_every_real_row_gives_five_options(shared_data: Path) -> None:
    counts: Counter[str] = Counter()
    for name in ("train", "validation"):
        for row in json.loads((shared_data / "mathqa" / f"{name}.json").read_text()):
            options = parse_options(row["options"])
            counts["five" if list(options) == list("abcde") and row["correct"] in options else "other"] += 1
            # Between the options there are only markers and commas: no part of an option is lost.
            joined = "".join("".join(options.values()).split())
            left = Counter("".join(row["options"].split())) - Counter(joined)
            assert set(left) <= set("abcde),[]'\""), row["options"]
    assert counts == {"five": 4475}


def test_mathqa_prompt_and_answer() -> None:
    assert segments(ROW, **MATHQA) == [
        Segment("what is 2 + 3 ?\noptions : a ) 4 , b ) 6 , c ) 5 , d ) 1 , e ) none\nanswer :", False),
        Segment(" 5", True),
    ]
    reference = segments(ROW, **MATHQA | {"options": False, "score_prompt": True})
    assert reference == [Segment("what is 2 + 3 ?", True), Segment(" 5", True)]


def test_mathqa_rationale_after_and_before() -> None:
    after = segments(ROW, **MATHQA | {"rationale": "after"})
    assert [segment.text for segment in after[1:]] == [" 5", "\nrationale : 2 + 3 = 5 answer : c"]
    before = segments(ROW, **MATHQA | {"rationale": "before", "options": False})
    assert [segment.text for segment in before] == [
        "what is 2 + 3 ?", "\nrationale : 2 + 3 = 5 answer : c\nanswer :", " 5"]  # fmt: skip
    assert [segment.scored for segment in before] == [False, True, True]


@pytest.mark.parametrize("options", [True, False])
@pytest.mark.parametrize("rationale", ["none", "after"])
def test_options_are_compared_after_the_very_prompt_of_training(options: bool, rationale: str) -> None:
    source = {"kind": "word_problems", "num_problems": 50, "max_number": 20, "seed": 1}
    other = data_config(
        format=MATHQA | {"options": options, "rationale": rationale},
        source=source | {"seed": 2},
        validation={"source": source, "fraction": None},
    )
    same = data_config(format=other.format.model_dump(), source=source, validation={"fraction": 1e-9})
    tokenizer = byte_tokenizer(280, ["answer : 12 rs . 14"] * 9)
    for problem, text in zip(
        problems_of(other), training_texts(same, build_formatter(same.format, TOKENS)), strict=True
    ):
        continuation = problem.prompt + problem.options[problem.correct]
        assert text.startswith(continuation + (problem.closing or ""))
        assert (text == continuation) == (problem.closing is None) == (rationale == "none")
        assert len(set(problem.options)) == 5
        assert not problem.prompt.endswith(" ")
        # The tokens are the same whether encoded piece by piece or at once.
        pieces = tokenizer.encode(problem.prompt) + tokenizer.encode(problem.options[problem.correct])
        assert pieces == tokenizer.encode(continuation)


def test_unusable_rows_are_left_out(tmp_path: Path) -> None:
    four = ROW | {"options": "a ) 1 , b ) 2 , d ) 4 , e ) 5"}
    odd = ROW | {"correct": "f"}
    for row, reason in ((four, "five options"), (odd, "letter")):
        with pytest.raises(Unusable, match=reason):
            segments(row, **MATHQA)
    with pytest.raises(Unusable, match="empty"):
        segments({"text": ""}, kind="text", column="text")
    held_out = write_lines(tmp_path / "v.jsonl", [four, ROW, odd])
    config = data_config(format=MATHQA, validation={"source": files(held_out), "fraction": None})
    assert [problem.correct for problem in problems_of(config)] == [2]


def test_instructions_with_and_without_input() -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    prompt, answer = segments(row, kind="instruction", preamble=True, score_prompt=False)
    assert prompt.text.startswith("Below is an instruction that describes a task, paired with an input")
    assert prompt.text.endswith("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n")
    assert (prompt.scored, answer) == (False, Segment("3", True))
    for row in ({"instruction": "Say {x}.", "input": "", "output": "3"}, {"instruction": "Say {x}.", "output": "3"}):
        prompt, _ = segments(row, kind="instruction", preamble=True, score_prompt=True)
        assert "### Input" not in prompt.text
        assert "Say {x}." in prompt.text
        assert prompt.scored
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    short, _ = segments(row, kind="instruction", preamble=False, score_prompt=False)
    assert short.text == "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n"


def test_prompt_and_completion_have_columns_of_their_own() -> None:
    format = {"kind": "prompt_completion", "prompt": "q", "completion": "a", "score_prompt": False}
    assert segments({"q": "two and two:  ", "a": "four"}, **format) == [
        Segment("two and two:", False), Segment("  four", True)]  # fmt: skip
    with pytest.raises(Unusable, match="its a is empty"):
        segments({"q": "x", "a": " "}, **format)
    with pytest.raises(Unusable, match="it has no q"):
        segments({"question": "x", "a": "y"}, **format)


@pytest.mark.parametrize("kind", ["text", "prompt_completion"])
@pytest.mark.parametrize("end", ["", "</s>", "</s>\n", " </s> \n"])
def test_special_tokens_in_text_are_parsed_where_the_format_says_so(kind: str, end: str) -> None:
    tokens = TemplateTokens(None, "", "</s>", ("<u>", "</s>"))
    backend = byte_tokenizer().backend
    backend.add_special_tokens(["<u>", "</s>"])
    tokenizer = Tokenizer(backend, "</s>")
    row = {"text": f"<u>a</s> <u>b{end}", "prompt": "<u>a</s>", "completion": f" <u>b{end}"}

    def ids(parse: bool) -> tuple[list[int], list[int]]:
        """Of the document with its end, and of the prompt."""
        of = build_formatter(data_config(format={"kind": kind, "parse_special": parse}).format, tokens)
        (document,), prompt = of.documents(row, PLACE), of.render_prompt([{"role": "user", "content": "<u>a</s>"}])
        found, asked = ([one for ids in tokenizer.encode_segments(part) for one in ids] for part in (document, prompt))
        assert found[: len(asked)] == asked, "generation asks with the tokens of training"
        return [*found, tokenizer.eos_id], asked

    reference = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(backend.to_str()))
    expected = reference("<u>a</s> <u>b", add_special_tokens=False).input_ids
    space = reference(" ").input_ids if end.startswith(" ") else []
    assert ids(parse=True)[0] == [*expected, *space, tokenizer.eos_id], "EOS is not doubled"
    assert ids(parse=False)[0].count(tokenizer.eos_id) == 1
    for empty in ("</s>", " </s>\n"):
        of = build_formatter(data_config(format={"kind": kind, "parse_special": True}).format, tokens)
        with pytest.raises(Unusable, match="is empty"):
            of.documents({"text": empty, "prompt": "a", "completion": empty}, PLACE)


def test_what_alpacas_prompt_has_no_place_for_is_an_error() -> None:
    row = {"instruction": "Add.", "output": "3"}
    format = {"kind": "instruction", "preamble": False, "score_prompt": False}
    for name, value in (("system", "Be brief."), ("history", [["a", "b"]])):
        with pytest.raises(
            InputError, match=f"row 7 has a {name}, for which Alpaca's prompt has no place; use data/form"
        ):
            segments(row | {name: value}, **format)
        assert segments(row | {name: value}, **format, refuse_columns=[]) == segments(row, **format)
        for nothing in (None, "", " ", [], float("nan")):
            assert segments(row | {name: nothing}, **format) == segments(row, **format)


def test_gsm8k_asks_and_answers() -> None:
    row = {"question": "How many? ", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 1,024"}
    format = {"kind": "gsm8k", "calculations": True, "score_prompt": False}
    prompt, answer = segments(row, **format)
    assert (prompt, answer) == (Segment("Question: How many?\nAnswer:", False), Segment(f" {row['answer']}", True))
    assert segments(row, **format | {"calculations": False})[1].text == " 48/2 = 24 clips.\n#### 1,024"
    assert final_answer(answer.text) == "1024"
    with pytest.raises(Unusable, match="no line '#### number'"):
        segments(row | {"answer": "24"}, **format)


@pytest.mark.parametrize(("text", "number"), [
    ("#### 18", "18"), ("x ####  -3.5 .\n#### 1", "-3.5"), ("####$1,000", "1000"), ("18", None), ("#### none", None),
])  # fmt: skip
def test_the_final_answer_is_the_first_one_marked(text: str, number: str | None) -> None:
    assert final_answer(text) == number


def test_every_real_row_of_gsm8k_has_a_final_answer(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "instruct" / "gsm8k_train.jsonl").read_text().splitlines()]
    written = [row["answer"].split("#### ")[1].replace(",", "") for row in rows]
    assert [final_answer(row["answer"]) for row in rows] == written


def test_a_typed_question_is_put_as_the_data_puts_its_questions() -> None:
    row = {"instruction": "Add.", "output": "3", "question": "Add.", "answer": "#### 3"}
    for format in ({"kind": "instruction", "preamble": True, "score_prompt": False},
                   {"kind": "gsm8k", "calculations": True, "score_prompt": False}):  # fmt: skip
        formatter = build_formatter(data_config(format=format).format, TOKENS)
        assert formatter.render_prompt([{"role": "user", "content": "Add."}]) == formatter.prompt(row, PLACE)
        assert formatter.end_of_turn == ""


def test_options_need_a_format_that_has_them() -> None:
    for format in ({"kind": "text", "column": "text"}, MATHQA | {"rationale": "before"}):
        with pytest.raises(ConfigError, match="mathqa"):
            next(problems_of(data_config(format=format, validation={"fraction": 0.999})))
