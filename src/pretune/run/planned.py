"""The precision of a run on a device that need not be here."""

from __future__ import annotations

from pretune.compute.devices import Device
from pretune.run.config import RunConfig
from pretune.run.precision import resolved_config
from pretune.run.tokenizer import with_added_tokens
from pretune.run.weights import own_folder


def planned_precision(config: RunConfig, device: Device | None) -> RunConfig:
    """The configuration with the precision chosen for `device`, or for this machine's where it is None."""
    if device is None:
        return resolved_config(config, own_folder(config))
    config = with_added_tokens(config)
    if config.precision.compute != "auto":
        return config
    compute = "bfloat16" if device.has_bfloat16 else "float16"
    return config.model_copy(update={"precision": config.precision.model_copy(update={"compute": compute})})
