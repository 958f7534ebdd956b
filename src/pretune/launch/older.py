"""A run's config.yaml that lacks keys: an older version wrote it, which did not have them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pretune.core.config import ConfigError, missing_keys
from pretune.core.terminal import warn
from pretune.launch.compose import composed
from pretune.launch.groups import CONFIGS, is_group, options
from pretune.launch.place import run_at


def completed(mapping: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """`mapping`, with the keys that it lacks where `file` is a run's own config.yaml; one line says which, and their
    values, which are those that every option of their group agrees on.

    Raises ConfigError for a key on whose value the options differ: it has to be given.
    """
    from pretune.run.config import RunConfig

    found: dict[str, Any] = json.loads(json.dumps(mapping))
    lacking = missing_keys(RunConfig, found) if run_at(file) is not None else []
    if not lacking:
        return found
    values = {key: list(_values(key, found)) for key in lacking}
    unknown = [key for key, shipped in values.items() if len(shipped) != 1]
    if unknown:
        raise ConfigError(
            f"{file} lacks {', '.join(unknown)}, of which its version of Pretune knew nothing or which somebody has "
            f"deleted; add {' '.join(f'++{key}=VALUE' for key in unknown)}"
        )
    for key, (value,) in values.items():
        *outer, last = key.split(".")
        section = found
        for name in outer:
            section = section[name]
        section[last] = value
    said = ", ".join(f"{key}={json.dumps(value)}" for key, (value,) in values.items())
    warn(f"note: {file} lacks {len(values)} keys of this version of Pretune; taken as {said}")
    return found


def _values(key: str, mapping: Mapping[str, Any]) -> Iterator[Any]:
    """The values, each once, that `key` has in the options of its group that are of the same kind as in `mapping`."""
    words = key.split(".")
    group = next((words[:n] for n in range(len(words) - 1, 0, -1) if is_group("/".join(words[:n]))), [])
    kind = f"{'.'.join(group)}.kind"
    ours = OmegaConf.select(OmegaConf.create(dict(mapping)), kind) if group else None
    overrides = [f"{'/'.join(group)}={option}" for option in options("/".join(group))] if group else [""]
    overrides = [override for override in overrides if override != "model=auto"]  # it has no values of its own
    seen = set()
    for config in map(_composed, overrides):
        value = OmegaConf.select(config, key, default="???")
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        if (group and ours != OmegaConf.select(config, kind)) or value == "???" or json.dumps(value) in seen:
            continue
        seen.add(json.dumps(value))
        yield value


@functools.cache
def _composed(override: str) -> DictConfig:
    """What ships with Pretune, with one option chosen ("": none). Kept, because Hydra takes its time and an old
    configuration lacks many keys of one group."""
    with composed(CONFIGS / "base.yaml", [override] if override else []) as config:
        return config
