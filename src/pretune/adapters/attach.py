"""Attach an adapter to a model, inspect it, disable it and merge it. The model keeps its class; its linear layers
change theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, assert_never

import torch
from torch import Tensor, nn

from pretune.adapters.config import (
    VOCABULARY,
    AdapterConfig,
    DoraConfig,
    LohaConfig,
    LokrConfig,
    LoraConfig,
    NoAdapterConfig,
    TrainedAdapterConfig,
)
from pretune.adapters.layers import ADAPTER, use_fast_layers
from pretune.adapters.quiet_peft import BaseTunerLayer, TrainableTokensLayer, peft
from pretune.adapters.vocabulary import ROWS, TABLES, beside, train_beside, use_whole_tables
from pretune.core.config import ConfigError, InputError, nearest
from pretune.core.named_tensors import name_in_block, whole_tensors
from pretune.core.quiet import quiet

_ROLES = {"attention": ("attention", "attn"), "mlp": ("mlp", "feed_forward", "ffn", "fc1", "fc2", "moe", "experts")}
"""Parts of the names of layers by role, in our transformer and in those of transformers."""
_NO_ROLE = ("value_gate", "dt_proj")
"""Layers that roles skip; their names still select them. value_gate has one row per head, and an adapter would be
larger; of dt_proj, Mamba reads the weight alone, without the layer that an adapter changes."""


class Patterns(NamedTuple):
    """Layers with a rank or alpha of their own, by name or by peft's regular expressions."""

    ranks: Mapping[str, int] = {}
    alphas: Mapping[str, float] = {}


def attach(
    model: nn.Module,
    config: AdapterConfig,
    seed: int,
    base: str | None = None,
    patterns: Patterns | None = None,
    new_tokens: Sequence[int] = (),
) -> None:
    """Freeze `model` and attach the adapter that `config` describes; do nothing for kind = none.

    Load the initial weights before, and compile and build the optimizer after. The same seed gives the same adapter.
    `base` identifies the initial weights: an adapter fits no others. `new_tokens`: the ids that the run adds, whose
    rows are trained beside the adapter, see AdapterBase.train_embeddings.
    Raises ConfigError, listing the available layers, for a target that matches nothing; and for new rows where no token
    is new.
    """
    if not isinstance(config, NoAdapterConfig):
        section = _peft_config(config, target_names(model, config.targets))
        if patterns is not None:
            section.rank_pattern, section.alpha_pattern = dict(patterns.ranks), dict(patterns.alphas)
        inject(model, section, seed, base)
        tables = [name for name in VOCABULARY if getattr(model, name, None) is not None]
        match config.trained_embeddings(bool(new_tokens)):
            case "all":
                train_beside(model, {TABLES: tables})
            case "new_rows" if not new_tokens:
                raise ConfigError(
                    "adapter.train_embeddings = new_rows, but the tokenizer has all tokens of the chat template "
                    "already, so that none is new: set it to none or all"
                )
            case "new_rows":
                train_beside(model, {ROWS: dict.fromkeys(tables, new_tokens)})


def inject(model: nn.Module, config: peft.PeftConfig, seed: int, base: str | None) -> None:
    """Attach an adapter to `model` from peft's own configuration; ValueError if that matches no layer."""
    assert not adapted_layers(model), "a model has one adapter"
    # peft's field for the version of the base model: it records which weights a saved adapter was trained on.
    config.revision = base
    with torch.random.fork_rng(devices=[]), quiet():  # peft's warnings are about arguments that we do not pass
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, ADAPTER)
    use_fast_layers(model)
    use_whole_tables(model)


def target_names(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Names, or name suffixes, of the layers that `targets` selects; ConfigError for a target without a match."""
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    layers = {name: end for name in linear if (end := name_in_block(name)) is not None}
    found: set[str] = set()
    for target in targets:
        if target == "all" or target in _ROLES:
            matched = {end for end in layers.values() if _has_role(end, target)}
        elif target in VOCABULARY and hasattr(model, "embedding"):
            # A tied head is the embedding: adapted once, for both.
            matched = {target if getattr(model, target, None) is not None else "embedding"}
        else:
            matched = {target} if any(f".{name}".endswith(f".{target}") for name in layers) else set()
        if not matched:
            ends = sorted(set(layers.values()))
            first = next((name for name, end in layers.items() if ends and end == ends[0]), "...")
            raise ConfigError(
                f"adapter.targets: '{target}' matches no linear layer{nearest(target, [*_ROLES, 'all', *ends])}; use "
                f"the roles attention, mlp and all, or the layers {', '.join(ends)} (in one block: {first})"
            )
        found |= matched
    return sorted(found)


def _has_role(end: str, role: str) -> bool:
    """Whether a layer, by its name within a block, is one of a role (`all`: of any)."""
    words = _ROLES.get(role)
    if end.endswith(_NO_ROLE):
        return False
    return words is None or any(word in part for part in end.split(".") for word in words)


def selected_layers(model: nn.Module, targets: tuple[str, ...]) -> set[str]:
    """Names of the layers that `targets` selects; ConfigError for a target without a match."""
    ends = target_names(model, targets)
    return {name for name, _ in model.named_modules() if any(f".{name}".endswith(f".{end}") for end in ends)}


def targets_of(model: nn.Module, names: set[str]) -> list[str]:
    """A short list of targets that selects the layers called `names`."""
    found, rest = [], set(names)
    suffixes = {end for name in names if (end := name_in_block(name)) is not None}
    for target in (*("all", *_ROLES), *sorted(suffixes)):
        with contextlib.suppress(ConfigError):  # a role without layers
            selected = selected_layers(model, (target,))
            if selected <= rest:
                found.append(target)
                rest -= selected
    return [*found, *sorted(rest)]


def adapted_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers that have an adapter, by name; what is trained beside it has none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name: module for name, module in found.items() if not isinstance(module, TrainableTokensLayer)}


def learning_rate_factors(model: nn.Module, config: AdapterConfig) -> dict[str, float]:
    """Learning-rate factors by parameter name; 1 for parameters that are not listed."""
    if not isinstance(config, LoraConfig | DoraConfig) or config.lr_ratio == 1:
        return {}
    return {name: config.lr_ratio for name, _ in model.named_parameters() if ".lora_B." in name}


def check_gradients(model: nn.Module) -> None:
    """Raise ConfigError if an adapter got no gradient: it would never be trained.

    Call it once, after the first backward pass over a batch with scored tokens.
    """
    layers = adapted_layers(model)
    idle = [name for name in layers if not any(map(_has_gradient, model.get_submodule(name).parameters()))]
    if idle:
        raise ConfigError(
            f"{len(idle)} of {len(layers)} adapters got no gradient in the first step, such as that of {idle[0]}: they "
            "would never be trained. Leave them out of adapter.targets, or check whether the initial weights "
            "(stage.init_from) have layers of zeros"
        )


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Disable the adapter, and what is trained beside it, for the duration of the block: a reference model without a
    second copy.

    With PiSSA this is not the initial model, because part of its weights is in the adapter.
    """
    layers = [*adapted_layers(model).values(), *beside(model).values()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge(model: nn.Module) -> None:
    """Merge the adapter, and what was trained beside it, into the weights: afterwards the model is plain and all its
    parameters are trainable.

    Raises InputError if the merged weights are not finite.
    """
    for name, layer in adapted_layers(model).items():
        try:
            layer.merge(safe_merge=True)
        except ValueError:
            raise InputError(f"the adapter of {name} has values that are not finite: it cannot be merged") from None
        model.set_submodule(name, layer.get_base_layer())
    for name, layer in beside(model).items():
        try:
            setattr(model, name, layer.merge())
        except ValueError:
            raise InputError(f"the trained rows of the {name} have values that are not finite: merge no such") from None
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)


def _peft_config(
    config: TrainedAdapterConfig, targets: list[str]
) -> peft.LoraConfig | peft.LoHaConfig | peft.LoKrConfig:
    match config:
        case LoraConfig() | DoraConfig():
            return peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # declared int, but any number works
                lora_dropout=config.dropout,
                use_rslora=config.rslora,
                use_dora=config.kind == "dora",
                init_lora_weights=True if config.init == "zero" else config.init,
                target_modules=targets,
            )
        case LohaConfig():
            return peft.LoHaConfig(
                r=config.rank,
                alpha=config.alpha,  # pyright: ignore[reportArgumentType]
                rank_dropout=config.dropout,
                target_modules=targets,
            )
        case LokrConfig():
            return peft.LoKrConfig(
                r=config.rank,
                alpha=config.alpha,  # pyright: ignore[reportArgumentType]
                rank_dropout=config.dropout,
                rank_dropout_scale=True,
                decompose_factor=config.factor or -1,
                target_modules=targets,
            )
        case _:
            assert_never(config)


def _has_gradient(parameter: Tensor) -> bool:
    if not parameter.requires_grad or parameter.grad is None:
        return False
    # Of a gradient that processes share out, a part may be zero, or empty.
    return bool(whole_tensors({"": parameter.grad.norm()})[""] > 0)
