from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pretune.core.config import InputError
from pretune.data.sources.config import PythonDocsSource
from pretune.data.sources.python_docs import rows
from pretune.data.sources.rows import identity


def read(packages: tuple[str, ...] | None, max_bytes: int | None) -> list[dict[str, str]]:
    return list(rows(PythonDocsSource(kind="python_docs", packages=packages, max_bytes=max_bytes)))


def test_the_standard_library_reads_as_text() -> None:
    found = {row["source"]: row["text"] for row in read(("python",), 600_000)}
    assert found["python/argparse.py"].startswith("argparse\n\nCommand-line parsing library")
    assert "ArgumentParser.parse_args" not in found["python/argparse.py"]  # it has no docstring
    assert not any("/test/" in source for source in found)


def test_max_bytes_is_kept_and_the_order_is_always_the_same() -> None:
    first, again = read(("python",), 300_000), read(("python",), 300_000)
    assert first == again
    assert sum(len(row["text"].encode()) for row in first) == 300_000
    fewer = read(("python",), 100_000)
    assert [row["source"] for row in fewer] == [row["source"] for row in first][: len(fewer)]


def test_packages_are_read_without_importing_them_and_nothing_comes_twice() -> None:
    before = set(sys.modules)
    found = read(("pip", "Pydantic_Core", "rich"), None)
    assert {row["source"].split("/")[0] for row in found} >= {"rich"}
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] in ("pip", "rich")}
    texts = [row["text"] for row in found]
    assert len(texts) == len(set(texts))
    assert not any("license" in row["source"].lower() for row in found if row["source"].endswith((".txt", ".md")))


def test_a_package_that_is_not_installed() -> None:
    with pytest.raises(InputError, match="'pydantik' is not installed; did you mean 'pydantic'"):
        read(("pydantik",), None)


def test_what_an_interrupted_uninstallation_leaves_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "~orch-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    section = PythonDocsSource(kind="python_docs", packages=("rich",), max_bytes=1000)
    assert list(rows(section))
    assert identity(section, tmp_path)["versions"]
