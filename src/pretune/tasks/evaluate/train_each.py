"""Training on a task's own pairs before it is answered (test-time training).

The model that is evaluated is not touched. A copy of it gets a new adapter of the run's kind, which starts without an
update; where the run has none, all weights of the copy are trained. Before each task it goes back to its start, so that
nothing that was learned on one helps with the next.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice

import torch
from torch import nn

from pretune.compute.precision import autocast, dtype_of
from pretune.data.formats.arc import Arc
from pretune.data.formats.grid_variants import leave_one_out, variants
from pretune.data.formats.grids import GridTask
from pretune.data.formats.segments import Place
from pretune.model.build import Model
from pretune.objectives.language_modeling import language_modeling
from pretune.optim.optimizers import build_optimizer, clip_gradients, update
from pretune.run.config import RunConfig
from pretune.run.model import learning_rate_factors
from pretune.run.parts import Parts
from pretune.run.sections import TrainEachConfig
from pretune.tasks.evaluate.grid_rows import Example, as_batch, examples


class Learner:
    """A copy of a run's model that learns one task at a time."""

    def __init__(self, config: RunConfig, section: TrainEachConfig, parts: Parts, formatter: Arc) -> None:
        self._config, self._section, self._formatter = config, section, formatter
        self.parts = replace(parts, model=_trainable_copy(config, parts.model))
        trained = {name: one for name, one in self.parts.model.named_parameters() if one.requires_grad}
        self._start = {name: one.detach().clone() for name, one in trained.items()}

    def learn(self, task: GridTask) -> int:
        """Go back to the start, then train on the task's pairs; return the steps made, 0 if it has nothing to learn
        from."""
        self._reset()
        rows, section = self._examples(task), self._section
        if not rows:
            return 0
        model, config = self.parts.model, self._config
        own = config.optimizer.model_copy(update={"lr": section.lr})
        factors = learning_rate_factors(config.adapter, model)
        optimizer = build_optimizer(own, model, factors, dtype_of(config.precision.activations))
        order, begin, steps = cycle(rows), time.monotonic(), 0
        while steps < section.steps and time.monotonic() - begin < section.seconds:
            batch = as_batch(list(islice(order, section.batch_size))).to(self.parts.device)
            with autocast(config.precision, self.parts.device):
                loss = language_modeling(model, batch, config.stage.objective.chunk_tokens)
            (loss / batch.num_scored()).backward()
            update(optimizer, clip_gradients(model, config.optimizer.clip_norm))
            optimizer.zero_grad()
            steps += 1
        return steps

    def _reset(self) -> None:
        with torch.no_grad():
            for name, one in self.parts.model.named_parameters():
                if name in self._start:
                    one.copy_(self._start[name])

    def _examples(self, task: GridTask) -> list[Example]:
        """Each pair after all others, in all variants, in a seeded order; without what the model has no room for."""
        augment, place = self._section.augment, Place(self._config.data.source, 0)
        shown = [one.of_task(part) for part in leave_one_out(task) for one in variants(part, augment)]
        found = examples(shown, self._formatter, self.parts.tokenizer, place)
        found = [one for one in found if len(one.tokens) <= self._config.model.max_sequence_length]
        random.Random(augment.seed).shuffle(found)
        return found


def _trainable_copy(config: RunConfig, model: Model) -> Model:
    """A copy of the model in evaluation mode, which leaves dropout out, with a new adapter or all weights trainable."""
    copied = copy.deepcopy(model).eval()
    section = config.adapter
    if not section.freezes:
        copied.requires_grad_(True)
        return copied
    from pretune.adapters.attach import attach

    plain = {"init": "zero", "train_embeddings": "none"}
    fields = type(section).model_fields
    assert isinstance(copied, nn.Module)
    attach(copied, section.model_copy(update={key: plain[key] for key in plain if key in fields}), config.seed)
    return copied


def steps_of(steps: Sequence[int]) -> float:
    """The mean number of steps of a task."""
    return sum(steps) / len(steps) if steps else 0.0
