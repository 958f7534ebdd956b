"""Rules between the sections of a run: one function per rule, which yields a message if the rule is broken.

Sections declare what they need or have (`needs_reference`, `has_options`, `starts_at_zero`...); no rule lists kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from pretune.adapters.config import AdapterConfig
from pretune.compute.config import FLOAT8_MULTIPLE, PrecisionConfig
from pretune.core.config import ConfigError
from pretune.data.config import DataConfig
from pretune.model.config import ModelConfig
from pretune.model.huggingface.fitting import family_of
from pretune.model.section import AnyModelConfig
from pretune.model.transformers_model.config import TransformersConfig
from pretune.objectives.config import ReferenceBase
from pretune.optim.config import OptimizerConfig
from pretune.parallel.config import ParallelConfig
from pretune.quantization.config import FakeQuantizationConfig, QatConfig, QuantizationConfig, misfit_of_groups
from pretune.run.sections import BatchConfig, EvaluationConfig, StageConfig
from pretune.run.sharding import shared_parameters_are_plain
from pretune.run.task_config import ExportConfig, GenerateConfig
from pretune.training.config import EarlyStoppingConfig


class Run(Protocol):
    """The part of a RunConfig that rules read."""

    @property
    def task(self) -> str: ...
    @property
    def model(self) -> AnyModelConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def stage(self) -> StageConfig: ...
    @property
    def adapter(self) -> AdapterConfig: ...
    @property
    def neftune_alpha(self) -> float | None: ...
    @property
    def quantization(self) -> QuantizationConfig: ...
    @property
    def precision(self) -> PrecisionConfig: ...
    @property
    def batch(self) -> BatchConfig: ...
    @property
    def evaluation(self) -> EvaluationConfig: ...
    @property
    def generate(self) -> GenerateConfig: ...
    @property
    def export(self) -> ExportConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def early_stopping(self) -> EarlyStoppingConfig: ...


def broken(run: Run) -> list[str]:
    """The messages of all rules that a run breaks.

    task=inspect puts other models in place of the configured one; where it trains them, their rules are checked.
    """
    if run.task == "inspect":
        return []
    return [message for rule in RULES for message in rule(run)]


def sequences_fit_the_model(run: Run) -> Iterator[str]:
    length, positions = run.data.sequence_length, run.model.max_sequence_length
    if length > positions:
        yield (
            f"data.sequence_length ({length}) exceeds the model's number of positions "
            f"(model.max_sequence_length = {positions}); lower the former or raise the latter"
        )


def steps_are_whole_micro_batches(run: Run) -> Iterator[str]:
    batch, length = run.batch, run.data.sequence_length
    micro, key = length * batch.micro_batch_size, "batch.tokens" if batch.warmup is None else "batch.warmup.start"
    if batch.smallest % micro:
        below, above = batch.smallest // micro * micro, -(-batch.smallest // micro) * micro
        yield (
            f"{key} ({batch.smallest}) is not a multiple of data.sequence_length * batch.micro_batch "
            f"({length} * {batch.micro_batch_size} = {micro}); the nearest are "
            + " and ".join(str(n) for n in (below, above) if n)
        )


def exports_have_the_features_of_the_model(run: Run) -> Iterator[str]:
    if not isinstance(run.model, ModelConfig) or run.model.architecture is None:
        return
    try:
        family_of(run.model)
    except ConfigError as error:
        yield str(error)


def an_inherited_tokenizer_has_a_run(run: Run) -> Iterator[str]:
    if run.data.tokenizer.kind == "inherited" and run.stage.init_from is None and not run.stage.objective.has_teacher:
        yield "data.tokenizer.kind = inherited needs stage.init_from to name the run or model to inherit from"


def an_adapter_has_trained_weights(run: Run) -> Iterator[str]:
    if run.adapter.freezes and run.stage.init_from is None:
        yield (
            f"adapter={run.adapter.kind} freezes the model's weights, so they must be trained already: set "
            "stage.init_from to a run or a model, or adapter=none"
        )


def early_stopping_needs_evaluations(run: Run) -> Iterator[str]:
    if run.early_stopping.patience is not None and run.evaluation.every is None:
        yield (
            "early_stopping.patience counts evaluations, but with evaluation.every=null there are none: set "
            "evaluation.every to a number of steps"
        )


def what_is_measured_is_in_the_data(run: Run) -> Iterator[str]:
    evaluation, format = run.evaluation, run.data.format
    if evaluation.option_accuracy and not format.has_options:
        yield (
            "evaluation.option_accuracy compares the likelihoods of options right after the prompt: it needs "
            "data.format.kind = multiple_choice, or mathqa with rationale none or after; or set it to false"
        )
    if evaluation.answers.measure and not format.has_answers:
        yield (
            "evaluation.answers.measure: generated answers can be checked only for data.format.kind = mathqa, gsm8k or "
            f"multiple_choice, not {format.kind}; set it to false"
        )
    if evaluation.arc is None:
        return
    if not format.has_tasks:
        yield f"evaluation=arc answers tasks of grids: it needs data.format.kind = arc, not {format.kind}"
    if evaluation.arc.train_each.steps and (run.task == "train" or run.quantization.kind != "none"):
        yield (
            "evaluation.arc.train_each trains a copy of the finished model: set it only for task=evaluate with "
            "quantization=none, or its steps to 0"
        )


def float8_multiplies_whole_matrices(run: Run) -> Iterator[str]:
    if run.precision.compute != "float8":
        if run.precision.emulate:
            yield "precision.emulate=true imitates hardware with 8-bit products; add precision=fp8, or set it to false"
        return
    if run.adapter.freezes:
        yield (
            f"precision=fp8 multiplies whole weight matrices in 8 bits and does not work with "
            f"adapter={run.adapter.kind}: use precision=bf16, or adapter=none"
        )
    length, size = run.data.sequence_length, run.batch.micro_batch_size
    if length * size % FLOAT8_MULTIPLE:
        yield (
            f"precision=fp8 needs micro-batches with a multiple of {FLOAT8_MULTIPLE} tokens, but {size} sequences of "
            f"{length} have {length * size}; set data.sequence_length to a multiple of {FLOAT8_MULTIPLE}"
        )
    if isinstance(run.quantization, QatConfig):
        yield "quantization=qat_int8_int4 and precision=fp8 round to different values: use precision=bf16"


def frozen_weights_have_an_adapter(run: Run) -> Iterator[str]:
    if not run.quantization.needs_adapter:
        return
    if not run.adapter.freezes:
        yield (
            f"quantization={run.quantization.kind} stores frozen weights in 4 bits, but full fine-tuning would have to "
            "train them: choose adapter=lora (dora, loha, lokr), or quantization=none"
        )
    if run.adapter.dropout and run.adapter.dropout_reads_weights:
        yield (
            f"adapter={run.adapter.kind} with dropout needs weights in full precision: set adapter.dropout=0.0 or "
            "quantization=none"
        )


def an_adapted_vocabulary_is_plain(run: Run) -> Iterator[str]:
    if not run.adapter.adapts_vocabulary:
        return
    if run.adapter.kind != "lora":
        yield f"adapter.targets = embedding and head need adapter=lora, not {run.adapter.kind}"
    if isinstance(run.quantization, QatConfig):
        yield (
            f"quantization={run.quantization.kind} rounds the embedding and the head in training, and adapters on them "
            "are not rounded: leave embedding and head out of adapter.targets"
        )


def rows_are_trained_beside_the_adapter(run: Run) -> Iterator[str]:
    adds = bool(run.data.tokenizer.add_tokens)
    trained = run.adapter.trained_embeddings(adds)
    if trained == "none":
        return
    if trained == "new_rows" and not adds:
        yield (
            "adapter.train_embeddings = new_rows, but data.tokenizer.add_tokens adds no tokens: list them there, or "
            "set train_embeddings to none or all"
        )
    if run.adapter.adapts_vocabulary:
        yield (
            f"adapter.train_embeddings = {trained} trains the values of the embedding and the head, which "
            "adapter.targets adapts as well: leave embedding and head out of the targets, or set train_embeddings=none"
        )
    if isinstance(run.quantization, QatConfig):
        yield (
            f"quantization={run.quantization.kind} rounds the embedding and the head in training, and rows that are "
            "trained beside an adapter are not rounded: set adapter.train_embeddings=none, or quantization=none"
        )


def integers_come_after_training_or_with_it(run: Run) -> Iterator[str]:
    section = run.quantization
    if not isinstance(section, FakeQuantizationConfig):
        return
    if run.task == "train" and not isinstance(section, QatConfig):
        yield (
            f"quantization={section.kind} is applied after training: train with quantization=none, then use "
            f"task=evaluate, generate or export with quantization={section.kind}; or train with "
            "quantization=qat_int8_int4"
        )
    if run.task == "train" and run.adapter.dropout:
        yield (
            "quantization=qat_int8_int4 rounds the sum of a weight and its adapter, but dropout keeps the two apart: "
            "set adapter.dropout=0.0"
        )
    if not isinstance(run.model, ModelConfig):
        return
    if (misfit := misfit_of_groups(section, run.model.matrix_inputs())) is not None:
        yield misfit


def preferences_have_pairs(run: Run) -> Iterator[str]:
    objective, format = run.stage.objective, run.data.format
    if objective.compares_pairs != format.has_pairs:
        yield (
            f"stage.objective.kind = {objective.kind} with data.format.kind = {format.kind}: stage=dpo needs "
            "data.format.kind = preference, such as data=ultrafeedback, and no other stage works with it"
        )


def a_reference_is_the_start(run: Run) -> Iterator[str]:
    objective = run.stage.objective
    if not isinstance(objective, ReferenceBase):
        return
    if run.model.dropout or run.neftune_alpha or run.adapter.dropout:
        yield (
            "noise would make the model differ randomly from its reference: for stage=dpo set model.dropout and "
            "adapter.dropout to 0 and neftune_alpha to null"
        )
    if objective.reference == "adapter_off" and not run.adapter.starts_at_zero:
        yield (
            "stage.objective.reference = adapter_off needs a new adapter that starts without an update (adapter.kind "
            "not none, adapter.init not pissa, adapter.init_from null); use model or cached"
        )


def a_model_of_transformers_has_less(run: Run) -> Iterator[str]:
    if not isinstance(run.model, TransformersConfig):
        return
    adds = bool(run.data.tokenizer.add_tokens)
    wanted = {
        f"quantization={run.quantization.kind}": isinstance(run.quantization, FakeQuantizationConfig),
        f"export.format={run.export.format}": run.export.format != "huggingface",
        f"generate.runtime={run.generate.runtime}": run.generate.runtime != "pretune",
        "adapter.targets = embedding and head": run.adapter.adapts_vocabulary,
        "adapter.train_embeddings": run.adapter.trained_embeddings(False) != "none",
        "data.tokenizer.add_tokens with an adapter": adds and run.adapter.freezes,
        "precision=fp8": run.precision.compute == "float8",
    }
    if refused := [key for key, is_set in wanted.items() if is_set]:
        yield (
            f"{', '.join(refused)} {'is' if len(refused) == 1 else 'are'} only for Pretune's own transformer, not for "
            f"model=transformers ({run.model.model_type})"
        )


RULES: tuple[Callable[[Run], Iterator[str]], ...] = (
    sequences_fit_the_model,
    steps_are_whole_micro_batches,
    exports_have_the_features_of_the_model,
    an_inherited_tokenizer_has_a_run,
    an_adapter_has_trained_weights,
    early_stopping_needs_evaluations,
    what_is_measured_is_in_the_data,
    float8_multiplies_whole_matrices,
    frozen_weights_have_an_adapter,
    an_adapted_vocabulary_is_plain,
    rows_are_trained_beside_the_adapter,
    integers_come_after_training_or_with_it,
    preferences_have_pairs,
    a_reference_is_the_start,
    a_model_of_transformers_has_less,
    shared_parameters_are_plain,
)
