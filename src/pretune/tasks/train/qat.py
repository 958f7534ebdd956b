"""What quantization-aware training adds to the loop: rounding that begins later, and figures of three models.

The model that will be used rounds (`val/...`); the one that the checkpoint holds does not (`val_float/...`); and what
exports make of that checkpoint is converted to integers (`converted/...`). The first and the last are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from pretune.core.config import ConfigError
from pretune.model.transformer import Transformer
from pretune.quantization.config import QatConfig
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, read_config
from pretune.run.model import converted_model
from pretune.run.parts import Parts
from pretune.tasks.evaluate.task import evaluate, validation_loss

TOLERANCE = 1e-3
"""Nats per token by which a converted model may differ: products that are added up in another order round elsewhere."""


def check_start(config: RunConfig, start: RunFolder | None) -> None:
    """ConfigError for quantization-aware training of weights that were trained in 4 bits already."""
    if start is None or not isinstance(config.quantization, QatConfig):
        return
    kind = read_config(start.config).get("quantization", {}).get("kind")
    if kind == "qlora_nf4":
        raise ConfigError(
            f"stage.init_from={config.stage.init_from}: that run's weights were rounded to 4 bits already "
            f"(quantization={kind}), and quantization={config.quantization.kind} would round them a second time, to "
            "other numbers; start from a run whose weights have all their bits"
        )


def begins_to_round(config: RunConfig, model: Transformer, progress: float) -> bool:
    """Let the model round from now on, if the budget has come so far; whether that is new."""
    section = config.quantization
    if not isinstance(section, QatConfig):
        return False
    from pretune.quantization.fake import rounds, set_rounding

    due = progress >= section.start and not rounds(model)
    if due:
        set_rounding(model, True)
    return due


def as_used(config: RunConfig, model: Transformer) -> AbstractContextManager[None]:
    """The model as it will be used, rounded if it is trained for that, for as long as the block lasts."""
    return _rounding(config, model, True)


def unrounded_figures(config: RunConfig, parts: Parts) -> dict[str, float]:
    """Figures of the validation set, but for problems, of the weights with all their bits; none for other runs."""
    if not isinstance(config.quantization, QatConfig):
        return {}
    answers = config.evaluation.answers.model_copy(update={"measure": False})
    section = config.evaluation.model_copy(update={"option_accuracy": False, "answers": answers})
    with _rounding(config, parts.model, False):
        figures = evaluate(config.model_copy(update={"evaluation": section}), parts)
    return {name.replace("/", "_float/", 1): figure for name, figure in figures.items()}


def converted_figures(
    config: RunConfig, parts: Parts, folder: RunFolder, say: Callable[[str], None]
) -> dict[str, float]:
    """The loss of what exports make of the checkpoint in `folder`, in float32; none for runs that do not round.

    `parts` has the model that the checkpoint was made of. Where the two differ, `say` is told.
    """
    if not isinstance(config.quantization, QatConfig):
        return {}
    # In 16 bits torchao would find the scales of activations in 16 bits, which no device that runs the export does.
    config = config.model_copy(update={"precision": config.precision.model_copy(update={"compute": "float32"})})
    with as_used(config, parts.model):
        expected = validation_loss(config, parts)
    model = converted_model(config, folder, parts.device)
    loss = validation_loss(config, replace(parts, model=model))
    if not abs(loss - expected) <= TOLERANCE:
        say(
            f"warning: converted to integers, the model has a validation loss of {loss:.5f}, and {expected:.5f} as it "
            "was trained: do not use the export; this is a mistake in Pretune, please report it"
        )
    return {"converted/loss": loss, "converted/difference": loss - expected}


def _rounding(config: RunConfig, model: Transformer, rounding: bool) -> AbstractContextManager[None]:
    if not isinstance(config.quantization, QatConfig):
        return nullcontext()
    from pretune.quantization.fake import rounded

    return rounded(model, rounding)
