"""A run's model: as it is trained, measured, or exported."""

from __future__ import annotations

from pathlib import Path

import torch

from pretune.adapters.config import AdapterConfig
from pretune.checkpoint import store as checkpoint
from pretune.compute.compilation import checkpoint_activations
from pretune.compute.config import PrecisionConfig
from pretune.compute.precision import use_float8
from pretune.core.files import ADAPTER_CONFIG
from pretune.model.transformer import Transformer
from pretune.quantization.config import FakeQuantizationConfig, QatConfig, QloraConfig, QuantizationConfig
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, find_run
from pretune.run.weights import chosen_checkpoint, load_run, start_run
from pretune.training.neftune import add_embedding_noise


def training_model(config: RunConfig, device: torch.device, newest: Path | None = None) -> Transformer:
    """The model as it is trained: build -> weights -> noise -> adapter -> quantization. See adapted_model."""
    model = adapted_model(config, device, newest)
    quantize(config.quantization, model)
    return model


def adapted_model(config: RunConfig, device: torch.device, newest: Path | None = None) -> Transformer:
    """The model with the adapter that is trained, before quantization.

    The adapter comes before quantization: peft finds plain linear layers, an adapter that starts from the weights
    (PiSSA, DoRA) sees them whole, and what is stored in few bits is what the adapter leaves frozen. `newest` is the
    run's own checkpoint, still to be loaded: it has all weights, or those of the adapter, in which case the run must
    have been trained beside these (InputError). On the meta device nothing has values.
    """
    if device.type == "meta":
        with device:
            model = Transformer(config.model)
            attach_adapter(config, model, newest)
        return model
    model = Transformer(config.model)
    if newest is None or config.adapter.freezes:
        fill(config, model, start_run(config))
    if config.neftune_alpha is not None:
        add_embedding_noise(model.embedding, config.neftune_alpha)
    model.to(device)
    attach_adapter(config, model, newest)
    return model


def merged_model(config: RunConfig, weights: RunFolder | None, device: torch.device) -> Transformer:
    """A model with the weights of a run, its adapter merged, or random ones for None; nothing else is done to it."""
    model = Transformer(config.model)
    fill(config, model, weights)
    return model.to(device)


def fill(config: RunConfig, model: Transformer, weights: RunFolder | None) -> None:
    """Put in the weights of a run, or random ones for None: these depend on `seed` alone, on any device."""
    if weights is None:
        model.reset_parameters(torch.Generator().manual_seed(config.seed))
    else:
        load_run(model, weights, config.output_dir)


def evaluation_model(config: RunConfig, run: RunFolder, device: torch.device) -> Transformer:
    """The model of a finished run for verbs that measure it or let it write: where `quantization` stores weights as
    integers, the numbers that these stand for, and inputs rounded as theirs will be."""
    model = merged_model(config, run, device)
    if isinstance(config.quantization, FakeQuantizationConfig):
        from pretune.quantization.fake_quantization import prepare_qat, round_weights_in_place

        prepare_qat(model, config.quantization)
        round_weights_in_place(model)
    return model


def converted_model(config: RunConfig, run: RunFolder, device: torch.device) -> Transformer:
    """The model of a finished run for exports: where `quantization` stores weights as integers, torchao's tensors."""
    model = merged_model(config, run, device).eval()
    if isinstance(config.quantization, FakeQuantizationConfig):
        from pretune.quantization.convert import convert

        convert(model, config.quantization)
    return model


def attach_adapter(config: RunConfig, model: Transformer, newest: Path | None) -> None:
    """Freeze the model and put the run's adapter on it: new, or the one of adapter.init_from; or do nothing for none.

    `newest`: see adapted_model. On the meta device it starts at zero, whatever adapter.init says: others take values.
    """
    section = config.adapter
    if section.kind == "none":
        return
    from pretune.adapters.attach import attach
    from pretune.adapters.files import check_adapter, load_adapter

    if model.head_weight.is_meta:
        start = {"init": "zero"} if "init" in type(section).model_fields else {}
        attach(model, section.model_copy(update=start), config.seed)
        return
    attach(model, section, config.seed)
    if newest is not None:
        check_adapter(newest, model)
    elif section.init_from is not None:
        folder = Path(section.init_from)
        if not (folder / ADAPTER_CONFIG).is_file():
            folder = chosen_checkpoint(find_run(section.init_from, config.output_dir))
        load_adapter(folder, model)


def learning_rate_factors(config: AdapterConfig, model: Transformer) -> dict[str, float]:
    """Factors of the learning rate by parameter's name, for those that are not 1."""
    if not config.freezes:
        return {}
    from pretune.adapters.attach import learning_rate_factors

    return learning_rate_factors(model, config)


def quantize(config: QuantizationConfig, model: Transformer) -> None:
    """What `quantization` does to a model in training, its adapter in place: store what is frozen in fewer bits, or
    round as its integers will one day (from the start of the budget, or switched on later); or nothing.

    Raises ConfigError for a layer that cannot be stored so.
    """
    if isinstance(config, QloraConfig):
        from pretune.quantization.nf4 import quantize

        quantize(model, config)
    elif isinstance(config, QatConfig):
        from pretune.quantization.fake_quantization import prepare_qat

        prepare_qat(model, config, enabled=config.start == 0)


def set_arithmetic(config: PrecisionConfig, model: Transformer) -> None:
    """How the model in training is to compute: in 8 bits, its activations checkpointed; or as it is.

    Weights and adapter must be in place; compilation and the optimizer come after.
    """
    if config.compute == "float8":
        use_float8(model)
    if config.activation_checkpointing:
        checkpoint_activations(model.layers)


def stored_adapter(config: RunConfig, model: Transformer) -> checkpoint.Adapter | None:
    """What a checkpoint holds in place of the model's weights, if the run trains an adapter."""
    if not config.adapter.freezes:
        return None
    from pretune.adapters.files import adapter_config, adapter_tensors

    return checkpoint.Adapter(adapter_tensors(model), adapter_config(model))


def check_first_gradients(config: RunConfig, model: Transformer) -> None:
    """ConfigError for an adapter that got no gradient in the first step: it would never be trained."""
    if config.adapter.freezes:
        from pretune.adapters.attach import check_gradients

        check_gradients(model)
