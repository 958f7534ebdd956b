"""Adapters in peft's own format: adapter_model.safetensors and adapter_config.json, which peft loads by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pretune.adapters.attach import inject
from pretune.adapters.layers import ADAPTER
from pretune.adapters.quiet_peft import get_peft_model_state_dict, peft
from pretune.core.config import InputError
from pretune.core.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pretune.core.named_tensors import copy_over, misfit

PREFIX = "base_model.model."
"""What peft puts before the names of a model's layers."""
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "init_weights",
        "lora_dropout",
        "module_dropout",
        "peft_version",
        "rank_dropout",
        "rank_dropout_scale",
        "revision",
        "target_modules",
        "task_type",
        "use_effective_conv2d",
    }
)
"""Keys of peft's configuration that may differ: the tensors' names tell the targets, the rest does not change what a
saved adapter computes (the start is told apart further)."""


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters themselves, by the names that peft's files have."""
    tensors = get_peft_model_state_dict(model, model.state_dict(keep_vars=True), ADAPTER, save_embedding_layers=False)
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """The content of adapter_config.json, JSON-like."""
    config: peft.PeftConfig = model.peft_config[ADAPTER]  # pyright: ignore
    content = {**config.to_dict(), "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}


def load_adapter(folder: Path, model: nn.Module) -> None:
    """Put an adapter's weights into `model`, which has one of the same form on it.

    Raises InputError where the folder holds none, or one of another form, or one that was made for another model.
    """
    check_adapter(folder, model)
    copy_over(_tensors(folder), adapter_tensors(model))


def check_adapter(folder: Path, model: nn.Module) -> None:
    """Raise InputError unless the adapter in `folder` is of the form, and for the weights, that `model` has."""
    theirs, ours = _content(folder), json.loads(json.dumps(adapter_config(model)))
    pissa = (_is_pissa(theirs), _is_pissa(ours))
    differing = [key for key in ours if key not in _HARMLESS and key in theirs and theirs[key] != ours[key]]
    if differing or pissa[0] != pissa[1]:
        key = differing[0] if differing else "init_lora_weights"
        raise InputError(
            f"the adapter in {folder} has {key} = {theirs[key]}, this run's adapter section asks for {ours.get(key)}; "
            "set it to what the adapter was made with"
        )
    _check_base(folder, theirs, str(ours["revision"]))
    _check_tensors(folder, _tensors(folder), model)


def attach_saved_adapter(folder: Path, model: nn.Module) -> None:
    """Put the adapter in `folder` on a plain model, whatever its form; `attach.merge` then adds it to the weights.

    Raises InputError where there is none, or where it was made for another model.
    """
    content = _content(folder)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        inject(model, config, seed=0)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"the adapter in {folder} was made for another model: {error}") from None
    _check_base(folder, content, str(config.revision))
    tensors = _tensors(folder)
    _check_tensors(folder, tensors, model)
    copy_over(tensors, adapter_tensors(model))


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of the adapter in `folder`; InputError where there is none."""
    return _tensors(folder), _content(folder)


def _content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no adapter: it has no {ADAPTER_CONFIG}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {folder / ADAPTER_CONFIG}: {error}") from None
    if not isinstance(content, dict) or "peft_type" not in content:
        raise InputError(f"{folder / ADAPTER_CONFIG} is not peft's: it names no peft_type")
    return content


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {folder / ADAPTER_WEIGHTS} ({error})") from None


def _check_base(folder: Path, theirs: Mapping[str, Any], base: str) -> None:
    # peft itself leaves the field empty.
    if theirs.get("revision") not in (None, base):
        raise InputError(
            f"the adapter in {folder} was trained on other weights than those that it would be put on; set "
            "stage.init_from to what its run started from"
        )


def _check_tensors(folder: Path, stored: Mapping[str, Tensor], model: nn.Module) -> None:
    if faults := misfit(stored, adapter_tensors(model), "has no place"):
        raise InputError(f"the adapter in {folder} was made for another model or other targets: {faults}")


def _is_pissa(content: Mapping[str, Any]) -> bool:
    return str(content.get("init_lora_weights")).startswith("pissa")
