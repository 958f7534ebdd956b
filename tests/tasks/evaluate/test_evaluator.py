"""An evaluator: the same metrics compiled, and nothing compiled or tokenized twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from pretune.core.config import validate
from pretune.data.formats.segments import Segment
from pretune.data.tokenizer import Tokenizer
from pretune.dispatch import run
from pretune.run.assembly import assemble_evaluation
from pretune.run.config import RunConfig
from pretune.run.weights import evaluated_run
from pretune.tasks.evaluate.task import Evaluator

Compose = Callable[..., dict[str, Any]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler does what it deprecates
def test_compiled_it_finds_the_same_and_announces_one_compilation(
    tiny: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = tiny("budget.steps=2", "data.packing.isolate=true")
    assert run(mapping) == 0
    # What is compiled how often does not depend on the code generator, which takes most of the time.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    config = validate(RunConfig, mapping | {"task": "evaluate"})
    parts = assemble_evaluation(config, evaluated_run(config))
    eager = Evaluator(config, parts).metrics(parts.model)
    torch.compiler.reset()
    counters.clear()
    said: list[str] = []
    compiled = Evaluator(config, parts, compiled=True, say=said.append)
    assert not said
    assert compiled.metrics(parts.model) == pytest.approx(eager, rel=1e-5)
    assert said == ["compiling the evaluation (once; precision.compile=false skips it) ..."]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2, "the forward pass, and a chunk of scores"
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.metrics(parts.model)
    assert counters["stats"]["unique_graphs"] == graphs
    assert len(said) == 1


class Counting:
    """A tokenizer that counts the texts it encodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.encoded = tokenizer, 0

    def encode_segments(self, segments: Sequence[Segment]) -> list[list[int]]:
        self.encoded += len(segments)
        return self._tokenizer.encode_segments(segments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_problems_are_tokenized_once(tiny: Compose, composed: Compose) -> None:
    mapping = tiny("budget.steps=1", "model.max_sequence_length=256")
    mapping["data"] = composed("quickstart_finetune", "data/tokenizer=trained", "data.source.num_problems=60")["data"]
    mapping["data"]["tokenizer"]["vocab_size"] = 300
    mapping["data"]["validation"]["fraction"] = 0.5
    mapping["batch"] |= {"tokens": 1024, "micro_batch": 2}
    mapping["evaluation"]["option_accuracy"] = True
    assert run(mapping) == 0
    config = validate(RunConfig, mapping | {"task": "evaluate"})
    parts = assemble_evaluation(config, evaluated_run(config))
    counting: Any = Counting(parts.tokenizer)
    evaluator = Evaluator(config, replace(parts, tokenizer=counting))
    first, encoded = evaluator.metrics(parts.model), counting.encoded
    assert encoded > first["mathqa/problems"] > 0
    assert evaluator.metrics(parts.model) == first
    assert counting.encoded == encoded
