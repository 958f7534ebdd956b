"""Multiple-choice accuracy by likelihood, against one option at a time in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from pretune.core.batch import Batch
from pretune.data.formats.problems import Problem
from pretune.model.transformer import Transformer
from pretune.objectives.language_modeling import TokenScores, score_tokens
from pretune.tasks.evaluate.options import Choices, batches, option_accuracy, tokenized


class Letters:
    """A tokenizer with a token for each of the letters a to z; token 0 ends a document."""

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") + 1 for letter in text]


def choices(problems: list[Problem], max_length: int = 60) -> Choices:
    return tokenized(problems, Letters(), max_length)  # type: ignore[arg-type]


def some_problems(count: int) -> list[Problem]:
    """Problems with two to five options of one to six letters, after prompts of 1 to 40."""
    generator = torch.Generator().manual_seed(2)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def word(low: int, high: int) -> str:
        return "".join(chr(ord("a") + number(0, 26)) for _ in range(number(low, high)))

    problems = []
    for _ in range(count):
        options = tuple(word(1, 7) for _ in range(number(2, 6)))
        problems.append(Problem(word(1, 41), options, number(0, len(options)), [None, "z"][number(0, 2)]))
    return problems


def log_likelihood(model: Transformer, prompt: str, option: str, closing: str | None) -> Tensor:
    tokenizer = Letters()
    before = tokenizer.encode(prompt)
    after = tokenizer.encode(option) + ([0] if closing is None else tokenizer.encode(closing))
    logits = model.unembed(model(torch.tensor([before + after])))[0].double().log_softmax(-1)
    return torch.stack([logits[len(before) - 1 + place, token] for place, token in enumerate(after)]).sum()


@pytest.mark.parametrize("tokens", [1, 200, 10_000])
def test_equals_one_option_at_a_time(tokens: int) -> None:
    model, problems = tiny_model(max_sequence_length=128), some_problems(40)
    with torch.no_grad():
        found = option_accuracy(partial(score_tokens, model, chunk_tokens=64), choices(problems), tokens, "train")
        right = right_normalized = 0
        for problem in problems:
            sums = [log_likelihood(model, problem.prompt, option, problem.closing) for option in problem.options]
            lengths = [len(option) + 1 for option in problem.options]
            right += int(torch.stack(sums).argmax()) == problem.correct
            means = [value / length for value, length in zip(sums, lengths, strict=True)]
            right_normalized += int(torch.stack(means).argmax()) == problem.correct
    assert found["mathqa/accuracy"] == right / 40
    assert found["mathqa/accuracy_normalized"] == right_normalized / 40
    assert found["mathqa/chance"] == pytest.approx(sum(1 / len(one.options) for one in problems) / 40)
    assert found["mathqa/problems"] == 40


def test_problems_that_are_too_long_are_counted_and_left_out() -> None:
    short, long = Problem("abc", ("d", "ef"), 1, None), Problem("abc", ("d", "e" * 10), 0, None)
    given = choices([short, long, short], max_length=12)
    assert (len(given.choices), given.skipped) == (2, 1)

    def score(batch: Batch) -> TokenScores:
        """The longer an option, the more likely."""
        nll = torch.where(batch.targets == -100, 0.0, -1.0)
        return TokenScores(nll, nll > 0)

    assert option_accuracy(score, given, 1000, "train")["mathqa/skipped"] == 1
    assert option_accuracy(score, given, 1000, "train")["mathqa/accuracy"] == 1
    assert option_accuracy(score, choices([long], max_length=12), 1000, "train") == {}


def test_batches_hold_similar_rows_within_their_size() -> None:
    rows = choices(some_problems(30)).rows
    found = list(batches(rows, 640))
    assert sorted(row for batch in found for row in batch) == list(range(len(rows)))
    assert all(len(batch) * 64 <= 640 for batch in found)
    lengths = [len(rows[row][0]) + len(rows[row][1]) for batch in found for row in batch]
    assert lengths == sorted(lengths, reverse=True)
