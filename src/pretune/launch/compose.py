"""Compose a run file and overrides into one mapping, with Hydra."""

from __future__ import annotations

import os
import tempfile
import warnings
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
from pretune.launch.overrides import quoted
from pretune.launch.user_files import check

QUIET = (
    f"hydra.searchpath=[{quoted(f'file://{CONFIGS}')}]",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.dir='${home:${output_dir}}/.sweeps'",
    "hydra.sweep.subdir=.",
)
"""Overrides that tell Hydra where our groups are and stop it from writing its own folders and logs."""

OmegaConf.register_new_resolver("home", os.path.expanduser)


@contextmanager
def hydra_for(file: Path, overrides: Sequence[str]) -> Iterator[str]:
    """Initialize Hydra for composing `file`, and yield the config name to compose; errors from Hydra and YAML become
    ConfigError."""
    check(file)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            # Without _self_ in a defaults list, a file's own keys come last, which is what everybody expects.
            warnings.filterwarnings("ignore", "(?s).*Defaults list is missing `_self_`")
            source = _with_defaults(file, overrides, Path(folder))
            with initialize_config_dir(str(source.parent), job_name="pretune", version_base="1.3"):
                yield source.stem
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(explain(error, file)) from None
    except RecursionError:
        hint = "your file must not have the same name as one of Pretune's that it includes (base.yaml)"
        raise ConfigError(f"{file.name}: its defaults list includes itself; {hint}") from None


@contextmanager
def composed(file: Path, overrides: Sequence[str]) -> Iterator[DictConfig]:
    """The composed configuration, with unresolved interpolations."""
    with hydra_for(file, overrides) as name:
        try:
            config = compose(name, [*QUIET, *overrides])
        except (TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            # Hydra lets through what it trips over, such as an empty key, or a word in place of an index.
            raise ConfigError(
                f"cannot compose {' '.join([file.name, *overrides])}: {' '.join(str(error).split())}"
            ) from None
        yield config


def shown(file: Path, overrides: Sequence[str], resolve: bool) -> str:
    """The composed configuration as YAML."""
    with composed(file, overrides) as config:
        return OmegaConf.to_yaml(config, resolve=resolve).rstrip("\n")


def plain(config: DictConfig, file: Path) -> dict[str, Any]:
    """A composed configuration as a plain mapping; ConfigError for a key without a value (???)."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(f"{file.name} leaves {', '.join(missing)} open (???); set it: {missing[0]}=VALUE")
    mapping = OmegaConf.to_container(config, resolve=True)
    assert isinstance(mapping, dict)
    return {str(key): value for key, value in mapping.items()}


def _with_defaults(file: Path, overrides: Sequence[str], folder: Path) -> Path:
    """`file`; or, if it has no defaults list (a run's own config.yaml), a copy in `folder` with one, because Hydra can
    only override groups that are in a defaults list."""
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
