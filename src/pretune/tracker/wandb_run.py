"""Weights & Biases, kept at arm's length: the only file that imports it, and its failures never reach the run."""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pretune.core.files import write_json
from pretune.tracker.config import WandbConfig
from pretune.tracker.metrics import METRICS

if TYPE_CHECKING:
    import wandb

STOPPED = 75
"""Exit code under which wandb shows a run as preempted, not failed."""

_SUMMARY = {"lower": "min,last", "higher": "max,last"}
"""What wandb's table of runs shows of a metric while the run goes on: the best value, and the newest."""

_RUN_ID = Path("wandb", "run_id")

_PROBE_SECONDS = 3.0
_INIT_SECONDS = 30.0
_FINISH_SECONDS = 120.0


class WandbRun:
    """A run in wandb, or nothing where wandb is disabled or broken; `say` shows a line to the user."""

    def __init__(
        self,
        config: WandbConfig,
        folder: Path,
        name: str,
        job_type: str,
        settings: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self._folder = folder
        self._run: wandb.Run | None = None
        self._samples: list[tuple[int, str, str]] = []
        self._guarded(lambda: self._open(config, name, job_type, settings))

    def log(self, row: Mapping[str, float]) -> None:
        """Send one row of metrics; `step` is among them, and is the axis."""
        # Without wandb's own step argument: after a resume it would refuse the steps that are done a second time.
        self._guarded(lambda: self._run and self._run.log({**row, **self._take_samples()}))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Keep a text for the table that goes out with the next row."""
        self._samples.append((step, prompt, text))

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Upload what is left, for a bounded time, and close the run; code 0 is done, STOPPED to be gone on with."""
        self._guarded(lambda: self._close(summary, exit_code))
        self._run = None

    def _open(self, config: WandbConfig, name: str, job_type: str, settings: Mapping[str, Any]) -> None:
        import wandb

        # Silent before anything else is asked of it; the settings of one process are shared by its runs.
        wandb.setup(wandb.Settings(silent=True))
        mode, reason = choose_mode(config)
        if mode == "disabled":
            return
        if mode == "online":
            try:
                self._run = self._init(config, name, job_type, settings, "online")
            except Exception as error:
                mode, reason = "offline", _one_line(error)
            else:
                self._say(f"wandb: {self._run.url}")
        if mode == "offline":
            self._run = self._init(config, name, job_type, settings, "offline")
            sync = f"wandb sync {_shown(self._folder / 'wandb')}"
            self._say(f"wandb: offline ({reason}); to upload the run later: {sync}")
        assert self._run is not None
        for axis in ("step", "tokens", "seconds"):
            self._run.define_metric(axis)
        # Charts open with steps across; tokens and seconds are in every row, so a chart's axis can be switched to them.
        self._run.define_metric("*", step_metric="step")
        for name, known in METRICS.items():
            if known.better is not None:
                self._run.define_metric(name, step_metric="step", summary=_SUMMARY[known.better])

    def _init(self, config: WandbConfig, name: str, job_type: str, settings: Mapping[str, Any], mode: Any) -> wandb.Run:
        import wandb

        return wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group or name,
            tags=list(config.tags),
            name=name,
            job_type=job_type,
            id=run_id(self._folder),
            # Offline there is nothing to look up, and wandb would say so.
            resume="allow" if mode == "online" else None,
            dir=str(self._folder),
            config=dict(settings),
            mode=mode,
            reinit="finish_previous",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,
                disable_code=True,
                save_code=False,
                disable_job_creation=True,
            ),
        )

    def _take_samples(self) -> dict[str, Any]:
        if not self._samples:
            return {}
        import wandb

        table = wandb.Table(columns=["step", "prompt", "text"], data=[list(sample) for sample in self._samples])
        self._samples = []
        return {"samples": table}

    def _close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        if self._run is None:
            return
        if last := self._take_samples():
            self._run.log(last)
        self._run.summary.update(dict(summary))
        if exit_code == STOPPED:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)

    def _guarded(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            kept = _shown(self._folder / "metrics.jsonl")
            self._say(f"wandb stopped working ({_one_line(error)}); the run goes on, its metrics are in {kept}")


def choose_mode(config: WandbConfig) -> tuple[str, str]:
    """`online`, `offline` or `disabled`, and the reason for the last two.

    What the environment and wandb's own settings say (WANDB_MODE, `wandb offline`) goes before the configuration.
    """
    import wandb

    settings = wandb.setup().settings
    variable = os.environ.get("WANDB_MODE")
    said = f"WANDB_MODE={variable}" if variable else "wandb's own settings"
    if settings.mode == "disabled":
        return "disabled", said
    if settings.mode in ("offline", "dryrun"):
        return "offline", said
    if config.mode == "offline":
        return "offline", "tracker.mode=offline"
    if not wandb.login(prompt=False, verify=False):
        return "offline", "no API key; `wandb login` sets one"
    if config.mode == "auto" and not reachable(settings.base_url, _PROBE_SECONDS):
        return "offline", f"no answer from {settings.base_url}"
    return "online", ""


def reachable(url: str, timeout: float) -> bool:
    """Whether anything answers HTTP at `url`, through the proxies of the environment, within `timeout` seconds."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=timeout).close()
        except urllib.error.HTTPError as error:
            error.close()  # an answer all the same
        except (OSError, ValueError):
            return
        answers.append(True)

    # Looking up a name has no timeout of its own: a thread that is left behind is how to bound it.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout)
    return bool(answers)


def run_id(folder: Path) -> str:
    """The id of this folder's run in wandb: made once and kept, so that a resumed run stays one run, moved or not. A
    copy of a run's folder is another run: it gets an id of its own.

    Raises OSError if it cannot be written.
    """
    known, here = _known_id(folder), folder.resolve()
    if known is not None and known.folder == here:
        return known.id
    copied = known is not None and _known_id(known.folder) == known
    own = secrets.token_hex(4) if known is None or copied else known.id
    write_json(folder / _RUN_ID, {"id": own, "folder": str(here)})
    return own


class _RunId(NamedTuple):
    id: str
    folder: Path
    """Where the run lay when it was last opened."""


def _known_id(folder: Path) -> _RunId | None:
    """The id in a run's folder, or None if there is none, or none that can be read."""
    try:
        known = json.loads((folder / _RUN_ID).read_text(encoding="utf-8"))
        return _RunId(known["id"], Path(known["folder"])) if re.fullmatch(r"[0-9a-f]{8}", known["id"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)
