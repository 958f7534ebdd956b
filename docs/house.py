"""The house as its imports show it: which package is on which floor, and a picture of it, docs/architecture.svg.

    make schema

tests/test_floors.py checks the same imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
PICTURE = ROOT / "docs" / "architecture.svg"

FLOORS = ("ground", "room", "frame", "verb", "roof", "entry")
FLOOR_OF = {"core": "ground", "run": "frame", "memory": "frame", "dispatch": "roof", "launch": "entry"}
"""By package; those in tasks/ are verbs, and all others rooms."""

Place = tuple[str, str]
"""Floor and package."""
Tree = dict[str, ast.Module]
"""A syntax tree for each dotted module name."""


def main() -> None:
    PICTURE.write_text(picture(parse(SRC)), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")


def parse(folder: Path) -> Tree:
    """Every module under `folder`, by its dotted name; a package by the name of its folder."""
    files = {path: ".".join(path.relative_to(folder).with_suffix("").parts) for path in sorted(folder.rglob("*.py"))}
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


def place(name: str) -> Place:
    """Floor and package of a module: ("room", "model") for pretune.model.rope, ("verb", "train") in tasks/train."""
    parts = name.split(".")
    if name == "main":
        return "entry", name
    if len(parts) == 1:
        return "ground", name
    if parts[1] == "tasks":
        return ("verb", parts[2]) if len(parts) > 2 else ("ground", name)
    return FLOOR_OF.get(parts[1], "room"), parts[1]


def package_imports(tree: Tree) -> set[tuple[Place, Place]]:
    """Which package imports which other."""
    found = set()
    for name, module in tree.items():
        for target in imports(name, module):
            other = module_of(target, tree)
            if other and place(other) != place(name):
                found.add((place(name), place(other)))
    return found


WIDTH, BOX, GAP, HEIGHT, RISE = 1360, 96, 10, 34, 96
COLORS = {
    "entry": "#7e57c2", "roof": "#5c6bc0", "verb": "#1e88e5", "frame": "#00897b", "room": "#6d8b3d", "ground": "#8d6e63"
}  # fmt: skip
STYLE = (
    "text{font:13px sans-serif}.name{fill:#fff;text-anchor:middle}.floor{fill:#888}"
    "path{fill:none;stroke-width:1.3;opacity:.5}"
)


def picture(tree: Tree) -> str:
    """An SVG: packages in a row per floor, the command line on top; a line from each to those it imports. Core, which
    all of them import, has none."""
    spots = dict(_spots(sorted({place(name) for name in tree})))
    boxes, lines = [], []
    for (floor, package), (x, y) in spots.items():
        boxes.append(
            f'<rect x="{x - BOX / 2}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6" fill="{COLORS[floor]}"/>'
            f'<text x="{x}" y="{y + 22}" class="name">{package}</text>'
        )
    for floor, y in {floor: y for (floor, _), (_, y) in spots.items()}.items():
        boxes.append(f'<text x="8" y="{y + 22}" class="floor">{"tasks" if floor == "verb" else floor}</text>')
    for one, other in sorted(package_imports(tree)):
        if one in spots and other in spots and other[0] != "ground":
            lines.append(_line(spots[one], spots[other], COLORS[one[0]]))
    bottom = max(y for _, y in spots.values()) + HEIGHT + 20
    content = "\n".join([f"<style>{STYLE}</style>", *lines, *boxes])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom:.0f}">\n{content}\n</svg>\n'


def _spots(places: list[Place]) -> Iterator[tuple[Place, tuple[float, float]]]:
    """Where each package is drawn: the middle of its upper edge."""
    for level, floor in enumerate(reversed(FLOORS)):
        row = [spot for spot in places if spot[0] == floor and not spot[1].startswith("pretune")]
        left = (WIDTH + 50 - len(row) * (BOX + GAP) + GAP) / 2
        for index, spot in enumerate(row):
            yield spot, (left + index * (BOX + GAP) + BOX / 2, 34.0 + level * RISE)


def _line(start: tuple[float, float], end: tuple[float, float], color: str) -> str:
    (x, y), (u, v) = start, end
    if y == v:  # two tasks: above them
        return f'<path d="M{x} {y} C{x} {y - 34},{u} {v - 34},{u} {v}" stroke="{color}"/>'
    return f'<path d="M{x} {y + HEIGHT} C{x} {y + HEIGHT + 40},{u} {v - 40},{u} {v}" stroke="{color}"/>'


if __name__ == "__main__":
    main()
