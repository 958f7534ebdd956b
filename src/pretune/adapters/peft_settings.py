"""What the adapter_config.json of others says, each key accounted for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretune.adapters.config import LoraConfig, TrainedAdapterConfig
from pretune.adapters.quiet_peft import get_pattern_key
from pretune.core.config import InputError
from pretune.core.files import ADAPTER_CONFIG

MERGE = (
    "merge it with peft (merge_and_unload(), then save_pretrained) and start from the merged model, by stage.init_from"
)
_READ = frozenset(
    {
        *("peft_type", "r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("decompose_factor", "init_lora_weights", "init_weights", "base_model_name_or_path", "revision"),
        "ensure_weight_tying",
    }
)
_HARMLESS = frozenset(
    {
        # The names of the tensors say which layers have an adapter, and their shapes are the same either way.
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        # For training, or for other libraries and devices.
        *("lora_dropout", "rank_dropout", "rank_dropout_scale", "module_dropout", "inference_mode", "runtime_config"),
        *("peft_version", "task_type", "auto_mapping", "megatron_config", "megatron_core", "use_effective_conv2d"),
        # Of an initialization, and of a variant that a key of its own switches on.
        *("eva_config", "qalora_group_size"),
    }
)
"""Keys that do not change what a saved adapter computes."""
_KINDS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
_INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal", "eva", "lycoris")
"""Those that leave the weights of the base as they are."""


@dataclass(frozen=True)
class PeftSettings:
    """The settings of a saved adapter, under the names of our adapter section."""

    kind: str
    rank: int
    alpha: float
    rslora: bool
    factor: int | None
    ranks: Mapping[str, int]
    """Ranks of layers that have another one, by the regular expressions of peft's rank_pattern."""
    alphas: Mapping[str, float]
    base: str | None
    """The model that it says it was trained on: a folder, or `owner/name@revision` on the hub."""
    tied: bool
    """Whether an update of a tied embedding counts in the head too."""

    def rank_of(self, layer: str) -> int:
        return self.ranks.get(get_pattern_key(list(self.ranks), layer), self.rank)

    def alpha_of(self, layer: str) -> float:
        return self.alphas.get(get_pattern_key(list(self.alphas), layer), self.alpha)

    def scale(self, alpha: float, rank: int) -> float:
        """What an update is multiplied by."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def differences(self, section: TrainedAdapterConfig) -> dict[str, str]:
        """The keys that `section` must have other values for to describe this adapter, targets aside, as on the command
        line."""
        wanted: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha}
        if self.kind in ("lora", "dora"):
            wanted["rslora"] = self.rslora
        if self.kind == "lokr":
            wanted["factor"] = self.factor
        same = section.kind == self.kind
        found = {
            f"adapter.{key}": _yaml(one) for key, one in wanted.items() if not same or getattr(section, key) != one
        }
        if not same:
            return {"adapter": self.kind, **found}
        if isinstance(section, LoraConfig) and section.init in ("pissa", "orthogonal"):
            found["adapter.init"] = "zero"  # pissa would change the weights below it, and orthogonal refuse odd ranks
        return found


def peft_settings(folder: Path, content: Mapping[str, Any]) -> PeftSettings:
    """The settings in `content`, the adapter_config.json of `folder`.

    Raises InputError, naming the key, for what is of another type, for what we cannot compute, and for a key that we do
    not know.
    """
    path = folder / ADAPTER_CONFIG
    kind = _KINDS.get(str(content["peft_type"]).upper())
    if kind is None:
        raise InputError(f"{path}: peft_type = {content['peft_type']} is none of lora, dora, loha and lokr: {MERGE}")
    _refuse_unknown(path, content)
    for key in ("init_lora_weights", "init_weights"):
        start = content.get(key)
        if start not in _INITIALIZATIONS:
            raise InputError(
                f"{path}: {key} = {start} may have changed the weights below the adapter, which then fits no others: "
                f"{MERGE}, or save it as plain LoRA (path_initial_model_for_weight_conversion)"
            )
    name = "lora_alpha" if kind == "lora" else "alpha"
    factor = _number(path, "decompose_factor", content.get("decompose_factor", -1), whole=True)
    base, revision = content.get("base_model_name_or_path"), content.get("revision")
    return PeftSettings(
        kind="dora" if content.get("use_dora") else kind,
        rank=int(_number(path, "r", content.get("r"), whole=True, positive=True)),
        alpha=_number(path, name, content.get(name), positive=True),
        rslora=bool(content.get("use_rslora")),
        factor=None if factor == -1 else int(factor),
        ranks=read_ranks(path, content),
        alphas=read_pattern(path, content, "alpha_pattern"),
        base=f"{base}@{revision}" if base and revision else base or None,
        tied=bool(content.get("ensure_weight_tying")),
    )


def _refuse_unknown(path: Path, content: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if key not in _READ | _HARMLESS and value not in (None, False, "none") and value not in ([], {}, ""):
            raise InputError(
                f"{path}: {key} = {value} changes what the adapter computes, or is not known here: {MERGE}; remove the "
                "key if you know that it changes nothing"
            )


def read_ranks(path: Path, content: Mapping[str, Any]) -> dict[str, int]:
    """rank_pattern in `content`, which was read from `path`; InputError, naming it, unless it is one."""
    return {name: int(one) for name, one in read_pattern(path, content, "rank_pattern", whole=True).items()}


def read_pattern(path: Path, content: Mapping[str, Any], key: str, whole: bool = False) -> dict[str, float]:
    """Positive numbers by regular expressions for names of layers, in the same way; whole: no fractions."""
    pattern = content.get(key) or {}
    if not isinstance(pattern, dict):
        raise InputError(f"{path}: {key} = {pattern} must be an object")
    for name in pattern:
        try:
            re.compile(name)
        except re.error as error:
            raise InputError(f"{path}: {key}: '{name}' is no regular expression ({error})") from None
    return {name: _number(path, f"{key}['{name}']", one, whole, positive=True) for name, one in pattern.items()}


def _number(path: Path, key: str, value: Any, whole: bool = False, positive: bool = False) -> float:
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not fits or not math.isfinite(value) or (positive and value <= 0):
        words = f"a {'positive ' if positive else ''}{'whole ' if whole else ''}number"
        raise InputError(f"{path}: {key} = {value} must be {words}")
    return value


def _yaml(value: float | bool | None) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.12g}"
