"""Check a user's YAML files before Hydra reads them: they set keys of Pretune, and can neither run code nor hang.

Hydra's own section starts programs (callbacks, launchers, logging with `_target_`), and a run's config.yaml is passed
around. On the command line, where the user types it, everything of Hydra's stays available.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pretune.core.config import ConfigError
from pretune.launch.groups import CONFIGS

MAX_NODES = 100_000
"""Values in a file once all aliases are expanded; the largest run file has about two hundred."""

_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")
}
_PACKAGE = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)
_START = "begin with `defaults: [/run/smoke, _self_]` and the keys to change"


def check(file: Path) -> None:
    """Raise ConfigError, with the line, for a file that is not a mapping of plain values or touches Hydra's section.

    Files beside it that its defaults list includes are checked too.
    """
    _check(file, set())


def _check(file: Path, seen: set[Path]) -> None:
    if file in seen or file.is_relative_to(CONFIGS):
        return
    seen.add(file)
    root = _root(file)
    _count(root, file, {}, set())
    for key, value in root.value:
        if key.value == "hydra":
            raise _hydra(file, key)
        if key.value == "defaults":
            for included in _included(file, value):
                _check(included, seen)


def _root(file: Path) -> yaml.MappingNode:
    """The top of a file's node graph, in which aliases are not expanded."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        root = yaml.compose(text, yaml.SafeLoader)
        package = _PACKAGE.search(text)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}, line {line} is not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{file}: values are nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{file}{line}: {error.problem or 'not valid YAML'}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML text: {' '.join(str(error).split())}") from None
    if root is None:
        raise ConfigError(f"{file} is empty; {_START}")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{file} holds no keys (key: value); {_START}")
    if package is not None and _is_hydras(package[1]):
        raise _hydra(file, root)
    return root


def _count(node: yaml.Node, file: Path, sizes: dict[int, int], above: set[int]) -> int:
    """The number of values below a node, aliases expanded; ConfigError for too many, or for other types."""
    if id(node) in above:
        raise _at(file, node, "a value contains itself (an alias to an anchor around it)")
    if id(node) not in sizes:
        if node.tag not in _TAGS:
            raise _at(
                file,
                node,
                f"values of type {node.tag.rpartition(',2002:')[2]} are not supported; write plain text or numbers",
            )
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = (child for pair in children for child in (pair if isinstance(pair, tuple) else (pair,)))
        above.add(id(node))
        size = 1 + sum(_count(child, file, sizes, above) for child in flat)
        above.remove(id(node))
        if size > MAX_NODES:
            raise _at(file, node, f"aliases expand to more than {MAX_NODES:,} values")
        sizes[id(node)] = size
    return sizes[id(node)]


def _included(file: Path, defaults: yaml.Node) -> Iterator[Path]:
    """The files that a defaults list may include from the file's own folder; ConfigError if it names Hydra's groups."""
    if not isinstance(defaults, yaml.SequenceNode):
        raise _at(file, defaults, "defaults must be a list, such as [/run/smoke, _self_]")
    for item in defaults.value:
        pairs: list[tuple[Any, Any]] = item.value if isinstance(item, yaml.MappingNode) else [(None, item)]
        for key, value in pairs:
            group, _, package = str(key.value).rpartition(" ")[2].partition("@") if key is not None else ("", "", "")
            for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(one, yaml.ScalarNode):
                    raise _at(file, item, "an entry of defaults is a name or `group: option`")
                name, _, of_its_own = str(one.value).partition("@")
                path = f"{group}/{name}".lstrip("/").removesuffix(".yaml")
                if any(map(_is_hydras, (path, package, of_its_own))) or (not group and "${" in path):
                    raise _hydra(file, item)
                if (found := file.parent / f"{path}.yaml").is_file():
                    yield found


def _is_hydras(path: str) -> bool:
    """Whether a group, config or package (a/b or a.b) belongs to Hydra."""
    return re.split(r"[./]", path.removeprefix("_global_").lstrip("."))[0] == "hydra"


def _hydra(file: Path, node: yaml.Node) -> ConfigError:
    return _at(
        file, node, "Hydra's own settings can start programs and are not read from files; give them on the command line"
    )


def _at(file: Path, node: yaml.Node, message: str) -> ConfigError:
    return ConfigError(f"{file}, line {node.start_mark.line + 1}: {message}")
