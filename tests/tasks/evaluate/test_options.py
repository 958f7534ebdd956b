"""Multiple-choice accuracy by likelihood, against one option at a time in float64."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from published import model_folder
from tiny import tiny_model, transformers_llama
from tokenizers import Tokenizer as Backend
from torch import Tensor
from transformers import AutoTokenizer

from pretune.core.batch import Batch
from pretune.data.formats.problems import Problem
from pretune.data.formats.segments import Segment
from pretune.data.tokenizer import Tokenizer
from pretune.objectives.language_modeling import TokenScores, score_tokens
from pretune.tasks.evaluate.options import Choices, batches, log_likelihoods, option_accuracy, tokenized


class Letters:
    """A tokenizer with a token for each of the letters a to z; token 0 ends a document."""

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") + 1 for letter in text]

    def encode_segments(self, segments: list[Segment]) -> list[list[int]]:
        return [self.encode(segment.text) for segment in segments]

    def document_start(self, ids: list[list[int]]) -> tuple[int, ...]:
        return ()


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


def log_probs(reference: Any, prompt: str, option: str, closing: str | None) -> Tensor:
    """The log-probability of each token of the option and of its end, by transformers' logits in float64."""
    tokenizer = Letters()
    before = tokenizer.encode(prompt)
    after = tokenizer.encode(option) + ([0] if closing is None else tokenizer.encode(closing))
    logits = reference(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return torch.stack([logits[len(before) - 1 + place, token] for place, token in enumerate(after)])


@pytest.mark.parametrize("tokens", [1, 200, 10_000])
def test_equals_one_option_at_a_time_by_the_logits_of_transformers(tokens: int) -> None:
    model, problems, right = tiny_model(max_sequence_length=128), some_problems(40), Counter()
    score, reference = partial(score_tokens, model, chunk_tokens=64), transformers_llama(model).double()
    with torch.no_grad():
        found = option_accuracy(score, choices(problems), tokens, "train", "mathqa")
        for problem in problems:
            each = [log_probs(reference, problem.prompt, option, problem.closing) for option in problem.options]
            ours = log_likelihoods(score, choices([problem]).rows)
            expected = torch.stack([torch.stack([one[:-1].sum(), one.sum()]) for one in each])
            assert torch.allclose(ours, expected, rtol=0, atol=1e-4)
            # As lm-evaluation-harness defines acc and acc_norm; the end of an option is always one token here.
            values = {
                "accuracy": expected[:, 1],
                "accuracy_per_token": expected[:, 1] / torch.tensor([len(one) for one in each]),
                "lm_eval_acc": expected[:, 0],
                "lm_eval_acc_norm": expected[:, 0] / torch.tensor([len(option) for option in problem.options]),
            }
            right.update(name for name, value in values.items() if int(value.argmax()) == problem.correct)
    assert len(set(right.values())) > 1, "they are not the same measure"
    for name, count in right.items():
        assert found[f"mathqa/{name}"] == count / 40
        assert found[f"mathqa/{name}_error"] == pytest.approx((count / 40 * (1 - count / 40) / 40) ** 0.5)
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

    assert option_accuracy(score, given, 1000, "train", "mathqa")["mathqa/skipped"] == 1
    assert option_accuracy(score, given, 1000, "train", "mathqa")["mathqa/accuracy"] == 1
    assert option_accuracy(score, choices([long], max_length=12), 1000, "train", "mathqa") == {}


def test_batches_hold_similar_rows_within_their_size() -> None:
    rows = choices(some_problems(30)).rows
    found = list(batches(rows, 640))
    assert sorted(row for batch in found for row in batch) == list(range(len(rows)))
    assert all(len(batch) * 64 <= 640 for batch in found)
    lengths = [rows[row].length for batch in found for row in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_a_prompt_begins_as_documents_of_its_tokenizer_do(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "llama2")
    tokenizer = Tokenizer(Backend.from_file(str(folder / "tokenizer.json")), "</s>", "<s>")
    (row, _) = tokenized([Problem("The cat", (" sat", " ate"), 0, None)], tokenizer, 60).rows
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert [*row.prompt, *row.option, *row.end] == [*theirs("The cat sat")["input_ids"], theirs.eos_token_id]
    assert row.prompt == theirs("The cat")["input_ids"]
