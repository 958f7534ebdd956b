"""Claim: a mistake in the configuration is reported in under 1.5 s, before torch is imported.

    python benchmarks/startup.py [--runs 5]

Sides: a mistyped key, a value out of range, and, for comparison, `import torch` alone. Figures are the median seconds
of whole processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMOKE = ["src/main.py", "--config", "src/config/run/smoke.yaml"]
SIDES = {
    "mistyped_key": [*SMOKE, "optimizer.lrr=1"],
    "value_out_of_range": [*SMOKE, "model.num_layers=0"],
    "overview": ["src/main.py"],
    "import_torch": ["-c", "import torch"],
}


def main() -> None:
    """Time every side in turn; print a line for each, and the claim last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(runs):
        for side, arguments in SIDES.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=False)
            seconds[side].append(time.perf_counter() - started)
    medians = {side: round(statistics.median(times), 3) for side, times in seconds.items()}
    for side, median in medians.items():
        print(json.dumps({"side": side, "seconds": median}))
    slowest = max(medians["mistyped_key"], medians["value_out_of_range"])
    claim = "a mistake in the configuration is reported in under 1.5 s"
    print(json.dumps({"claim": claim, "ratio": round(slowest / 1.5, 3), "holds": slowest < 1.5, "seconds": medians}))


if __name__ == "__main__":
    main()
