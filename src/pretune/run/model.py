"""Build a run's model for training, evaluation or export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pretune.adapters.config import AdapterConfig
from pretune.checkpoint import store as checkpoint
from pretune.compute.compilation import checkpoint_activations
from pretune.compute.config import PrecisionConfig
from pretune.compute.precision import use_float8
from pretune.core.terminal import warn
from pretune.model.build import Model, new_model
from pretune.model.section import AnyModelConfig
from pretune.model.transformers_model.model import TransformersModel
from pretune.model.vocabulary import add_tokens
from pretune.quantization.config import FakeQuantizationConfig, QatConfig, QloraConfig, QuantizationConfig
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder
from pretune.run.given_adapter import given_folder, given_of_others
from pretune.run.tokenizer import new_tokens, planned_number
from pretune.run.weights import Start, load_start, own_folder, start_of
from pretune.training.neftune import add_embedding_noise


def training_model(config: RunConfig, device: torch.device, newest: Path | None = None) -> Model:
    """The model for training: build -> weights -> new tokens -> adapter -> NEFTune -> quantization. See
    adapted_model."""
    model = adapted_model(config, device, newest)
    quantize(config.quantization, model)
    return model


def adapted_model(config: RunConfig, device: torch.device, newest: Path | None = None) -> Model:
    """The model with its adapter, before quantization.

    The adapter comes before quantization: peft needs plain linear layers, an adapter that is initialized from the
    weights (PiSSA, DoRA) needs them unquantized, and only the weights that the adapter leaves frozen are quantized.
    `newest` is the run's own checkpoint, which the caller loads later: it has all weights, or only the adapter's, which
    must then have been trained on the same base weights (else InputError). On the meta device, tensors have no values.
    """
    if device.type == "meta":
        with device:
            model = new_model(config.model)
            attach_adapter(config, model, newest)
        return model
    model, base = without_values(config.model), None
    if newest is None or config.adapter.freezes:
        start, added = start_of(config), new_tokens(config)
        base = fill(config, model, start)
        if start is not None and added:
            add_tokens(model, config.model.vocab_size, added)
    model.to(device)
    attach_adapter(config, model, newest, base)
    # On what the adapter makes of the embedding.
    if config.neftune_alpha is not None:
        add_embedding_noise(model.embedded, config.neftune_alpha)
    return model


def merged_model(config: RunConfig, weights: Start | None, device: torch.device) -> Model:
    """A plain model with the weights of the run that `config` describes, its adapter merged, or with random weights for
    None."""
    model = without_values(config.model)
    fill(config, model, weights, config.stage.init_from)
    return model.to(device)


def without_values(config: AnyModelConfig) -> Model:
    """A model on the CPU whose weights have no values yet: each takes memory once it is filled, and torch's own initial
    values would be drawn for nothing."""
    with _NoInitialization():
        return new_model(config)


class _NoInitialization(TorchFunctionMode):
    """Within it, the functions of torch.nn.init leave tensors as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def fill(config: RunConfig, model: Model, weights: Start | None, init_from: str | None = None) -> str | None:
    """Load the weights of a run or of a model of others and return what identifies them; or, for None, random weights,
    which depend only on `seed`, on any device. `init_from`: see load_run."""
    loaded = None
    if weights is not None:
        loaded = load_start(model, weights, init_from)
    else:
        model.reset_parameters(torch.Generator().manual_seed(config.seed))
    if isinstance(model, TransformersModel) and (note := model.check()) is not None:
        warn(f"note: {note}")
    return loaded


def evaluation_model(config: RunConfig, run: RunFolder, device: torch.device) -> Model:
    """The model of a finished run for evaluation and generation. If `quantization` stores weights as integers, they are
    rounded to the corresponding values, and inputs are fake-quantized."""
    model = merged_model(config, run, device)
    if isinstance(config.quantization, FakeQuantizationConfig):
        from pretune.quantization.fake_quantization import prepare_qat, round_weights_in_place

        prepare_qat(model, config.quantization)
        round_weights_in_place(model)
    return model


def converted_model(config: RunConfig, run: RunFolder, device: torch.device) -> Model:
    """The model of a finished run for exports; if `quantization` stores weights as integers, with torchao's tensors."""
    model = merged_model(config, run, device).eval()
    if isinstance(config.quantization, FakeQuantizationConfig):
        from pretune.quantization.convert import convert

        convert(model, config.quantization)
    return model


def attach_adapter(config: RunConfig, model: Model, newest: Path | None, base: str | None = None) -> None:
    """Freeze the model and attach the run's adapter: a new one, or the one from adapter.init_from; nothing for none.

    `newest`: see adapted_model. `base` identifies the model's weights. On the meta device, adapter.init is ignored,
    because some initializations need values, and the run's own checkpoint, if any, is `newest`.
    """
    section, planned = config.adapter, model.head_weight.is_meta
    if section.kind == "none":
        return
    from pretune.adapters.attach import attach
    from pretune.adapters.files import check_adapter, load_adapter, patterns

    if planned:
        newest = newest or checkpoint.newest(own_folder(config).checkpoints)
        section = section.model_copy(update={"init": "zero"} if "init" in type(section).model_fields else {})
    theirs = None if newest else given_of_others(config, model)
    folder = newest or given_folder(config)
    own = None if folder is None else patterns(folder)
    added = _planned_tokens(config) if planned else new_tokens(config)
    attach(model, section, config.seed, base, own if theirs is None else theirs.patterns, added)
    if planned:
        return
    if newest is not None:
        check_adapter(newest, model)
    elif theirs is not None:
        theirs.load(model)
    elif folder is not None:
        load_adapter(folder, model)


def _planned_tokens(config: RunConfig) -> Sequence[int]:
    """As many ids as the run adds tokens, or nearly so: on the meta device, which ones does not matter."""
    size = config.model.vocab_size
    return range(size - planned_number(config.data.tokenizer.add_tokens), size)


def learning_rate_factors(config: AdapterConfig, model: Model) -> dict[str, float]:
    """Learning-rate factors by parameter name, for those that are not 1."""
    if not config.freezes:
        return {}
    from pretune.adapters.attach import learning_rate_factors

    return learning_rate_factors(model, config)


def quantize(config: QuantizationConfig, model: Model) -> None:
    """Apply `quantization` to a model for training, whose adapter must be attached: store frozen weights in 4 bits
    (QLoRA), or prepare fake quantization (QAT), on from the start or switched on later; or do nothing.

    Raises ConfigError for a layer that cannot be quantized.
    """
    if isinstance(config, QloraConfig):
        from pretune.quantization.nf4 import quantize

        quantize(model, config)
    elif isinstance(config, QatConfig):
        from pretune.quantization.fake_quantization import prepare_qat

        prepare_qat(model, config, enabled=config.start == 0)


def apply_precision(config: PrecisionConfig, model: Model) -> None:
    """Apply 8-bit matrix products and activation checkpointing to a model for training, if configured.

    Weights and adapter must be in place; compile and build the optimizer afterwards.
    """
    if config.compute == "float8":
        use_float8(model, config.emulate)
    if config.activation_checkpointing:
        checkpoint_activations(model.layers)


def stored_adapter(config: RunConfig, model: Model) -> checkpoint.Adapter | None:
    """What a checkpoint stores in place of the model's weights if the run trains an adapter, else None."""
    if not config.adapter.freezes:
        return None
    from pretune.adapters.files import adapter_config, adapter_tensors

    return checkpoint.Adapter(adapter_tensors(model), adapter_config(model))


def check_first_gradients(config: RunConfig, model: Model) -> None:
    """Raise ConfigError if an adapter got no gradient in the first step: it would never be trained."""
    if config.adapter.freezes:
        from pretune.adapters.attach import check_gradients

        check_gradients(model)
