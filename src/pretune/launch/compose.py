"""A run file and overrides, composed by Hydra into one mapping."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pretune.core.config import ConfigError
from pretune.launch.explain import explain
from pretune.launch.groups import CONFIGS, is_group, options

QUIET = (
    f"hydra.searchpath=['file://{CONFIGS}']",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.dir=${output_dir}/.sweeps",
    "hydra.sweep.subdir=.",
)
"""Overrides that let Hydra find our groups and keep it from writing folders and logs of its own."""


@contextmanager
def hydra_for(file: Path, overrides: Sequence[str]) -> Iterator[str]:
    """Hydra, ready to compose `file`, whose name for it is given; what it and YAML complain of becomes ConfigError."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = _with_defaults(file, overrides, Path(folder))
            with initialize_config_dir(str(source.parent), job_name="pretune", version_base="1.3"):
                yield source.stem
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(explain(error, file)) from None
    except RecursionError:
        hint = "a file of your own must not be named like one of Pretune's that it includes (base.yaml)"
        raise ConfigError(f"{file.name}: its defaults list leads back to itself; {hint}") from None


@contextmanager
def composed(file: Path, overrides: Sequence[str]) -> Iterator[DictConfig]:
    """The composed configuration, interpolations still in it."""
    with hydra_for(file, overrides) as name:
        yield compose(name, [*QUIET, *overrides])


def shown(file: Path, overrides: Sequence[str], resolve: bool) -> str:
    """The composed configuration as YAML."""
    with composed(file, overrides) as config:
        return OmegaConf.to_yaml(config, resolve=resolve).rstrip("\n")


def plain(config: DictConfig, file: Path) -> dict[str, Any]:
    """A composed configuration as a plain mapping; ConfigError for a key that is still open (???)."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{file.name} leaves {', '.join(missing)} open (???); set it: {missing[0]}=VALUE")
    mapping = OmegaConf.to_container(config, resolve=True)
    assert isinstance(mapping, dict)
    return {str(key): value for key, value in mapping.items()}


def _with_defaults(file: Path, overrides: Sequence[str], folder: Path) -> Path:
    """`file`; or, where it has no defaults list (a run's own config.yaml), a copy in `folder` with one: Hydra exchanges
    only groups that such a list names."""
    words = (override.partition("=") for override in overrides)
    chosen = [name for name, _, option in words if option and is_group(name)]
    content: Any = OmegaConf.to_container(OmegaConf.load(file)) if chosen else None
    if not isinstance(content, dict) or "defaults" in content:
        return file
    for group in chosen:
        *outer, last = group.split("/")
        section: Any = content
        for key in outer:
            section = section.get(key, {}) if isinstance(section, dict) else {}
        section.pop(last, None)
    copy = folder / file.name
    defaults = [*({group: options(group)[0]} for group in chosen), "_self_"]
    OmegaConf.save({"defaults": defaults, **content}, copy)
    return copy
