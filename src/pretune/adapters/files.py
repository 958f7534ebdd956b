"""Read and write adapters in peft's format: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pretune.adapters.attach import Patterns, inject
from pretune.adapters.layers import ADAPTER
from pretune.adapters.peft_settings import read_pattern, read_ranks
from pretune.adapters.quiet_peft import get_peft_model_state_dict, peft
from pretune.adapters.vocabulary import ROWS, TABLES, section_of, train_beside
from pretune.core.config import InputError
from pretune.core.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pretune.core.named_tensors import check_finite, copy_over, misfit

PREFIX = "base_model.model."
"""peft's prefix for the names of a model's layers."""
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
"""Keys of peft's configuration that may differ: tensor names already determine the targets, and the others do not
change what a saved adapter computes (except a PiSSA initialization, which is checked separately)."""


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters (not copies), by their names in peft's files."""
    tensors = get_peft_model_state_dict(model, model.state_dict(keep_vars=True), ADAPTER, save_embedding_layers=False)
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """The content of adapter_config.json, as a JSON-serializable mapping."""
    config: peft.PeftConfig = model.peft_config[ADAPTER]  # pyright: ignore
    content = {**config.to_dict(), **section_of(model), "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}


def load_adapter(folder: Path, model: nn.Module) -> None:
    """Load an adapter's weights into `model`, which must already have an adapter with the same configuration.

    Raises InputError if the folder holds no adapter, or one with another configuration or for another model.
    """
    check_adapter(folder, model)
    copy_over(_tensors(folder), adapter_tensors(model))


def check_adapter(folder: Path, model: nn.Module) -> None:
    """Raise InputError unless the adapter in `folder` matches the configuration and the base weights of `model`."""
    theirs, ours = _content(folder), json.loads(json.dumps(adapter_config(model)))
    pissa = (_is_pissa(theirs), _is_pissa(ours))
    differing = [key for key in ours if key not in _HARMLESS and key in theirs and theirs[key] != ours[key]]
    if differing or pissa[0] != pissa[1]:
        key = differing[0] if differing else "init_lora_weights"
        raise InputError(
            f"the adapter in {folder} has {key} = {theirs[key]}, but this run's adapter section has {ours.get(key)}; "
            "set it to the value that the adapter was trained with"
        )
    _check_base(folder, theirs, ours["revision"])
    _check_tensors(folder, _tensors(folder), model)


def attach_saved_adapter(folder: Path, model: nn.Module, base: str | None = None) -> None:
    """Attach the adapter in `folder`, of any kind, to a plain model; `attach.merge` can then merge it into the weights.

    `base` identifies the model's weights. Raises InputError if there is no adapter, or if it was made for another model
    or for other weights.
    """
    content = _content(folder)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        # peft would take every layer whose name ends so.
        for key in (ROWS, TABLES):
            setattr(config, key, None)
        inject(model, config, seed=0, base=base)
        train_beside(model, content)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"the adapter in {folder} was made for another model: {error}") from None
    _check_base(folder, content, base)
    tensors = _tensors(folder)
    _check_tensors(folder, tensors, model)
    copy_over(tensors, adapter_tensors(model))


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of the adapter in `folder`; InputError if there is none."""
    return _tensors(folder), _content(folder)


def patterns(folder: Path) -> Patterns:
    """The layers with a rank or alpha of their own, of the adapter in `folder`, by our names; InputError if there is
    none."""
    path, content = folder / ADAPTER_CONFIG, _content(folder)
    return Patterns(read_ranks(path, content), read_pattern(path, content, "alpha_pattern"))


def _content(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} holds no adapter: it has no {ADAPTER_CONFIG}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {folder / ADAPTER_CONFIG}: {error}") from None
    if not isinstance(content, dict) or "peft_type" not in content:
        raise InputError(f"{folder / ADAPTER_CONFIG} is not a peft configuration: it has no peft_type")
    return content


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / ADAPTER_WEIGHTS
    pickled = path.with_suffix(".bin")
    if pickled.is_file() and not path.is_file():
        raise InputError(
            f"{pickled} is a pickle, which may run code when it is read: load it with peft where you trust it, and "
            f"save_pretrained writes {path.name}"
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} ({error})") from None
    check_finite(tensors, path)
    return tensors


def _check_base(folder: Path, theirs: Mapping[str, Any], base: str | None) -> None:
    # peft itself leaves the field empty.
    if theirs.get("revision") not in (None, base):
        raise InputError(
            f"the adapter in {folder} was trained on other weights than this model has; set stage.init_from to the run "
            "that it was trained on (with its adapter on top, that run's weights would be others)"
        )


def _check_tensors(folder: Path, stored: Mapping[str, Tensor], model: nn.Module) -> None:
    if faults := misfit(stored, adapter_tensors(model), "has no place"):
        raise InputError(f"the adapter in {folder} was made for another model or other targets: {faults}")


def _is_pissa(content: Mapping[str, Any]) -> bool:
    return str(content.get("init_lora_weights")).startswith("pissa")
