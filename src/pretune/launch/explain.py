"""Translate errors from Hydra, OmegaConf and YAML into one line that suggests the nearest existing name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from pretune.core.config import ConfigError, field_paths, nearest
from pretune.launch.groups import is_group, options


def explain(error: Exception, file: Path) -> str:
    """A readable message for an error raised while composing `file`."""
    text = str(error)
    if override := getattr(error, "override", None):
        return f"cannot read '{override}': {text.splitlines()[0]}; quote values that have brackets, commas or spaces"
    if (unknown := re.search(r"Could not override '([^']+)'", text)) and unknown[1] in _known_keys():
        cause = " ".join(str(error.__cause__ or "").split())
        return f"cannot override '{unknown[1]}' ({cause}); choose its option instead: GROUP=OPTION"
    if unknown and (new := _renamed().get(unknown[1])):
        return f"'{unknown[1]}' was renamed to '{new}'"
    if unknown:
        return f"unknown key '{unknown[1]}'{_nearest_key(unknown[1])}"
    if option := re.search(r"Could not find '([\w./]+)/([^'/]+)'", text):
        group, name = option.groups()
        if there := options(group):
            return f"{group} has no option '{name}'{nearest(name, there) or '.'} Options: {', '.join(there)}"
    if line := getattr(error, "problem_mark", None):
        return f"{line.name}, line {line.line + 1}: {getattr(error, 'problem', 'not valid YAML')}"
    return f"{file.name}: " + " ".join(text.split())


@contextmanager
def naming_origins(file: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Say of an unknown key if `file` sets it for the option of a group that an override has replaced."""
    try:
        yield
    except ConfigError as error:
        words = (override.partition("=")[0] for override in overrides)
        # data/source@data.validation.source fills the section after the @.
        chosen = [word.rpartition("@")[2].replace("/", ".") for word in words if is_group(word.partition("@")[0])]
        own = OmegaConf.load(file)

        def explained(unknown: re.Match[str]) -> str:
            key = unknown[1]
            section = next((section for section in chosen if key.startswith(f"{section}.")), None)
            if section is None or OmegaConf.select(own, key) is None:
                return unknown[0]
            return f"{unknown[0]}: {file.name} sets it, and the chosen option of {section} has no such key; add ~{key}"

        raise ConfigError(re.sub(r"unknown key '([\w.]+)'", explained, str(error))) from None


def _nearest_key(key: str) -> str:
    """`; did you mean ...?` for a dotted key: first by its last part among its siblings, then by the whole key."""
    known = _known_keys()
    parent, _, last = key.rpartition(".")
    siblings = {path.rpartition(".")[2]: path for path in known if path.rpartition(".")[0] == parent}
    near = nearest(last, siblings)
    return near.replace("'", f"'{parent}.", 1) if near and parent else near or nearest(key, known)


def _known_keys() -> list[str]:
    """Every key that a configuration may have."""
    from pretune.run.config import RunConfig

    return list(dict.fromkeys(path for path, _ in field_paths(RunConfig)))


def _renamed() -> Mapping[str, str]:
    from pretune.run.config import RunConfig

    return RunConfig.renamed
