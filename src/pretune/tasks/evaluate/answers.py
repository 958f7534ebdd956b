"""Count the right answers that a model generates for held-out problems."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pretune.core.files import write_atomic
from pretune.data.formats.problems import Question
from pretune.generation.texts import Text
from pretune.run.config import RunConfig
from pretune.run.generator import assemble_generator
from pretune.run.parts import Parts
from pretune.run.weights import own_folder
from pretune.tasks.evaluate.progress import watched

FILE = "answers.jsonl"
"""In the folder evaluations of a run."""


def answer_metrics(config: RunConfig, parts: Parts) -> dict[str, float]:
    """The share of held-out problems for which the model generates the right answer, with the prompt used in training.

    `unanswered`: share of generated texts without an answer. Problems whose prompts leave no room for an answer are
    `left_out`. The generated texts are written to evaluations/answers.jsonl in the run's folder.
    """
    section = config.evaluation.answers
    # Compiled code contains the weights as constants: during training they would be stale at the next evaluation.
    rows = section.batch_size if section.compile and config.task == "evaluate" else None
    generator = assemble_generator(config, section, parts.model, parts.tokenizer, parts.device, rows)
    assert parts.data.held_out is not None  # a rule asks for a format with answers
    asked = list(parts.data.held_out.questions(config.evaluation.max_problems))
    prompts = [generator.ids(question.prompt) for question in asked]
    fitting = [at for at, prompt in enumerate(prompts) if len(prompt) < generator.decoder.limit]
    with generator.autocast():
        written = generator.generate([prompts[at] for at in fitting], section.batch_size)
        written = watched(config.task, written, len(fitting), "writing answers")
        texts = {fitting[place]: text for place, text in written}
    records = [record(asked[at], texts[at]) for at in fitting]
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
    write_atomic(own_folder(config).path / "evaluations" / FILE, lines)
    if not records:
        return {}
    # Of options, `accuracy` is the accuracy by likelihood.
    task, name = config.data.format.group, "generated_accuracy" if asked[0].options else "accuracy"
    return {**shares(task, name, records), f"{task}/left_out": len(asked) - len(fitting)}


def shares(task: str, name: str, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`TASK/NAME`: the share of the records whose answer is right, its standard error, and what else was counted."""
    right = sum(one["right"] for one in records) / len(records)
    return {
        f"{task}/{name}": right,
        f"{task}/{name}_error": math.sqrt(right * (1 - right) / len(records)),
        f"{task}/unanswered": sum(one["answer"] is None for one in records) / len(records),
        f"{task}/questions": len(records),
    }


def record(question: Question, text: Text) -> dict[str, Any]:
    """What is kept of a question and the text that answers it, JSON-like."""
    answer = question.answer_in(text.text)
    return {
        "prompt": "".join(segment.text for segment in question.prompt),
        "text": text.text,
        "ended": text.reason,
        "answer": answer,
        "wanted": question.wanted,
        "right": question.is_right(answer),
    }
