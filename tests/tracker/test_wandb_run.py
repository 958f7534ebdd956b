"""Against the real library, offline; what would need its server is tested against its public interfaces."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretune.tracker.config import WandbConfig
from pretune.tracker.files import read_rows
from pretune.tracker.tracker import Tracker
from pretune.tracker.wandb_run import WandbRun, choose_mode, reachable, run_id

CONFIG = WandbConfig(kind="wandb", project="p", entity=None, group=None, mode="auto", tags=("a", "b"))


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No user is logged in, whoever runs the tests, and wandb starts from scratch."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.chdir(tmp_path)
    yield
    if library := sys.modules.get("wandb"):
        library.teardown()


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers HTTP, if only with an error."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as answering:
        threading.Thread(target=answering.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{answering.server_port}"
        answering.shutdown()


def test_without_a_key_a_run_is_recorded_offline_and_says_so_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "demo"
    for steps in ((1, 2), (2, 3)):
        with Tracker(CONFIG, folder, "demo", "pretrain", {"model": {"dim": 8}}) as tracker:
            tracker.rewind(steps[0], {})
            for step in steps:
                tracker.report(step, {"tokens": step, "seconds": 1.0, "train/loss": float("nan")})
                tracker.sample(step, "a", "b")
            tracker.finish({"step": steps[-1], "val/loss": 2.0, "device": "cpu"})
        captured = capfd.readouterr()
        about = [line for line in (captured.out + captured.err).splitlines() if "wandb" in line.lower()]
        assert len(about) == 1
        assert "offline (no API key" in about[0]
        assert about[0].endswith("wandb sync runs/demo/wandb")
    recorded = list((folder / "wandb").glob("offline-run-*"))
    # Two sessions, one run: offline-run-<time>-<id>, with -1 appended if both began in the same second.
    assert len(recorded) == 2
    assert {path.name.split("-")[3] for path in recorded} == {run_id(folder)}


def read_log(path: Path) -> Iterator[Any]:
    """Records of a .wandb file: protobufs in LevelDB's log format, blocks of 32 KiB with 7 bytes before each chunk."""
    from wandb.proto import wandb_internal_pb2

    data, at, pending = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        pending += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last chunk
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(pending)
            pending = b""
            yield record


def test_what_is_recorded_carries_group_job_type_and_axes(tmp_path: Path) -> None:
    with Tracker(CONFIG, tmp_path, "demo", "finetune", {"model": {"dim": 8}}) as tracker:
        tracker.report(3, {"tokens": 5, "train/loss": 1.5})
        tracker.finish({"step": 3, "val/loss": 2.0, "device": "cpu"})
    sys.modules["wandb"].teardown()  # flushes its buffer
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = list(read_log(path))
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.run_group, run.job_type, run.display_name, run.run_id) == ("demo", "finetune", "demo", run_id(tmp_path))
    axes = {record.metric.name for record in records if record.HasField("metric")}
    assert {"step", "tokens", "seconds"} <= axes
    history = [
        {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert history[0]["step"] == "3"
    assert history[0]["train/loss"] == "1.5"


@pytest.mark.parametrize("broken_at", ["setup", "init", "log", "finish"])
def test_wandb_that_breaks_never_takes_the_run_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken_at: str
) -> None:
    import wandb

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of\ncheese")

    target: Any = wandb if broken_at in ("setup", "init") else wandb.Run
    monkeypatch.setattr(target, broken_at, broken)
    with Tracker(CONFIG, tmp_path, "demo", "pretrain", {}) as tracker:
        for step in range(3):
            tracker.report(step, {"train/loss": 1.0})
        tracker.finish({"step": 2, "device": "cpu"})
    monkeypatch.undo()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 3
    assert (tmp_path / "summary.json").is_file()
    warnings = [line for line in capsys.readouterr().out.splitlines() if "wandb stopped working" in line]
    assert len(warnings) == 1
    assert "out of cheese" in warnings[0]
    wandb.teardown()


def test_a_missing_library_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    said: list[str] = []
    run = WandbRun(CONFIG, tmp_path, "demo", "pretrain", {}, said.append)
    run.log({"step": 1})
    run.sample(1, "a", "b")
    run.finish({}, 0)
    assert len(said) == 1


def test_wandb_is_told_whether_a_run_is_done_failed_or_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    codes: list[int] = []
    finish = wandb.Run.finish

    def spy(self: wandb.Run, exit_code: int | None = None, **more: Any) -> None:
        codes.append(-1 if exit_code is None else exit_code)
        finish(self, exit_code=exit_code, **more)

    monkeypatch.setattr(wandb.Run, "finish", spy)
    with Tracker(CONFIG, tmp_path / "done", "a", "pretrain", {}) as tracker:
        tracker.finish({"device": "cpu"})
    with pytest.raises(KeyError), Tracker(CONFIG, tmp_path / "failed", "a", "pretrain", {}):
        raise KeyError
    with Tracker(CONFIG, tmp_path / "stopped", "a", "pretrain", {}):
        pass
    assert codes == [0, 1, 75]


def mode_with(monkeypatch: pytest.MonkeyPatch, config: WandbConfig, **variables: str) -> tuple[str, str]:
    import wandb

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    wandb.setup(wandb.Settings(silent=True))
    return choose_mode(config)


def test_the_mode_follows_environment_key_and_network(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    key = "0" * 40
    closed = f"http://127.0.0.1:{free_port()}"
    online = CONFIG.model_copy(update={"mode": "online"})
    offline = CONFIG.model_copy(update={"mode": "offline"})
    assert mode_with(monkeypatch, CONFIG, WANDB_BASE_URL=server)[0] == "offline"
    assert mode_with(monkeypatch, online)[0] == "offline"
    assert mode_with(monkeypatch, CONFIG, WANDB_API_KEY=key) == ("online", "")
    assert mode_with(monkeypatch, offline) == ("offline", "tracker.mode=offline")
    mode, reason = mode_with(monkeypatch, CONFIG, WANDB_BASE_URL=closed)
    assert (mode, closed in reason) == ("offline", True)
    assert mode_with(monkeypatch, online) == ("online", "")
    assert mode_with(monkeypatch, online, WANDB_MODE="offline") == ("offline", "WANDB_MODE=offline")
    assert mode_with(monkeypatch, online, WANDB_MODE="disabled")[0] == "disabled"


def test_a_server_that_refuses_the_run_leaves_it_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb
    from wandb.errors import CommError

    init = wandb.init

    def refuse_online(**settings: Any) -> wandb.Run:
        if settings["mode"] == "online":
            raise CommError("permission denied")
        return init(**settings)

    monkeypatch.setattr(wandb, "init", refuse_online)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with Tracker(CONFIG.model_copy(update={"mode": "online"}), tmp_path, "demo", "pretrain", {}) as tracker:
        tracker.report(1, {"train/loss": 1.0})
        tracker.finish({"device": "cpu"})
    assert "offline (permission denied)" in capsys.readouterr().out
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_reachable_means_that_anything_answers(server: str) -> None:
    assert reachable(server, 5.0)  # with 501, which is an answer
    assert not reachable(f"http://127.0.0.1:{free_port()}", 5.0)
    assert not reachable("nonsense", 5.0)


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(30) and [])
    try:
        assert not reachable("http://somewhere.invalid", 0.1)
    finally:
        release.set()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def test_a_moved_run_keeps_its_id_and_a_copy_gets_its_own(tmp_path: Path) -> None:
    one = run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") == one
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert run_id(tmp_path / "copy") == (other := run_id(tmp_path / "copy")) != one
    (tmp_path / "a").rename(tmp_path / "moved")
    assert run_id(tmp_path / "moved") == one
    shutil.copytree(tmp_path / "moved", tmp_path / "a")
    assert run_id(tmp_path / "a") not in (one, other)
    assert run_id(tmp_path / "moved") == one


def test_an_id_that_cannot_be_read_is_made_anew(tmp_path: Path) -> None:
    run_id(tmp_path)
    for content in ("", "[", "[]", '{"id": 3, "folder": "x"}', '{"id": "../../x", "folder": "x"}', "\x00"):
        (tmp_path / "wandb" / "run_id").write_text(content)
        assert len(run_id(tmp_path)) == 8
