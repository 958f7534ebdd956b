"""A value on the command line is what it looks like."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from pretune.core.config import ConfigError, validate
from pretune.launch.compose import composed, plain
from pretune.launch.groups import CONFIGS
from pretune.launch.overrides import readable
from pretune.run.config import RunConfig

SMOKE = CONFIGS / "run" / "smoke.yaml"


def value(word: str, sweep: bool = False) -> Any:
    (parsed,) = OverridesParser.create().parse_overrides(readable([word], sweep))
    return list(parsed.sweep_string_iterator()) if parsed.is_sweep_override() else parsed.value()


@pytest.mark.parametrize("text", [
    "café", "中文", "yes!", "it's", "42", "1e-3", "true", "~/q.txt", "Hello, world", " a b ", "x=y", "[1", "{", "a\\",
    'say "hi"', "choice(1,2)", "don't \\'x", "two\nlines", "#no comment", "a: b", "",
])  # fmt: skip
def test_text_is_taken_as_it_stands(text: str) -> None:
    assert value(f"generate.prompt={text}") == text
    assert value(f"++generate.prompt={text}") == text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="$")))
def test_any_text_is_taken_as_it_stands(text: str) -> None:
    inner = text[1:-1]
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in inner and "\\" not in inner
    if text.strip().lower() != "null" and not (quoted or text.strip()[:1] in "'\""):
        assert value(f"generate.prompt={text}") == text


def test_what_hydra_understands_stays() -> None:
    assert value("generate.prompt='a b'") == "a b"
    assert value("generate.prompt=null") is None
    assert value("generate.prompt=${name}") == "${name}"
    assert value("optimizer.lr=1e-3") == 1e-3
    assert value("budget.count=[a,b]") == ["a", "b"]
    assert value("name=a,b", sweep=True) == ["a", "b"]
    assert value("name=a,b") == "a,b"
    assert value("seed=1,2", sweep=True) == ["1", "2"]
    assert readable(["~data.mix.x", "optimizer=lion"], False) == ["~data.mix.x", "optimizer=lion"]


def test_lists_and_mappings_that_its_grammar_refuses_are_read_as_yaml() -> None:
    assert value("samples.prompts=[café, it's, 3, null, true]") == ["café", "it's", 3, None, True]
    assert value("+data.format.variables={date_string: 3 août, n: 1}") == {"date_string": "3 août", "n": 1}


def test_a_group_needs_an_option() -> None:
    with pytest.raises(ConfigError, match=r"model=null .*choose one of .*nano"):
        readable(["model=null"], False)


def test_a_number_in_place_of_a_text_is_to_be_quoted() -> None:
    for value, shown in ((7, "7"), (True, "true"), (1.5, "1.5")):
        with pytest.raises(ConfigError, match=rf"'name' = {shown}: input should be a valid string; write it in quotes"):
            validate(RunConfig, {"name": value})


def test_the_composed_configuration_has_the_texts() -> None:
    words = readable(["name=7", "generate.prompt=it's 5 o'clock, café", "samples.prompts=[été]"], False)
    with composed(SMOKE, words) as config:
        mapping = plain(config, SMOKE)
    assert (mapping["name"], mapping["generate"]["prompt"]) == ("7", "it's 5 o'clock, café")
    assert mapping["samples"]["prompts"] == ["été"]
