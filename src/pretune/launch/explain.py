"""Translate errors from Hydra, OmegaConf and YAML into one line that suggests the nearest existing name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pretune.core.config import field_paths, nearest
from pretune.launch.groups import options


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
