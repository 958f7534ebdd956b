"""Estimate the memory of a run's training, part by part, with fake tensors before anything is allocated.

Without compilation, a step is run on fake tensors and its peak is recorded. With compilation, torch's own partitioner
says what is kept for the backward pass, for one and for two layers (each further layer costs as much as the second),
and the peak is computed from that. With activation checkpointing, each layer keeps only its input, plus what the
partitioner says for one layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pretune.adapters.config import NoAdapterConfig
from pretune.compute.compilation import RECOMPUTATION
from pretune.memory.dry_run import DryRun, shallow
from pretune.memory.frozen import Frozen
from pretune.memory.tracing import LiveMemory, saved_compiled, saved_eagerly
from pretune.model.build import Model
from pretune.model.config import GATED, ModelConfig
from pretune.model.long_rows import LONG
from pretune.model.transformers_model.config import TransformersConfig
from pretune.model.transformers_model.tracing import without_values
from pretune.optim.optimizers import build_optimizer
from pretune.quantization.config import QatConfig
from pretune.run.config import RunConfig
from pretune.run.model import training_model

CPU = torch.device("cpu")
SEVERAL_LAYERS = 24
"""Layers from which on the rest is not run, but counted as the last two: each of a hundred would take its time."""


class Footprint:
    """Bytes of a run's training step, for any micro-batch size. `kind`: the type of the device, as torch calls it."""

    def __init__(self, config: RunConfig, kind: str = "cpu") -> None:
        if isinstance(config.model, TransformersConfig):
            # The estimate of a compiled step takes our own layers apart. An uncompiled one needs more, not less.
            config = config.model_copy(update={"precision": config.precision.model_copy(update={"compile": False})})
        self.config, self.kind = config, kind
        self._dry_runs: dict[int, int] = {}
        self._traced: dict[int, tuple[int, int]] = {}
        with FakeTensorMode(), LiveMemory() as live:
            model = _fake(config)
            self.weights = live.now
            optimizer = build_optimizer(config.optimizer, model)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            before = live.now
            self.gradients = before - self.weights
            live.restart()
            with torch.compiler.set_stance("force_eager"):  # adamw_8bit compiles its update
                optimizer.step()
            self.optimizer = live.now - before
            self._update = live.peak - live.now
        # EMA keeps a float32 average of every trained weight: as many bytes as the gradients.
        self.averages = 0 if config.ema.decay is None else self.gradients
        self.frozen = Frozen.of(config)
        self.reference = self.frozen.weights(self.weights)

    def saved(self, size: int) -> int:
        """Bytes of activations kept for the backward pass of a micro-batch of `size` sequences."""
        outside, layer = self._layers(size)
        if self._checkpointed_and_compiled:
            layer = 4 * size * self.config.data.sequence_length * self.config.model.dim  # the residual stream, float32
        return outside + self.config.model.num_layers * layer

    def _layers(self, size: int) -> tuple[int, int]:
        """Bytes saved outside the layers, and in each layer."""
        model = self.config.model
        if size not in self._traced and isinstance(model, TransformersConfig):  # as a whole, whatever its layers are
            self._traced[size] = _saved(self.config, self.frozen, None, size, self.kind), 0
        elif size not in self._traced and isinstance(model, ModelConfig):
            # Every other layer has value embeddings, so two layers form the repeating unit.
            few, more = (2, 4) if model.value_embeddings else (1, 2)
            first, second = (_saved(self.config, self.frozen, layers, size, self.kind) for layers in (few, more))
            layer = (second - first) // (more - few)
            self._traced[size] = first - few * layer, layer
        return self._traced[size]

    @property
    def _checkpointed_and_compiled(self) -> bool:
        return self.config.precision.compile and self.config.precision.activation_checkpointing

    @property
    def constant(self) -> int:
        """Bytes that are always in use from the second micro-batch on: weights, their averages, gradients, optimizer
        state and the frozen model."""
        return self.weights + self.averages + self.gradients + self.optimizer + self.reference

    def peak(self, size: int) -> int:
        """Peak memory of a step with micro-batches of `size` sequences."""
        return max(self.peaks(size))

    def peaks(self, size: int) -> tuple[int, ...]:
        """Memory at the moments of a step of which one is the peak: in the passes of a micro-batch, and in the
        update."""
        always = self.weights + self.averages + self.optimizer + self.reference
        return tuple(always + sum(moment) for moment in self._moments(size))

    def parts(self, size: int) -> dict[str, int]:
        """The memory by part at the moment of a step when it is greatest."""
        gradients, activations, work = max(self._moments(size), key=sum)
        return {
            "weights": self.weights,
            **({"averaged weights": self.averages} if self.averages else {}),
            "gradients": gradients,
            "optimizer": self.optimizer,
            "activations": activations,
            **({("teacher" if self.frozen.teacher else "reference"): self.reference} if self.reference else {}),
            "logits and work space": work,
        }

    def _moments(self, size: int) -> Iterator[tuple[int, int, int]]:
        """Gradients, activations and work space at the moments of which one is the peak: in the passes of a
        micro-batch, and in the update."""
        before = self._gradients_before(size)
        if self.config.precision.compile:
            again = self._layers(size)[1] if self._checkpointed_and_compiled else 0  # one recomputed layer
            yield before, self.saved(size), _compiled_work_space(self.config, self.frozen, again, size)
            # 16-bit copies of the weights, for the matrix products
            copies = 0 if self.config.precision.activations == "float32" else self.gradients // 2
            yield before + self.gradients, 0, copies
        else:
            passes = self._dry_run(size) - self.weights - before + _dense_mask(self.config, size, self.kind)
            saved = min(self.saved(size), passes)
            yield before, saved, passes - saved
        yield self.gradients, 0, self._update
        yield before, 0, self.frozen.work(size)

    def _gradients_before(self, size: int) -> int:
        """Bytes of the gradients to which a micro-batch of `size` sequences adds its own; none if it is a whole step,
        whose gradients take the place of activations that are no longer needed."""
        return 0 if self.config.is_step(size) else self.gradients

    def largest(self, limit: int, num_sequences: int) -> int | None:
        """The largest micro-batch size that divides `num_sequences` and stays within `limit` bytes; None if even one
        sequence does not fit.

        Both the peak and what is saved are nearly linear in the size, so that two small sizes tell which of the others
        need an exact estimate, which takes seconds.
        """
        small = [size for size in range(1, math.isqrt(num_sequences) + 1) if num_sequences % size == 0]
        options = sorted({*small, *(num_sequences // size for size in small)})
        chunk = -(-self.config.stage.objective.chunk_tokens // self.config.data.sequence_length)
        # From one whole chunk of the loss on, whose logits are part of the peak whatever the size.
        high = min(max(2 * chunk, 16), num_sequences)
        low = max(high // 2, 1)
        saved = (self.saved(high) - self.saved(low)) / max(high - low, 1)
        # The optimizer's step may be the peak of small sizes, and then it does not grow, but what they save does.
        growth = max((self.peak(high) - self.peak(low)) / max(high - low, 1), saved)

        def fits(size: int) -> bool:
            more = size - high
            if more > 0 and self.peak(high) + more * growth < limit / 1.2:
                return True
            least = self.constant - self.gradients + self._gradients_before(size)
            if more > 0 and least + self.saved(high) + more * saved > limit * 1.2:
                return False
            return self.peak(size) <= limit

        return next((size for size in reversed(options) if fits(size)), None)

    def _dry_run(self, size: int) -> int:
        """Peak of weights, gradients, activations and temporaries in an eager micro-batch: in the second of a step,
        if it has more than one."""
        if size not in self._dry_runs:
            model = self.config.model
            if isinstance(model, ModelConfig) and model.num_layers > SEVERAL_LAYERS and not _in_one_block(self.config):
                # Two layers form the repeating unit: more of them only take as much again.
                few, more = (self._passes(shallow(self.config, SEVERAL_LAYERS - left), size) for left in (2, 0))
                self._dry_runs[size] = more + (more - few) * (model.num_layers - SEVERAL_LAYERS) // 2
            else:
                self._dry_runs[size] = self._passes(self.config, size)
        return self._dry_runs[size]

    def _passes(self, config: RunConfig, size: int) -> int:
        with FakeTensorMode(), LiveMemory() as live, _without_values(config):
            dry_run = DryRun(config, _fake(config), self.frozen, self.kind)
            batch = dry_run.batch(size)
            for _ in range(1 if config.is_step(size) else 2):
                live.restart()
                dry_run(batch).backward()
            return live.peak


def _fake(config: RunConfig) -> Model:
    """The model in its form for training, with fake tensors of the active FakeTensorMode."""
    model = training_model(config, torch.device("meta"))
    if isinstance(config.quantization, QatConfig):
        from pretune.quantization.fake_quantization import enable_fake_quantization

        enable_fake_quantization(model, True)  # count its memory even if it starts later in the run
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay one
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[parameter] = nn.Parameter(fake, parameter.requires_grad)
            module.register_parameter(name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)
    return model


def _without_values(config: RunConfig) -> AbstractContextManager[None]:
    """What passes of the run's model need on fake tensors."""
    return without_values() if isinstance(config.model, TransformersConfig) else nullcontext()


def _in_one_block(config: RunConfig) -> bool:
    """Whether blocks differ in what an adapter does to them."""
    adapter = config.adapter
    return not isinstance(adapter, NoAdapterConfig) and any(one.startswith("layers.") for one in adapter.targets)


def _saved(config: RunConfig, frozen: Frozen, num_layers: int | None, size: int, kind: str) -> int:
    """Bytes that a micro-batch keeps, of the whole model or of one with `num_layers`."""
    config = shallow(config, num_layers)
    with FakeTensorMode(), _without_values(config):
        dry_run = DryRun(config, _fake(config), frozen, kind)
        batch = dry_run.batch(size)
        if not config.precision.compile:
            return saved_eagerly(lambda: dry_run(batch), dry_run) + _dense_mask(config, size, kind)
        own = {**dict(dry_run.named_parameters()), **dict(dry_run.named_buffers())}
        tensors = {name: tensor for name, tensor in batch.items() if tensor is not None}

        def loss(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
            inputs = {name: tensors.get(name) for name in batch}
            result = torch.func.functional_call(dry_run, dict(own), (inputs,))
            assert isinstance(result, Tensor)
            return result

        recomputation = {} if config.precision.activation_checkpointing else RECOMPUTATION
        return saved_compiled(loss, own, tensors, recomputation)


def _dense_mask(config: RunConfig, size: int, kind: str) -> int:
    """Bytes of the mask of length squared that uncompiled code keeps on a GPU, and does without on a CPU."""
    model, length = config.model, config.data.sequence_length
    masked = isinstance(model, ModelConfig) and (config.data.packing.isolate or model.window is not None)
    return size * length**2 if kind == "cuda" and masked and length >= LONG else 0


def _compiled_work_space(config: RunConfig, frozen: Frozen, again: int, size: int) -> int:
    """Bytes beside everything saved, at the worse of two moments of a compiled micro-batch.

    In the last chunk of the loss, they are its logits, their gradient, and a product to be added to the head's
    gradient. At the start of the backward pass, they are gradients of the widest feed-forward activation and of the
    residual stream, and `again`, what is recomputed.
    """
    model, itemsize = config.model, 4 if config.precision.activations == "float32" else 2
    assert isinstance(model, ModelConfig)
    tokens, rows_of_head = size * config.data.sequence_length, model.padded_vocab_size
    chunk = min(tokens, config.stage.objective.chunk_tokens)
    # With an adapter, the head has a gradient only where rows of it are trained, or a product is added to it.
    beside = config.adapter.trained_embeddings(bool(config.data.tokenizer.add_tokens)) != "none"
    whole = not config.adapter.freezes or config.adapter.adapts_vocabulary or beside
    loss = itemsize * rows_of_head * (2 * chunk + model.dim * whole) + frozen.in_loss(tokens)
    widest = model.mlp_dim * (2 if model.activation in GATED else 1)
    start = again + tokens * (itemsize * widest + 4 * model.dim) + 4 * rows_of_head * model.dim * whole
    return max(loss, start)
