"""The parts of a run, put together in one visible order:

    tokenizer -> data -> model -> weights -> adapter -> quantization -> arithmetic -> optimizer -> compiled loss

What is done *to* the model from outside belongs into this file. The adapter comes before quantization: peft finds plain
linear layers, an adapter that starts from the weights (PiSSA, DoRA) sees them whole, and what is stored in few bits is
what the adapter leaves frozen. The loop builds the optimizer after both, so that it sees the parameters that are really
trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pretune.checkpoint import store as checkpoint
from pretune.compute.compilation import checkpoint_activations, compile_step, keep_freed_memory
from pretune.compute.device import pick_device
from pretune.compute.precision import autocast, use_float8
from pretune.core.batch import Batch
from pretune.core.config import ConfigError, InputError, validate
from pretune.data.config import FileTokenizer
from pretune.data.shards import Prepared, prepare
from pretune.data.tokenizer import Tokenizer, load_tokenizer
from pretune.model.costs import skeleton
from pretune.model.transformer import Transformer
from pretune.objectives.config import DPOConfig
from pretune.objectives.language_modeling import TokenScores, language_modeling, score_tokens
from pretune.objectives.preference import PairScores, dpo, num_pairs, score_pairs
from pretune.quantization.config import QatConfig, QloraConfig, RoundingConfig
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, cache_folder, find_run, read_config
from pretune.training.averaging import Averaged
from pretune.training.neftune import add_embedding_noise


@dataclass(frozen=True)
class Parts:
    """What every verb needs of a run."""

    device: torch.device
    tokenizer: Tokenizer
    data: Prepared
    model: Transformer
    reference: Reference | None = None
    """What preferences are measured against, where the data does not know it already."""


@dataclass(frozen=True)
class Reference:
    """A model that log-probabilities of pairs are compared with: `log_probs` of it [B, P, 2], within `mode`."""

    log_probs: Callable[[Batch], Tensor]
    mode: Callable[[], AbstractContextManager[None]]

    def fill(self, batch: Batch) -> Batch:
        """`batch` with its reference."""
        with torch.no_grad(), self.mode():
            return replace(batch, reference=self.log_probs(batch))


def assemble(config: RunConfig, weights: RunFolder | None) -> Parts:
    """All parts of a run, the model with the weights of the run `weights`, or random ones for None."""
    return _parts(config, partial(assemble_model, config, weights))


def assemble_measured(config: RunConfig, run: RunFolder) -> Parts:
    """All parts of a finished run, for verbs that measure it."""
    return _parts(config, partial(measured_model, config, run))


def _parts(config: RunConfig, model_on: Callable[[torch.device], Transformer]) -> Parts:
    device = pick_device(config.device)
    tokenizer = assemble_tokenizer(config)
    data = prepare(config.data, tokenizer, cache_folder())
    return Parts(device, tokenizer, data, model_on(device))


def assemble_tokenizer(config: RunConfig) -> Tokenizer:
    """The run's tokenizer: what it has saved; else, if inherited, that of the run it starts from; else by its section.

    Raises ConfigError where it has more tokens than the model's vocabulary.
    """
    section, folder = config.data.tokenizer, own_folder(config)
    if folder.tokenizer.is_dir():
        section = FileTokenizer(kind="file", path=str(folder.tokenizer), eos=None)
    elif section.kind == "inherited":
        start = start_run(config)
        assert start is not None  # RunConfig sees to it
        if not start.tokenizer.is_dir():
            raise InputError(f"{start.path} has no tokenizer folder; set data.tokenizer to what it was trained with")
        section = FileTokenizer(kind="file", path=str(start.tokenizer), eos=None)
    tokenizer = load_tokenizer(section, config.data, cache_folder())
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary only {config.model.vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size} or choose another tokenizer"
        )
    return tokenizer


def assemble_model(config: RunConfig, weights: RunFolder | None, device: torch.device) -> Transformer:
    """Build -> load weights -> noise in training -> device. Random weights depend on `seed` alone, on any device."""
    model = Transformer(config.model)
    if weights is None:
        model.reset_parameters(torch.Generator().manual_seed(config.seed))
    else:
        load_run(model, weights, config.output_dir)
    if config.embedding_noise is not None:
        add_embedding_noise(model.embedding, config.embedding_noise)
    return model.to(device)


def measured_model(config: RunConfig, run: RunFolder, device: torch.device) -> Transformer:
    """The model of a finished run for verbs that measure it or let it write: where `quantization` stores weights as
    integers, the numbers that these stand for, and inputs rounded as theirs will be."""
    model = assemble_model(config, run, device)
    if isinstance(config.quantization, RoundingConfig):
        from pretune.quantization.fake import prepare, settle

        prepare(model, config.quantization)
        settle(model)
    return model


def converted_model(config: RunConfig, run: RunFolder, device: torch.device) -> Transformer:
    """The model of a finished run for exports: where `quantization` stores weights as integers, torchao's tensors."""
    model = assemble_model(config, run, device).eval()
    if isinstance(config.quantization, RoundingConfig):
        from pretune.quantization.convert import convert

        convert(model, config.quantization)
    return model


def load_run(model: Transformer, run: RunFolder, output_dir: str) -> None:
    """Put a run's weights into `model`: of one with an adapter, those that it started from, and it merged in.

    Of a quantized run, the numbers that its 4 bits stand for, and its adapter merged into these.
    """
    path = chosen_checkpoint(run)
    if not (path / checkpoint.ADAPTER).is_file():
        checkpoint.load_weights(path, model)
        return
    from pretune.adapters.attach import merge
    from pretune.adapters.files import put_adapter

    checkpoint.check(path)
    settings = read_config(run.config)
    load_run(model, find_run(settings["stage"]["init_from"], output_dir), output_dir)
    put_adapter(path, model)
    if settings["quantization"]["kind"] == "qlora_nf4":
        from pretune.quantization.nf4 import dequantize, quantize

        # It was trained beside weights of 4 bits: merged into what these stand for, the model is the one of training.
        quantize(model, validate(QloraConfig, settings["quantization"]))
        dequantize(model)
    merge(model)


def chosen_checkpoint(run: RunFolder, use: str | int | None = None) -> Path:
    """The checkpoint whose weights are meant: the one that `run` names, else by `use`, else by the run's own
    checkpoint.use. InputError for a run that has none yet."""
    if run.checkpoint is not None:
        return run.checkpoint
    said = read_config(run.config).get("checkpoint", {}).get("use", "best") if use is None else use
    path = checkpoint.pick(run.checkpoints, said)
    if path is None:
        raise InputError(f"{run.path} has no checkpoint yet; let that run reach one first")
    return path


def measured_run(config: RunConfig) -> RunFolder:
    """The run that `config` names, with the checkpoint that its checkpoint.use means, for verbs that only read."""
    run = find_run(config.name, config.output_dir)
    return replace(run, checkpoint=chosen_checkpoint(run, config.checkpoint.use))


def attach_adapter(config: RunConfig, model: Transformer, newest: Path | None) -> dict[str, float]:
    """Freeze the model and put the run's adapter on it: new, or the one of adapter.init_from; or do nothing for none.

    `newest` is the run's own checkpoint, whose weights are still to be loaded: InputError unless it was trained beside
    these. Returns factors of the learning rate by parameter's name, for those that are not 1.
    """
    section = config.adapter
    if section.kind == "none":
        return {}
    from pretune.adapters.attach import attach, learning_rate_factors
    from pretune.adapters.files import check_adapter, load_adapter

    attach(model, section, config.seed)
    if newest is not None:
        check_adapter(newest, model)
    elif section.init_from is not None:
        folder = Path(section.init_from)
        if not (folder / checkpoint.ADAPTER_CONFIG).is_file():
            folder = chosen_checkpoint(find_run(section.init_from, config.output_dir))
        load_adapter(folder, model)
    return learning_rate_factors(model, section)


def trained_form(config: RunConfig) -> Transformer:
    """The model with the adapter that is trained, without values (on torch's meta device), for counting.

    What an adapter starts from is left out, as it takes values; so is quantization.
    """
    model = skeleton(config.model)
    if config.adapter.kind != "none":
        from pretune.adapters.attach import attach

        start = {"init": "zero"} if "init" in type(config.adapter).model_fields else {}
        with torch.device("meta"):
            attach(model, config.adapter.model_copy(update=start), config.seed)
    return model


def quantize(config: RunConfig, model: Transformer) -> None:
    """What `quantization` does to a model in training, its adapter in place: store what is frozen in fewer bits, or
    round as its integers will one day (from the start of the budget, or switched on later); or nothing.

    Raises ConfigError for a layer that cannot be stored so.
    """
    section = config.quantization
    if isinstance(section, QloraConfig):
        from pretune.quantization.nf4 import quantize

        quantize(model, section)
    elif isinstance(section, QatConfig):
        from pretune.quantization.fake import prepare

        prepare(model, section, rounding=section.start == 0)


def stored_adapter(config: RunConfig, model: Transformer) -> checkpoint.Adapter | None:
    """What a checkpoint holds in place of the model's weights, if the run trains an adapter."""
    if config.adapter.kind == "none":
        return None
    from pretune.adapters.files import adapter_config, adapter_tensors

    return checkpoint.Adapter(adapter_tensors(model), adapter_config(model))


def averaged(config: RunConfig, model: Transformer) -> Averaged[Transformer] | None:
    """Averages of what is trained of `model`, which is in its final form, if the run keeps any."""
    section = config.averaging
    return None if section.decay is None else Averaged(model, section.decay, section.warmup)


def check_first_gradients(config: RunConfig, model: Transformer) -> None:
    """ConfigError for an adapter that got no gradient in the first step: it would never be trained."""
    if config.adapter.kind != "none":
        from pretune.adapters.attach import check_gradients

        check_gradients(model)


def set_arithmetic(config: RunConfig, model: Transformer) -> None:
    """How the model in training is to compute: in 8 bits, its activations checkpointed; or as it is.

    Weights and adapter must be in place; compilation and the optimizer come after.
    """
    if config.precision.compute == "float8":
        use_float8(model)
    if config.precision.activation_checkpointing:
        checkpoint_activations(model.layers)


def own_folder(config: RunConfig) -> RunFolder:
    """The folder of the run that `config` describes, whether it exists yet or not."""
    return RunFolder(Path(config.output_dir) / config.name)


def start_run(config: RunConfig) -> RunFolder | None:
    """The run whose weights this one starts from, if it starts from one."""
    init_from = config.stage.init_from
    return None if init_from is None else find_run(init_from, config.output_dir)


def training_loss(config: RunConfig, parts: Parts) -> Callable[[Batch], dict[str, Tensor]]:
    """Sums over what a micro-batch scores, by name, compiled and in the run's precision; `loss` is to be minimised."""
    objective, reference = config.stage.objective, parts.reference

    def sums(batch: Batch) -> dict[str, Tensor]:
        if isinstance(objective, DPOConfig):
            return dpo(parts.model, batch, objective)
        return {"loss": language_modeling(parts.model, batch, objective.chunk_tokens)}

    if parts.device.type == "cpu":
        keep_freed_memory()
    compiled = sums
    if config.precision.compile:
        compiled = compile_step(sums, checkpointed=config.precision.activation_checkpointing)
        reference = reference and replace(reference, log_probs=compile_step(reference.log_probs))

    def in_precision(batch: Batch) -> dict[str, Tensor]:
        with autocast(config.precision, parts.device):
            batch = batch.to(parts.device)
            return compiled(batch if reference is None else reference.fill(batch))

    return in_precision


def num_scored(config: RunConfig, batch: Batch) -> int:
    """What the loss of a step is divided by: its scored tokens or, for preferences, its pairs."""
    return num_pairs(batch) if isinstance(config.stage.objective, DPOConfig) else batch.num_scored()


def scorer(config: RunConfig, parts: Parts) -> Callable[[Batch], TokenScores]:
    """Scores each position of a batch in evaluation mode and in the run's precision; nothing is compiled, because the
    shapes of validation batches vary."""
    chunk = config.stage.objective.chunk_tokens

    def score(batch: Batch) -> TokenScores:
        with _evaluating(parts.model), autocast(config.precision, parts.device):
            return score_tokens(parts.model, batch.to(parts.device), chunk)

    return score


def pair_scorer(config: RunConfig, parts: Parts) -> Callable[[Batch], PairScores]:
    """The same for the pairs of a batch."""
    objective, reference = config.stage.objective, parts.reference
    assert isinstance(objective, DPOConfig)

    def score(batch: Batch) -> PairScores:
        with _evaluating(parts.model), autocast(config.precision, parts.device):
            batch = batch.to(parts.device)
            return score_pairs(parts.model, batch if reference is None else reference.fill(batch), objective)

    return score


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
