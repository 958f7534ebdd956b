"""Files and folders that are whole or absent, wherever a path leads and whatever killed processes have left."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretune.core.files import atomic_folder, check_writable, write_atomic

ROOT = Path(__file__).parents[2]

Attempt = Callable[[Path], None]


def write_folder(path: Path) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "inside").write_text("new")


def write_file(path: Path) -> None:
    write_atomic(path, "new")


def python(code: str, *arguments: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
    """A program with pretune's files imported and `path`, its first argument."""
    start = (
        "import os, sys; from pathlib import Path; from pretune.core.files import *; "
        "path = Path(sys.argv[1]) if len(sys.argv) > 1 else None\n"
    )
    command = [sys.executable, "-c", start + code, *map(str, arguments)]
    return subprocess.run(command, text=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, **more)  # type: ignore[call-overload]


@pytest.mark.parametrize(("attempt", "killed"), [
    (write_file, "os.replace = lambda *_: os.kill(os.getpid(), 9)\nwrite_atomic(path, 'half')"),
    (write_folder, "with atomic_folder(path) as folder: (folder / 'x').touch(); os.kill(os.getpid(), 9)"),
], ids=["file", "folder"])  # fmt: skip
@pytest.mark.parametrize("name", ["a", "[a].*?", "n" * 255, "\N{SNOWMAN}" * 85])
def test_what_a_killed_process_left_is_gone_after_the_next_attempt(
    attempt: Attempt, killed: str, name: str, tmp_path: Path
) -> None:
    assert python(killed, tmp_path / name).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    attempt(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("attempt", [write_file, write_folder])
def test_what_a_living_process_writes_is_left_alone(attempt: Attempt, tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a") as mine:
        (mine / "x").touch()
        other = python(
            "write_atomic(path, 'b')" if attempt is write_file else "with atomic_folder(path): pass",
            tmp_path / "a",
        )
        assert other.returncode == 0
        assert (mine / "x").exists()


def test_many_threads_write_one_file_and_each_reader_sees_a_whole_one(tmp_path: Path) -> None:
    path, odd = tmp_path / "a", []
    texts = [str(number) * 10_000 for number in range(4)]
    write_atomic(path, texts[0])

    def write(text: str) -> None:
        for _ in range(25):
            write_atomic(path, text)
            odd.extend([] if path.read_text() in texts else ["half"])

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert odd == []
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for name, before in (("there", "old"), ("dangling", None)):
        target = tmp_path / "elsewhere" / name
        if before is not None:
            target.write_text(before)
        (tmp_path / name).symlink_to(Path("elsewhere") / name)
        write_file(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert target.read_text() == "new"
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere" / "folder")
    write_folder(tmp_path / "folder")
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "elsewhere" / "folder" / "inside").read_text() == "new"


def test_devices_pipes_and_open_files_are_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    check_writable(pipe)
    write_atomic(pipe, "through the pipe")
    reader.join()
    assert got == ["through the pipe"]
    assert pipe.is_fifo()

    write_atomic(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()

    shown = python(
        "print(1, flush=True); write_atomic(path, 'two\\n'); print(3)", "/dev/stdout", stdout=subprocess.PIPE
    )
    assert shown.stdout == "1\ntwo\n3\n"
    with (tmp_path / "log").open("w") as log:
        python("print(1, flush=True); write_atomic(path, 'two\\n')", "/dev/stdout", stdout=log)
    assert (tmp_path / "log").read_text() == "1\ntwo\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "pipe"]


def test_what_cannot_be_written_is_known_before_and_nothing_is_left(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "file")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("old")
    check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    for path, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "file" / "below", NotADirectoryError),
        (tmp_path / ("n" * 256), OSError),
    ):
        with pytest.raises(error):
            check_writable(path)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file can be longer than 50,000 bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.usefixtures("full_disk")
def test_an_error_leaves_the_old_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="File too large"):
        write_atomic(tmp_path / "a", "x" * 100_000)
    with pytest.raises(OSError, match="File too large"), atomic_folder(tmp_path / "b") as temporary:
        (temporary / "x").write_text("x" * 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
