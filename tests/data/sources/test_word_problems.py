from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretune.core.config import InputError
from pretune.data.formats.mathqa import parse_options
from pretune.data.sources.config import WordProblemsSource
from pretune.data.sources.word_problems import SUMS, TEMPLATES, rows


def generate(num_problems: int = 2000, max_number: int = 20, seed: int = 1) -> list[dict[str, str]]:
    return list(rows(WordProblemsSource(
        kind="word_problems", num_problems=num_problems, max_number=max_number, seed=seed)))  # fmt: skip


def test_the_marked_option_is_what_the_working_comes_to() -> None:
    for row in generate():
        working, result = re.fullmatch(r"explanation : (.*) = (\d+) answer : [a-e]", row["Rationale"]).groups()
        assert eval(working) == int(result), row  # our own text: digits and signs
        options = parse_options(row["options"])
        assert list(options) == list("abcde")
        numbers = {letter: int(re.search(r"\d+", text)[0]) for letter, text in options.items()}
        assert numbers[row["correct"]] == int(result)
        assert len(set(numbers.values())) == 5


@given(st.integers(5, 60), st.integers())
def test_any_limit_is_kept(max_number: int, seed: int) -> None:
    for row in generate(60, max_number, seed):
        assert all(1 <= int(number) <= max_number for number in re.findall(r"\d+", row["Problem"]))
        assert row["Problem"] == row["Problem"].lower()


def test_problems_differ_and_the_seed_decides() -> None:
    problems = generate(5000)
    assert len({row["Problem"] for row in problems}) == 5000
    assert generate(100) == problems[:100]
    assert generate(100, seed=2) != problems[:100]


def test_every_place_is_right_equally_often_and_every_kind_occurs() -> None:
    problems = generate(5000)
    places = Counter(row["correct"] for row in problems)
    assert all(0.18 < places[letter] / 5000 < 0.22 for letter in "abcde")
    assert {row["category"] for row in problems} == set(SUMS) == set(TEMPLATES)


def test_the_size_of_an_option_does_not_give_it_away() -> None:
    """Always choosing the smallest, second smallest, ... option must stay near chance."""
    ranks: Counter[int] = Counter()
    for row in generate(5000):
        options = parse_options(row["options"])
        numbers = {letter: int(re.search(r"\d+", text)[0]) for letter, text in options.items()}
        ranks[sorted(numbers.values()).index(numbers[row["correct"]])] += 1
    assert max(ranks.values()) / 5000 < 0.35


def test_more_than_there_are() -> None:
    config = WordProblemsSource(kind="word_problems", num_problems=10**6, max_number=5, seed=1)
    found: list[str] = []
    with pytest.raises(InputError) as caught:
        found.extend(row["Problem"] for row in rows(config, max_tries=10))
    assert 10 < len(set(found)) == len(found)
    assert f"finds only {len(found)} different problems with numbers up to 5; lower" in str(caught.value)
