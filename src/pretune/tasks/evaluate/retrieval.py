"""What a model finds in a long text: answers to a task by the length of the text and by where in it the answer lies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from pretune.core.config import ConfigError
from pretune.core.files import write_atomic, write_json
from pretune.data.formats.long_task import LongTask
from pretune.data.formats.segments import Place
from pretune.data.sources.rows import rows
from pretune.run.config import RunConfig
from pretune.run.generator import TextGenerator, assemble_generator
from pretune.run.parts import Parts
from pretune.run.sections import RetrievalConfig
from pretune.run.weights import own_folder
from pretune.tasks.evaluate.heat_map import HeatMap, draw
from pretune.tasks.evaluate.progress import watched


@dataclass(frozen=True)
class Example:
    """A prompt as token ids, its cell, and the answer."""

    length: int
    depth: float
    prompt: list[int]
    answer: str


def retrieval_metrics(config: RunConfig, parts: Parts) -> dict[str, float]:
    """`TASK/accuracy`: the share of right answers; `TASK/accuracy_at_LENGTH`: that of one length.

    An answer is right if the text begins with it and no letter or digit follows. Every cell and every text is written
    to evaluations/TASK.json in the run's folder, and the cells are drawn in TASK.png beside it.

    Raises ConfigError for a length that the model has no positions for.
    """
    section = config.evaluation.retrieval
    assert section is not None
    task = section.source.task
    _check(config, section)
    decoding = config.evaluation.answers.model_copy(update={"max_new_tokens": section.max_new_tokens})
    generator = assemble_generator(config, decoding, parts.model, parts.tokenizer, parts.device)
    # A prompt of this task whatever the run was trained on.
    generator = replace(generator, formatter=LongTask())
    examples = list(_examples(section, generator))
    with generator.autocast():
        written = generator.generate([one.prompt for one in examples], section.batch_size)
        texts = {at: text.text for at, text in watched(config.task, written, len(examples), f"asking for {task}")}
    right = [is_right(texts[at], one.answer) for at, one in enumerate(examples)]
    shares = {
        cell: _mean([ok for ok, one in zip(right, examples, strict=True) if (one.length, one.depth) == cell])
        for cell in product(section.lengths, section.depths)
    }
    found = HeatMap(task, section.lengths, section.depths, shares, config.data.sequence_length)
    answers = [
        {"length": one.length, "depth": one.depth, "answer": one.answer, "text": texts[at], "right": right[at]}
        for at, one in enumerate(examples)
    ]
    folder = own_folder(config).path / "evaluations"
    write_json(folder / f"{task}.json", {**found.as_json(), "answers": answers})
    write_atomic(folder / f"{task}.png", draw([(config.name, found)]))
    by_length = {
        f"{task}/accuracy_at_{length}": _mean([shares[length, depth] for depth in section.depths])
        for length in section.lengths
    }
    return {f"{task}/accuracy": _mean(right), **by_length, f"{task}/questions": len(examples)}


def is_right(text: str, answer: str) -> bool:
    """Whether a text begins with the answer, and with no longer word that begins with it."""
    text, answer = text.strip(), answer.strip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def _check(config: RunConfig, section: RetrievalConfig) -> None:
    longest, positions = max(section.lengths) + section.max_new_tokens, config.model.max_sequence_length
    if longest > positions:
        raise ConfigError(
            f"evaluation.retrieval.lengths has {max(section.lengths)}, with the answer {longest} tokens, and the model "
            f"{positions} positions: set lengths up to {positions - section.max_new_tokens}, or stretch the model with "
            f"model.max_sequence_length={longest} and model.rope.theta or model.rope.scaling"
        )


def _examples(section: RetrievalConfig, generator: TextGenerator) -> Iterator[Example]:
    for number, (length, depth) in enumerate(product(section.lengths, section.depths)):
        cell = {
            "num_examples": section.examples, "seed": section.source.seed + number, "min_length": length,
            "max_length": length, "min_depth": depth, "max_depth": depth,
        }  # fmt: skip
        source = section.source.model_copy(update=cell)
        for row_number, row in enumerate(rows(source)):
            prompt = generator.formatter.prompt(row, Place(source, row_number))
            yield Example(length, depth, generator.ids(prompt), row["answer"])


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values)
