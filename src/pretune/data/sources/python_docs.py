"""Read the documentation of this Python installation and its packages as training text.

Docstrings are read with `ast`; nothing is imported or run. A row holds the docstrings of a module, or one document.
"""

from __future__ import annotations

import ast
import email
import hashlib
import importlib.metadata
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pretune.core.config import InputError, nearest
from pretune.data.sources.config import PythonDocsSource

VERSION = 1
"""Increment when the same installation would give different rows: it is part of the cache key of prepared data."""

MIN_CHARACTERS = 200
"""Shorter texts are left out: stubs, version files."""
MAX_DOCUMENT_BYTES = 1_000_000
"""Longer .txt files are data rather than documentation."""
MIN_LETTERS = 0.7
"""Fraction of letters and spaces below which a text file counts as a table or list rather than prose."""

_DOCUMENTS = (".rst", ".md", ".txt")
_LEGAL = ("license", "licence", "copying", "notice", "authors", "top_level", "entry_points", "requirements", "vendor")
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "testing", "__pycache__", "lib2to3", "idlelib"}


def rows(config: PythonDocsSource) -> Iterator[dict[str, str]]:
    """`{text, source}` rows for the standard library and then each distribution by name, without duplicates.

    Reads lazily and stops after `max_bytes` of text. Raises InputError for a package that is not installed.
    """
    seen: set[bytes] = set()
    left = config.max_bytes
    for source, path in _files(config.packages):
        text = _docstrings(path, source, seen) if path.suffix == ".py" else _document(path, seen)
        text = text.encode(errors="ignore").decode()  # a docstring may contain half of a surrogate pair
        if len(text) < MIN_CHARACTERS:
            continue
        size = len(text.encode())
        if left is not None and size >= left:
            yield {"text": _first_bytes(text, left), "source": source}
            return
        left = None if left is None else left - size
        yield {"text": text, "source": source}


def distributions() -> Iterator[importlib.metadata.Distribution]:
    """Installed distributions, without the nameless folders that an interrupted uninstallation leaves."""
    return (found for found in importlib.metadata.distributions() if "Name" in found.metadata)


def _first_bytes(text: str, num_bytes: int) -> str:
    return text.encode()[:num_bytes].decode(errors="ignore")


def _files(packages: tuple[str, ...] | None) -> Iterator[tuple[str, Path]]:
    """Name and path of every file to read, in an order that depends only on what is installed."""
    installed = {d.name.lower().replace("_", "-"): d for d in distributions()}
    wanted = ["python", *sorted(installed)] if packages is None else [p.lower().replace("_", "-") for p in packages]
    for name in wanted:
        if name == "python":
            yield from _standard_library()
        elif name in installed:
            yield from _distribution(installed[name])
        else:
            raise InputError(f"data.source.packages: '{name}' is not installed{nearest(name, ['python', *installed])}")


def _standard_library() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for name in sorted(names):
            path = Path(folder, name)
            legal = name.lower().startswith(_LEGAL)
            if path.suffix == ".py" or (path.suffix in _DOCUMENTS and not legal):
                yield f"python/{path.relative_to(root).as_posix()}", path


def _distribution(distribution: importlib.metadata.Distribution) -> Iterator[tuple[str, Path]]:
    files = sorted(distribution.files or (), key=str)
    for file in files:
        name = PurePosixPath(file)
        legal = name.stem.lower().startswith(_LEGAL)
        if _SKIPPED_FOLDERS.intersection(name.parts[:-1]) or ".." in name.parts:
            continue
        if name.suffix == ".py" or (name.suffix in _DOCUMENTS and not legal) or name.name == "METADATA":
            path = Path(str(distribution.locate_file(file)))
            if path.is_file():
                yield str(name), path


def _docstrings(path: Path, source: str, seen: set[bytes]) -> str:
    """The docstrings of a module, each under its qualified name; duplicates are left out."""
    code = _read(path)
    if '"""' not in code and "'''" not in code:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    if path.name == "topics.py":  # the language reference for `help()`
        return "\n\n".join(_long_strings(tree, seen))
    module = source.removesuffix(".py").removesuffix("/__init__").removeprefix("python/").replace("/", ".")
    return "\n\n".join(_named_docstrings(tree, module, seen))


def _named_docstrings(node: ast.AST, name: str, seen: set[bytes]) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring and _is_new(docstring, seen):
            yield f"{_title(node, name)}\n\n{docstring}"
        for child in node.body:
            inner = getattr(child, "name", None)
            if isinstance(inner, str):
                yield from _named_docstrings(child, inner if isinstance(node, ast.Module) else f"{name}.{inner}", seen)


def _title(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{name}({', '.join(argument.arg for argument in (*node.args.posonlyargs, *node.args.args))})"
    return f"class {name}" if isinstance(node, ast.ClassDef) else name


def _long_strings(tree: ast.AST, seen: set[bytes]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= MIN_CHARACTERS:
            text = inspect.cleandoc(node.value)
            if _is_new(text, seen):
                yield text


def _document(path: Path, seen: set[bytes]) -> str:
    text = _read(path) if path.stat().st_size <= MAX_DOCUMENT_BYTES else ""
    if path.name == "METADATA":  # its body is the package's README
        message = email.message_from_string(text)
        text = str(message.get_payload())
    text = text.strip()
    letters = sum(character.isalpha() or character == " " for character in text[:20_000])
    prose = letters >= MIN_LETTERS * len(text[:20_000])
    return text if prose and _is_new(text, seen) else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return ""


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    new = digest not in seen
    seen.add(digest)
    return new
