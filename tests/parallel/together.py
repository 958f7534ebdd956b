"""Runs in several processes of this machine, as torchrun starts them: several runs one after the other by one start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SRC = Path(__file__).parent.parent.parent / "src"
LIMIT = 240
"""Seconds after which a start is given up."""


def together(
    mappings: Sequence[Mapping[str, Any]], processes: int, folder: Path, *, signals: str = "", restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Train the runs of these configurations in `processes` processes, and return what they printed.

    A configuration may be a list: one for each rank. `signals`: `RANK STEP NAME`, a signal that a process sends to
    itself when that step begins, in its first start.
    """
    file = folder / "mappings.json"
    file.write_text(json.dumps(mappings))
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [sys.executable, *start, f"--max-restarts={restarts}", __file__, str(file), *signals.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SRC), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def _main(file: str, rank: str = "", step: str = "", name: str = "") -> None:
    from pretune.core.config import UserError
    from pretune.core.terminal import warn
    from pretune.dispatch import run
    from pretune.optim.budget import Step
    from pretune.tasks.train.running import Instruments, Run

    def on_begin(training: Run, what: object) -> None:
        here = os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if here and isinstance(what, Step) and training.state.step == int(step):
            os.kill(os.getpid(), signal.Signals[name])

    for mapping in json.loads(Path(file).read_text()):
        own = mapping[int(os.environ["RANK"])] if isinstance(mapping, list) else mapping
        try:
            code = run(own, Instruments(on_begin=on_begin))
        except UserError as error:
            warn(f"error: {error}")
            code = 2
        if code:
            sys.exit(code)


if __name__ == "__main__":
    _main(*sys.argv[1:])
