"""The rules of docs/architecture.md, checked on the code: imports only go down, files and functions stay small."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from house import FLOORS, PICTURE, SRC, Tree, imports, module_of, parse, picture, place

ROOT = Path(__file__).parent.parent

CALLS = {"train": {"evaluate", "generate", "report"}, "export": {"evaluate"}, "inspect": {"train", "report"}}
"""The tasks that a task may call; all others stand alone."""

HEAVY = {"torch", "wandb", "datasets", "transformers", "tokenizers", "safetensors", "matplotlib", "huggingface_hub"}
LIGHT = ("main", "pretune.dispatch", "pretune.run.config", "pretune.run.folder", "pretune.core.files")
"""Modules loaded before a configuration mistake is reported; so is every config.py."""

MAX_LINES, MAX_FUNCTION_LINES = 300, 60


def upward_imports(tree: Tree) -> list[str]:
    """Imports that go up, or sideways into another room or task."""
    faults = []
    for name, module in tree.items():
        floor, room = place(name)
        for target in {found for found in (module_of(one, tree) for one in imports(name, module)) if found}:
            to_floor, to_room = place(target)
            sideways = to_floor == floor and to_room != room and floor in ("room", "verb")
            if sideways and floor == "verb" and to_room in CALLS.get(room, ()):
                continue
            if sideways or FLOORS.index(to_floor) > FLOORS.index(floor):
                faults.append(f"{name} ({floor}) imports {target} ({to_floor})")
    return sorted(faults)


def cycles(tree: Tree) -> list[str]:
    """Modules that import themselves through other modules."""
    graph = {
        name: {found for found in (module_of(one, tree) for one in imports(name, module)) if found and found != name}
        for name, module in tree.items()
    }
    faults = []
    for start in graph:
        seen, pending = set(), list(graph[start])
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending.extend(graph[name])
        if start in seen:
            faults.append(start)
    return sorted(faults)


def loads(start: str, tree: Tree) -> dict[str, str]:
    """Top-level names of other libraries that importing `start` loads, each with the module that imports it."""
    brought: dict[str, str] = {}
    seen, pending = set(), [start]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        # Importing a module imports its parent packages.
        pending.extend(parent for parent in (name.rpartition(".")[0],) if parent in tree)
        for target in imports(name, tree[name], at_import=True):
            inner = module_of(target, tree)
            if inner:
                pending.append(inner)
            else:
                brought.setdefault(target.partition(".")[0], name)
    return brought


def heavy_imports(tree: Tree) -> list[str]:
    """Slow libraries imported by the configuration, and Hydra outside launch."""
    light = [name for name in tree if name in LIGHT or name.endswith("config")]
    faults = [
        f"importing {name} imports {library} (in {through})"
        for name in light
        for library, through in loads(name, tree).items()
        if library in HEAVY
    ]
    faults += [
        f"{name} imports hydra"
        for name, module in tree.items()
        if not name.startswith("pretune.launch")
        and any(target.partition(".")[0] == "hydra" for target in imports(name, module))
    ]
    return sorted(faults)


def test_imports_only_go_down() -> None:
    assert upward_imports(parse(SRC)) == []


def test_there_are_no_import_cycles() -> None:
    assert cycles(parse(SRC)) == []


def test_configuration_is_checked_before_anything_heavy_is_imported() -> None:
    assert heavy_imports(parse(SRC)) == []


def test_the_picture_of_the_house_is_current() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(parse(SRC)), "make schema"


def oversized(sources: dict[str, str]) -> list[str]:
    """Files and functions that are too long."""
    faults = [
        f"{name} has {text.count(chr(10))} lines" for name, text in sources.items() if text.count("\n") > MAX_LINES
    ]
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    faults.append(f"{name}: {node.name} has {lines} lines")
    return faults


def test_files_and_functions_stay_small() -> None:
    sources = {str(path.relative_to(SRC)): path.read_text() for path in SRC.rglob("*.py")}
    assert oversized(sources) == [], "look for the second idea hiding in it"
    assert oversized({"a": "\n" * 401, "b": "def f():\n" + "  x = 1\n" * 60}) == [
        "a has 401 lines",
        "b: f has 61 lines",
    ]


@pytest.mark.parametrize("folder", ["src", "benchmarks"])
def test_nothing_shadows_a_library(folder: str) -> None:
    # These folders are on sys.path when their scripts run: `src/queue.py` would shadow the standard `queue`.
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    here = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert here & taken == set()


def test_every_import_is_pinned() -> None:
    requirements = "".join((ROOT / name).read_text() for name in ("req.txt", "req-phone.txt"))
    pinned = {
        match[1].lower().replace("_", "-")
        for match in re.finditer(r"^(?:#   )?([\w.-]+)(?:\[\w+\])?==\S+", requirements, re.MULTILINE)
    }
    packages = importlib.metadata.packages_distributions()
    local = {path.stem for folder in ("tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")}
    missing = set()
    for folder in ("src", "tests", "benchmarks", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            for target in imports(str(path), ast.parse(path.read_text())):
                top = target.partition(".")[0]
                if top in sys.stdlib_module_names or top in local or top in ("pretune", "main"):
                    continue
                names = {name.lower().replace("_", "-") for name in packages.get(top, [top])}
                if not names & pinned:
                    missing.add(f"{top} ({path.relative_to(ROOT)})")
    assert missing == set()


def tree_of(**sources: str) -> Tree:
    return {name.replace("__", "."): ast.parse(text) for name, text in sources.items()}


@pytest.mark.parametrize(
    ("check", "sources", "fault"),
    [
        (upward_imports, {"pretune__core__config": "import pretune.core.batch", "pretune__core__batch": ""}, None),
        (
            upward_imports,
            {"pretune__model__rope": "from pretune.tasks.train import loop", "pretune__tasks__train__loop": ""},
            "pretune.model.rope (room) imports pretune.tasks.train.loop (verb)",
        ),
        (
            upward_imports,
            {"pretune__model__rope": "def f():\n  import pretune.optim.budget", "pretune__optim__budget": ""},
            "pretune.model.rope (room) imports pretune.optim.budget (room)",
        ),
        (
            upward_imports,
            {"pretune__core__batch": "from pretune.run.config import RunConfig", "pretune__run__config": ""},
            "pretune.core.batch (ground) imports pretune.run.config (frame)",
        ),
        (
            upward_imports,
            {"pretune__tasks__train__loop": "import pretune.tasks.report.task", "pretune__tasks__report__task": ""},
            None,
        ),
        (
            upward_imports,
            {"pretune__tasks__report__task": "import pretune.tasks.report.page", "pretune__tasks__report__page": ""},
            None,
        ),
        (
            upward_imports,
            {"pretune__tasks__report__task": "import pretune.tasks.train.loop", "pretune__tasks__train__loop": ""},
            "pretune.tasks.report.task (verb) imports pretune.tasks.train.loop (verb)",
        ),
        (cycles, {"pretune__a": "import pretune.b", "pretune__b": "def f():\n  import pretune.a"}, "pretune.a"),
        (cycles, {"pretune__a": "import pretune.b", "pretune__b": "import os"}, None),
        (
            heavy_imports,
            {"pretune__model__config": "import pretune.x", "pretune__x": "from torch import nn"},
            "importing pretune.model.config imports torch (in pretune.x)",
        ),
        (
            heavy_imports,
            {"pretune__model": "import torch", "pretune__model__config": ""},
            "importing pretune.model.config imports torch (in pretune.model)",
        ),
        (
            heavy_imports,
            {"pretune__model__config": "if TYPE_CHECKING:\n  import torch\ndef f():\n  import wandb"},
            None,
        ),
        (heavy_imports, {"pretune__run__folder": "def f():\n  import hydra"}, "pretune.run.folder imports hydra"),
    ],
)
def test_the_checks_can_fail(check, sources: dict[str, str], fault: str | None) -> None:
    found = check(tree_of(**sources))
    assert found == [] if fault is None else fault in found
