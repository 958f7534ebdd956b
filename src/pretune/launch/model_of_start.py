"""model=auto: the model section is that of the weights that the run starts from."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from pretune.core.config import ConfigError
from pretune.core.terminal import warn
from pretune.launch.groups import CONFIGS
from pretune.run.folder import RunFolder, read_config
from pretune.run.pretrained import PretrainedModel
from pretune.run.weights import find_start, model_section

AUTO = "auto"
TRANSFORMERS: Literal["transformers"] = "transformers"


def with_model(config: DictConfig, name: str | None = None) -> DictConfig:
    """A composed configuration in which each key of the model section that is `auto` has the value of the model that
    the run starts from, or of nano where it starts from random weights. `name`: the run's, if not as configured.

    Where our transformer cannot hold the model of the start, it is one that transformers builds, and a line says why;
    with model=transformers it always is, with the start's config.json below what model.config says.

    A run that has started keeps its own. A model on the hub is downloaded (for task=plan, its config.json), and
    stage.init_from then says which commit it is. Raises InputError if the start is not there.
    """
    content = OmegaConf.to_container(config)
    kind = _kind(content)
    if kind is None and not _has_auto(content):
        return config
    init_from, task, configured, output_dir = (
        OmegaConf.select(config, key, throw_on_missing=False)
        for key in ("stage.init_from", "task", "name", "output_dir")
    )
    name = name or configured
    if not (isinstance(init_from, str) and isinstance(name, str) and isinstance(output_dir, str)):
        return _of_transformers(config, {}, "") if kind else filled(config, nano())
    run, start, pinned = RunFolder(Path(output_dir).expanduser() / name), {}, init_from
    if run.started():
        before = read_config(run.config)
        start, recorded = before.get("model", {}), before.get("stage", {}).get("init_from")
        if isinstance(recorded, str) and recorded.startswith(f"{init_from}@"):
            pinned = recorded
    elif task in _STARTING:
        began = find_start(str(Path(init_from).expanduser()), run.path.parent, task == "plan")
        start = model_section(began, kind)
        if isinstance(began, PretrainedModel):
            pinned = began.name
            if kind is None and start.get("kind") == TRANSFORMERS:
                warn(f"note: transformers computes this model, because our own transformer cannot: {began.obstacle()}")
    if kind or start.get("kind") == TRANSFORMERS:
        found = _of_transformers(config, start, init_from)
    else:
        found = filled(filled(config, start), nano())
    if pinned != init_from:
        found.stage.init_from = pinned
    return found


def filled(config: DictConfig, values: Mapping[str, Any]) -> DictConfig:
    """A composed configuration with `values` in place of what is `auto` in its model section."""
    found, content = config.copy(), OmegaConf.to_container(config)
    if isinstance(content, dict) and "model" in content:
        OmegaConf.set_struct(found, False)
        found.model = _filled(content["model"], values)
        OmegaConf.set_struct(found, True)
    return found


def _kind(content: Any) -> Literal["transformers"] | None:
    """`transformers` if a composed configuration asks for that by name."""
    model = content.get("model") if isinstance(content, dict) else None
    return TRANSFORMERS if isinstance(model, dict) and model.get("kind") == TRANSFORMERS else None


def _of_transformers(config: DictConfig, start: Mapping[str, Any], init_from: str) -> DictConfig:
    """A composed configuration with the model section of a start that transformers computes, and what is set in it.

    Raises ConfigError for keys of our own transformer, and for what transformers does not build.
    """
    found, given = config.copy(), OmegaConf.to_container(config.model)
    assert isinstance(given, dict)
    if start and start.get("kind") != TRANSFORMERS:
        raise ConfigError(
            f"model=transformers: {init_from} is a run of our own transformer, which goes on with model=auto; export "
            "it, and start from that folder"
        )
    ours = [] if given.get("kind") == TRANSFORMERS else sorted(_set_keys(given))
    if ours:
        raise ConfigError(
            f"model.{ours[0]} is a key of our own transformer, which cannot hold {init_from}: leave it out, or set "
            "what transformers calls it in model.config, with model=transformers"
        )
    OmegaConf.set_struct(found, False)
    content = {**start.get("config", {}), **given.get("config", {})}
    for sizes in (start, given):
        if isinstance(sizes.get("vocab_size"), int):
            content["vocab_size"] = sizes["vocab_size"]
    found.model = _section(content)
    OmegaConf.set_struct(found, True)
    return found


def _section(content: Mapping[str, Any]) -> dict[str, Any]:
    """The model section of a config.json; ConfigError where transformers does not take it."""
    from pretune.model.transformers_model.config import section_of

    try:
        return section_of(content)
    except ValueError as error:
        raise ConfigError(f"'model': {error}") from None


def _set_keys(content: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """The keys of a section that have a value of their own in place of `auto`."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _set_keys(value, f"{prefix}{key}.")
        elif value != AUTO:
            yield f"{prefix}{key}"


def _has_auto(content: Any, inside: bool = False) -> bool:
    """Whether a value in the model section of a composed configuration is `auto`."""
    if not inside:
        return isinstance(content, dict) and _has_auto(content.get("model"), True)
    return content == AUTO or (isinstance(content, dict) and any(_has_auto(one, True) for one in content.values()))


_STARTING = ("train", "prepare", "plan")
"""The tasks that do something for a run that has not started yet."""


@functools.cache
def nano() -> dict[str, Any]:
    """The keys of model=nano, read without Hydra, which cannot compose while it composes."""
    own, common = (OmegaConf.load(CONFIGS / "model" / file) for file in ("nano.yaml", "common/llama.yaml"))
    section = OmegaConf.to_container(OmegaConf.merge(common, own))
    assert isinstance(section, dict)
    return {str(key): value for key, value in section.items() if key != "defaults"}


def _filled(section: Any, values: Any) -> Any:
    """`section` with what `values` has in place of `auto`; what it does not have stays."""
    if not isinstance(section, Mapping) or not isinstance(values, Mapping):
        return section
    found = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            found[key] = _filled(value, values.get(key))
        else:
            found[key] = values[key] if value == AUTO and key in values else value
    return found
