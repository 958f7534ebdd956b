"""The rules of docs/architecture.md, checked on the code: imports only go down, files and functions stay small."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"

GROUND = {"config", "batch", "files", "tensor_files", "quiet"}
FRAME = {
    "run_config",
    "task_config",
    "run_folder",
    "arithmetic",
    "assembly",
    "reference",
    "author",
    "footprint",
    "footprint_nf4",
}
ROOF = {"run"}
FLOORS = ("ground", "room", "frame", "verb", "roof", "entry")

CALLS = {"train": {"evaluate", "generate", "report"}, "export": {"evaluate"}}
"""The verbs that a verb may call; all others stand alone."""

HEAVY = {"torch", "wandb", "datasets", "transformers", "tokenizers", "safetensors", "matplotlib", "huggingface_hub"}
LIGHT = ("main", "pretune.run", "pretune.run_config", "pretune.run_folder", "pretune.files")
"""Modules that a mistake in a configuration goes through before it is reported; so does every config.py."""

MAX_LINES, MAX_FUNCTION_LINES = 400, 60

Tree = dict[str, ast.Module]
"""A syntax tree for each dotted module name."""


def parse(folder: Path) -> Tree:
    """Every module under `folder`, by its dotted name; a package by the name of its folder."""
    files = {path: ".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py")}
    return {name.removesuffix(".__init__"): ast.parse(path.read_text()) for path, name in files.items()}


def imports(name: str, module: ast.Module, at_import: bool = False) -> Iterator[str]:
    """Dotted names that a module imports; with `at_import` only those that importing it runs."""
    pending: list[ast.AST] = [module]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: imports are absolute here"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        inner = list(ast.iter_child_nodes(node))
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = []
        if at_import and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            inner = list(node.orelse)
        pending.extend(inner)


def module_of(target: str, tree: Tree) -> str | None:
    """The module of `tree` that an imported name is or lives in."""
    while target and target not in tree:
        target = target.rpartition(".")[0]
    return target or None


def place(name: str) -> tuple[str, str]:
    """Floor and room of a module: ("room", "model") for pretune.model.rope; of a verb, its name."""
    if name == "main":
        return "entry", name
    parts = name.split(".")
    if len(parts) == 1:
        return "ground", name
    top = parts[1]
    if top == "tasks":
        # `report_page` belongs to the verb `report`.
        return ("verb", parts[2].partition("_")[0]) if len(parts) > 2 else ("ground", name)
    for floor, names in (("ground", GROUND), ("frame", FRAME), ("roof", ROOF)):
        if top in names:
            return floor, top
    return "room", top


def upward_imports(tree: Tree) -> list[str]:
    """Imports that go up, or sideways into another room or verb."""
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
    """Modules that import themselves by way of others."""
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
    """Top-level names of other libraries that importing `start` brings in, each with the module that does it."""
    brought: dict[str, str] = {}
    seen, pending = set(), [start]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        # Importing a module imports the packages around it.
        pending.extend(parent for parent in (name.rpartition(".")[0],) if parent in tree)
        for target in imports(name, tree[name], at_import=True):
            inner = module_of(target, tree)
            if inner:
                pending.append(inner)
            else:
                brought.setdefault(target.partition(".")[0], name)
    return brought


def heavy_imports(tree: Tree) -> list[str]:
    """Libraries that configuration would wait for, and Hydra outside of main.py."""
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
        if name != "main" and any(target.partition(".")[0] == "hydra" for target in imports(name, module))
    ]
    return sorted(faults)


def test_imports_only_go_down() -> None:
    assert upward_imports(parse(SRC)) == []


def test_there_are_no_import_cycles() -> None:
    assert cycles(parse(SRC)) == []


def test_configuration_is_checked_before_anything_heavy_is_imported() -> None:
    assert heavy_imports(parse(SRC)) == []


def oversized(sources: dict[str, str]) -> list[str]:
    """Files and functions that have outgrown one idea."""
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
    # These folders are on sys.path when their scripts run: `src/queue.py` would be everybody's queue.
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
        (upward_imports, {"pretune__config": "import pretune.batch", "pretune__batch": ""}, None),
        (
            upward_imports,
            {"pretune__model__rope": "from pretune.tasks import train", "pretune__tasks__train": ""},
            "pretune.model.rope (room) imports pretune.tasks.train (verb)",
        ),
        (
            upward_imports,
            {"pretune__model__rope": "def f():\n  import pretune.optim.budget", "pretune__optim__budget": ""},
            "pretune.model.rope (room) imports pretune.optim.budget (room)",
        ),
        (
            upward_imports,
            {"pretune__batch": "from pretune.run_config import RunConfig", "pretune__run_config": ""},
            "pretune.batch (ground) imports pretune.run_config (frame)",
        ),
        (upward_imports, {"pretune__tasks__train": "import pretune.tasks.report", "pretune__tasks__report": ""}, None),
        (
            upward_imports,
            {"pretune__tasks__report": "import pretune.tasks.report_page", "pretune__tasks__report_page": ""},
            None,
        ),
        (
            upward_imports,
            {"pretune__tasks__report": "import pretune.tasks.train", "pretune__tasks__train": ""},
            "pretune.tasks.report (verb) imports pretune.tasks.train (verb)",
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
        (heavy_imports, {"pretune__run_folder": "def f():\n  import hydra"}, "pretune.run_folder imports hydra"),
    ],
)
def test_the_checks_can_fail(check, sources: dict[str, str], fault: str | None) -> None:
    found = check(tree_of(**sources))
    assert found == [] if fault is None else fault in found
