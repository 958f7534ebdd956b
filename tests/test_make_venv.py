"""`make` on any machine: the Python it chooses, its error messages, and that the next `make` continues."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The programs that the Makefile and its script call, without any of the machine's own Pythons.
TOOLS = ["make", "sh", "cat", "cp", "grep", "mkdir", "rm", "sed", "sleep", "tail", "touch", "tr", "uname"]
VERSIONS = re.findall(r"3\.\d+", re.findall(r"^PYTHONS := (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0])

# A fake Python of any version: its environments contain only itself, and its pip prints $PIP_SAYS.
FAKE = """#!/bin/sh
case "$*" in
*sys.version_info*) echo {version} ;;
"-c import venv, ensurepip") {venv} ;;
"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo {name} >.venv/made-by ;;
"-Im ensurepip"*) {ensurepip} ;;
"-m pip --version") test -e .venv/made-by ;;
"-m pip install --help") echo "-i, --index-url <url>  Where to look (default https://index.example/simple)." ;;
"-m pip config list") ;;
"-m pip install"*) cat "$PIP_SAYS"; test ! -s "$PIP_SAYS" ;;
"-c "*) exec {real} "$@" ;;
*) echo "unexpected: $*"; exit 3 ;;
esac
"""
NO_ENSUREPIP = "echo \"ModuleNotFoundError: No module named 'ensurepip'\" >&2; exit 1"
NO_ROOM = 'echo "OSError: [Errno 28] No space left on device"; exit 1'
NOT_RUNNING = '#!/bin/sh\necho "pyenv: python: command not found" >&2\nexit 127\n'


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A copy of the files that `make` needs, and a separate PATH."""

    def __init__(self, folder: Path) -> None:
        self.project, self.commands, self.says = folder / "project", folder / "commands", folder / "says"
        self.project.mkdir()
        self.commands.mkdir()
        self.says.write_text("")
        shutil.copy(ROOT / "Makefile", self.project)
        shutil.copytree(ROOT / "bin", self.project / "bin")
        (self.project / "req.txt").write_text("thing==1.0\n")
        (self.project / "req-phone.txt").write_text("phone==1.0\n")
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None, f"{tool} is missing"
            executable(self.commands / tool, f'#!/bin/sh\nexec {found} "$@"\n')

    def python(self, version: str, name: str = "", venv: str = ":", ensurepip: str = ":") -> Path:
        name = name or f"python{version}"
        real = sys.executable
        path = self.commands / name
        executable(path, FAKE.format(version=version, name=name, venv=venv, ensurepip=ensurepip, real=real))
        return path

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["make", "--no-print-directory", *(arguments or (".venv/.ready",))],
            cwd=self.project,
            # Exclude pip's settings on this machine.
            env={"PATH": str(self.commands), "PIP_SAYS": str(self.says), "PIP_CONFIG_FILE": os.devnull, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def made(self, *arguments: str, **environment: str) -> str:
        """The name of the Python that .venv was created with."""
        done = self.make(*arguments, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        assert (self.project / ".venv" / ".ready").exists()
        return (self.project / ".venv" / "made-by").read_text().strip()

    def refused(self, *arguments: str, **environment: str) -> str:
        """The one line that states the cause."""
        done = self.make(*arguments, **environment)
        assert done.returncode != 0, done.stdout
        assert not (self.project / ".venv" / ".ready").exists()
        # The second line is make's own.
        line, ours = done.stderr.splitlines()
        assert line.startswith("error: "), done.stderr
        assert ours.startswith("make: *** ")
        return line


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_newest_that_fits_makes_it(machine: Machine) -> None:
    for version in VERSIONS:
        machine.python(version)
    machine.python("3.99")
    assert machine.made() == f"python{max(VERSIONS, key=lambda version: int(version.partition('.')[2]))}"


def test_commands_that_do_not_run_are_passed_over(machine: Machine) -> None:
    executable(machine.commands / "python3.13", NOT_RUNNING)
    machine.python("3.12", venv=NO_ENSUREPIP)
    machine.python("3.11")
    assert machine.made() == "python3.11"


def test_plain_python3_is_the_last_resort(machine: Machine) -> None:
    machine.python("3.12", name="python3")
    assert machine.made() == "python3"


def test_a_named_python_goes_before_all(machine: Machine, tmp_path: Path) -> None:
    machine.python("3.13")
    named = tmp_path / "my pythons" / "python"
    named.parent.mkdir()
    machine.python("3.11", name="other").rename(named)
    assert machine.made(".venv/.ready", f"PYTHON={named}") == "other"


def test_without_a_python_that_fits_it_says_what_is_there(machine: Machine) -> None:
    assert "needs Python 3.13, 3.12 or 3.11, and there is none on the PATH: install one" in machine.refused()
    executable(machine.commands / "python3.13", NOT_RUNNING)
    machine.python("3.9", name="python3")
    assert "and python3.13 does not run, python3 is Python 3.9: install one" in machine.refused()
    assert "and python3 is Python 3.9: install one" in machine.refused(".venv/.ready", "PYTHON=python3")
    assert "and /nowhere/python does not exist: install one" in machine.refused(PYTHON="/nowhere/python")
    assert not (machine.project / ".venv").exists()


def test_without_ensurepip_it_names_what_to_install(machine: Machine) -> None:
    machine.python("3.12", venv=NO_ENSUREPIP)
    assert "python3.12 (Python 3.12) cannot make" in (line := machine.refused())
    assert "install a complete Python 3.12, then run make again" in line
    executable(machine.commands / "apt-get", NOT_RUNNING)
    assert "sudo apt install python3.12-venv, then run make again" in machine.refused()
    machine.python("3.12")
    assert machine.made() == "python3.12"


def test_a_full_disk_leaves_nothing_behind(machine: Machine) -> None:
    machine.python("3.12", ensurepip=NO_ROOM)
    assert f"no space left for {machine.project}/.venv, or for temporary files in /tmp" in machine.refused()
    assert not (machine.project / ".venv").exists()


NOTHING_FOUND = """\
ERROR: Could not find a version that satisfies the requirement thing==1.0 (from versions: none)
ERROR: No matching distribution found for thing==1.0
"""
NO_VERSION = NOTHING_FOUND.replace("none", "0.8, 0.9")


def tried_again(why: str) -> str:
    return f"WARNING: Retrying (Retry(total=0)) after connection broken by '{why}': /simple/thing/\n" + NOTHING_FOUND


NO_ROUTE = tried_again(
    "NewConnectionError('<HTTPSConnection object at 0x7f>: Failed: [Errno 101] Network is unreachable')"
)
ASKS_WHO = tried_again(
    "ProxyError('Cannot connect.', OSError('Tunnel connection failed: 407 Proxy Authentication Required'))"
)
DISTRUST = tried_again(
    "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed'))"
)
NOT_YOU = "Could not fetch URL https://index.example/thing/: 403 Client Error: Forbidden for url: https://index.ex\n"
BROKEN = """Collecting thing==1.0
  Downloading thing-1.0-py3-none-any.whl (526.6 MB)
ERROR: Exception:
Traceback (most recent call last):
pip._vendor.urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool(host='files.example', port=443): Read timed out.
"""
PROXY = {"https_proxy": "http://me:secret@proxy.example:3128/"}
AROUND = PROXY | {"no_proxy": "index.example"}


@pytest.mark.parametrize(
    ("says", "environment", "expected"),
    [
        pytest.param(
            NO_ROUTE, {}, "reach the package index at index.example (Network is unreachable): connect", id="route"
        ),
        pytest.param(BROKEN, {}, "the package index at files.example: connect to the network or", id="broken"),
        pytest.param(ASKS_WHO, PROXY, "the proxy proxy.example:3128 of https_proxy (407 Proxy Auth", id="proxy-asks"),
        pytest.param(
            NO_ROUTE, PROXY, "index.example through the proxy proxy.example:3128 of https_proxy (N", id="proxy"
        ),
        pytest.param(
            NO_ROUTE, AROUND, "index.example (Network is unreachable): connect to the network or", id="no-proxy"
        ),
        pytest.param(
            NOT_YOU + NOTHING_FOUND, {}, "index.example refused (403 Client Error: Forbidden): ", id="refused"
        ),
        pytest.param(
            DISTRUST, {}, "certificate of the package index at index.example is not trusted", id="certificate"
        ),
        pytest.param(NO_VERSION, {}, "index at index.example has no thing==1.0 for Python 3.12 on ", id="version"),
        pytest.param("ERROR: [Errno 28] No space left on device\n", {}, "no space left for ", id="disk"),
        pytest.param("ERROR: This is new.\nOr not.\n", {}, "could not install req.txt: This is new. All of", id="new"),
        pytest.param("Or not.\n", {}, "pip could not install req.txt: it ended with 1. All of", id="unknown"),
    ],
)
def test_what_stops_pip_is_said_in_one_line(
    machine: Machine, says: str, environment: dict[str, str], expected: str
) -> None:
    machine.python("3.12")
    machine.says.write_text(says)
    line = machine.refused(**environment)
    assert expected in line
    assert line.endswith(f" All of pip's output: {machine.project}/.venv/install.log")
    assert "secret" not in line
    # If pip did not give a cause, it was run again.
    assert (machine.project / ".venv" / "install.log").read_text() in (says, says * 2)
    machine.says.write_text("")
    assert machine.made() == "python3.12"


def test_passwords_stay_out_of_the_log(machine: Machine) -> None:
    machine.python("3.12")
    machine.says.write_text("ERROR: Failed to parse: http://me:secret@proxy.example:x\n")
    assert "Failed to parse: http://proxy.example:x" in machine.refused()
    assert "secret" not in (machine.project / ".venv" / "install.log").read_text()


def test_what_takes_long_is_told(machine: Machine) -> None:
    machine.python("3.12")
    machine.says.write_text(
        "Collecting thing==1.0 (from -r req.txt (line 1))\n  Downloading thing-1.0.whl.metadata (28 kB)\n"
        "  Downloading small-1.0-any.whl (9.9 MB)\n  Downloading thing-1.0-any.whl (526.6 MB)\n"
        "Installing collected packages: small, thing\nERROR: but no.\n"
    )
    steps = [line for line in machine.make().stdout.splitlines() if line.startswith("  ")]
    assert steps == ["  downloading thing (526.6 MB)", "  installing packages: 2"]


def test_an_environment_is_kept_if_it_serves(machine: Machine) -> None:
    machine.python("3.12")
    machine.made()
    machine.python("3.13")
    (machine.project / ".venv" / ".ready").unlink()
    assert machine.made() == "python3.12"
    assert machine.made(".venv/.phone") == "python3.12"


@pytest.mark.parametrize("fault", ["no pip", "dangling", "another version", "another is named", "a file"])
def test_an_environment_that_does_not_serve_is_made_anew(machine: Machine, fault: str) -> None:
    machine.python("3.12")
    machine.made()
    environment = machine.project / ".venv"
    (environment / ".ready").unlink()
    (environment / "old").touch()
    arguments: list[str] = [".venv/.ready"]
    match fault:
        case "no pip":
            (environment / "made-by").unlink()
        case "dangling":
            (environment / "bin" / "python").unlink()
            (environment / "bin" / "python").symlink_to("/nowhere/python3.12")
        case "another version":
            shutil.copy(machine.python("3.10"), environment / "bin" / "python")
        case "another is named":
            arguments.append(f"PYTHON={machine.python('3.11')}")
        case "a file":
            shutil.rmtree(environment)
            environment.touch()
    machine.made(*arguments)
    assert not (environment / "old").exists()


def test_a_link_to_an_environment_is_taken_away_and_not_what_it_leads_to(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "precious").touch()
    (machine.project / ".venv").symlink_to(tmp_path / "shared")
    machine.python("3.12")
    assert machine.made() == "python3.12"
    assert (tmp_path / "shared" / "precious").exists()


def wheel(folder: Path, name: str) -> None:
    """A package with one module and one command."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "def main(): print('here')\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", f"[console_scripts]\n{name} = {name}:main\n")
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture
def real(machine: Machine) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`make` with the Python and pip of these tests, and no index except those in the environment."""
    pytest.importorskip("ensurepip")
    own = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")

    def make(**environment: str) -> subprocess.CompletedProcess[str]:
        return machine.make(PYTHON=str(own), PIP_RETRIES="0", **environment)

    return make


@pytest.mark.slow
def test_with_a_real_pip(
    machine: Machine, tmp_path: Path, real: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    # Nothing listens at port 9.
    index = {"PIP_INDEX_URL": "http://me:secret@127.0.0.1:9/simple"}
    done = real(**index)
    assert done.returncode != 0
    assert "error: cannot reach the package index at 127.0.0.1:9 (Connection refused): connect to" in done.stderr
    assert "secret" not in done.stdout + done.stderr

    done = real(PIP_INDEX_URL="https://index.example/simple", HTTPS_PROXY="http://me:secret@127.0.0.1:9")
    assert done.returncode != 0
    assert "at index.example through the proxy 127.0.0.1:9 of HTTPS_PROXY (Connection refused): correct" in done.stderr
    assert "secret" not in done.stdout + done.stderr

    wheel(tmp_path, "thing")
    files = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    done = real(**files)
    assert done.returncode == 0, done.stdout + done.stderr
    command = machine.project / ".venv" / "bin" / "thing"
    assert subprocess.run([command], capture_output=True, text=True, check=True).stdout == "here\n"

    # As left by an interruption just before the commands are written; the next make would consider it complete.
    command.unlink()
    next((machine.project / ".venv").glob("lib/python*/site-packages/thing-1.0.dist-info/INSTALLER")).unlink()
    (machine.project / "req.txt").write_text("thing==1.0\n\n")
    done = real(**files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert command.exists()

    (machine.project / "req.txt").write_text("thing==2.0\n")
    done = real(**files)
    assert done.returncode != 0
    assert f" has no thing==2.0 for Python 3.{sys.version_info.minor} on " in done.stderr


def test_all_that_names_the_pythons_agrees() -> None:
    newest, oldest = VERSIONS[0], VERSIONS[-1]
    after = f"3.{int(newest.partition('.')[2]) + 1}"
    assert f'requires-python = ">={oldest},<{after}"' in (ROOT / "pyproject.toml").read_text()
    for page in ("README.md", "CONTRIBUTING.md", "req.txt"):
        text = (ROOT / page).read_text()
        assert f"Python {oldest}, " in text, page
        assert f" or {newest}" in text or f" and {newest}" in text, page
