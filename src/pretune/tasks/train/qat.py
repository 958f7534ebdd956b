"""What quantization-aware training (QAT) adds to the loop: delayed fake quantization, and metrics of three models.

`val/...` is the fake-quantized model, `val_float/...` the float weights that the checkpoint holds, `converted/...` what
exports convert that checkpoint to. The first and the last agree.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from pretune.core.config import ConfigError
from pretune.model.build import Model
from pretune.quantization.config import QatConfig
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, read_config
from pretune.run.model import converted_model
from pretune.run.parts import Parts
from pretune.run.weights import Start
from pretune.tasks.evaluate.task import Evaluator, validation_loss

TOLERANCE = 1e-3
"""Nats per token by which a converted model may differ: sums in another order round differently."""


def check_start(config: RunConfig, start: Start) -> None:
    """Raise ConfigError for QAT of weights that were already quantized to 4 bits."""
    if not isinstance(start, RunFolder) or not isinstance(config.quantization, QatConfig):
        return
    kind = read_config(start.config).get("quantization", {}).get("kind")
    if kind == "qlora_nf4":
        raise ConfigError(
            f"stage.init_from={config.stage.init_from}: that run's weights were already quantized to 4 bits "
            f"(quantization={kind}), and quantization={config.quantization.kind} would quantize them a second time, to "
            "other numbers; start from a run with full-precision weights"
        )


def start_fake_quantization(config: RunConfig, model: Model, progress: float) -> bool:
    """Enable fake quantization once the budget has reached `quantization.start`; True when that has just happened."""
    section = config.quantization
    if not isinstance(section, QatConfig):
        return False
    from pretune.quantization.fake_quantization import enable_fake_quantization

    due = progress >= section.start and not fake_quantized(config, model)
    if due:
        enable_fake_quantization(model, True)
    return due


def fake_quantized(config: RunConfig, model: Model) -> bool:
    """Whether the model computes fake-quantized now."""
    if not isinstance(config.quantization, QatConfig):
        return False
    from pretune.quantization.fake_quantization import fake_quantization_enabled

    return fake_quantization_enabled(model)


def as_deployed(config: RunConfig, model: Model) -> AbstractContextManager[None]:
    """A context in which the model computes as it will be deployed: fake-quantized, if it is trained for that."""
    return _fake_quantization(config, model, True)


def float_metrics(config: RunConfig, parts: Parts) -> dict[str, float]:
    """Validation metrics of the float weights, without those of problems; empty for runs without QAT."""
    if not isinstance(config.quantization, QatConfig):
        return {}
    answers = config.evaluation.answers.model_copy(update={"measure": False})
    section = config.evaluation.model_copy(update={"option_accuracy": False, "answers": answers})
    with _fake_quantization(config, parts.model, False):
        metrics = Evaluator(config.model_copy(update={"evaluation": section}), parts).metrics(parts.model)
    return {name.replace("/", "_float/", 1): metric for name, metric in metrics.items()}


def converted_metrics(
    config: RunConfig, parts: Parts, folder: RunFolder, say: Callable[[str], None]
) -> dict[str, float]:
    """The loss of the checkpoint in `folder` converted as for exports, in float32; empty for runs without QAT.

    `parts` has the model that the checkpoint was saved from. If the losses differ, `say` gets a warning.
    """
    if not isinstance(config.quantization, QatConfig):
        return {}
    # In 16 bits torchao would compute activation scales in 16 bits, which no device that runs the export does.
    config = config.model_copy(update={"precision": config.precision.model_copy(update={"compute": "float32"})})
    with as_deployed(config, parts.model):
        expected = validation_loss(config, parts)
    model = converted_model(config, folder, parts.device)
    loss = validation_loss(config, replace(parts, model=model))
    if not abs(loss - expected) <= TOLERANCE:
        say(
            f"warning: converted to integers, the model has a validation loss of {loss:.5f}, and {expected:.5f} as it "
            "was trained: do not use the export; this is a bug in Pretune, please report it"
        )
    return {"converted/loss": loss, "converted/difference": loss - expected}


def _fake_quantization(config: RunConfig, model: Model, enabled: bool) -> AbstractContextManager[None]:
    if not isinstance(config.quantization, QatConfig):
        return nullcontext()
    from pretune.quantization.fake_quantization import fake_quantization

    return fake_quantization(model, enabled)
