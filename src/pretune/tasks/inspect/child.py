"""What the process of one candidate does: train it for its budget, as any run, and time how fast it writes.

A process each keeps failures and peaks of memory apart.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

from pretune.compute.allocator import is_out_of_memory
from pretune.core.config import UserError, validate
from pretune.core.files import write_json
from pretune.core.system_errors import explained
from pretune.data.loader import Loader
from pretune.run.assembly import assemble_evaluation
from pretune.run.config import RunConfig
from pretune.run.generator import assemble_generator
from pretune.run.out_of_memory import out_of_memory
from pretune.run.precision import resolve
from pretune.run.weights import evaluated_run
from pretune.tasks.train.task import train
from pretune.training.divergence import EXIT_DIVERGED

OUTCOME, LOG = "outcome.json", "log.txt"
"""Written into the candidate's folder: what was measured besides the run's own metrics, or why nothing was; and what
the run printed."""
SPEED, ERROR = "generation_tokens_per_second", "error"
"""The keys of OUTCOME."""

PROMPT, NEW, SECONDS = 32, 64, 2.0
"""Tokens of the prompt and of the text that are timed, and how long that is repeated."""


def measure(mapping: dict[str, Any], folder: Path) -> None:
    """Train the run of `mapping`, whose folder is `folder`, and write OUTCOME. A run that a signal stops has none: the
    next process goes on with it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    config = validate(RunConfig, mapping)
    try:
        code = train(config, mapping)
        if code == EXIT_DIVERGED:
            write_json(folder / OUTCOME, {ERROR: "its loss or gradients were no longer finite"})
        elif code == 0:
            write_json(folder / OUTCOME, {SPEED: generation_speed(config)})
            # What was measured stays; weights of some seconds of training are not worth their place.
            shutil.rmtree(folder / "checkpoints")
    except Exception as error:
        traceback.print_exc()
        write_json(folder / OUTCOME, {ERROR: _why(error, config)})


def _why(error: Exception, config: RunConfig) -> str:
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return str(out_of_memory(config))
    told = explained(error, config.output_dir) if isinstance(error, OSError) else None
    if isinstance(error, UserError) or told is not None:
        return " ".join(str(told or error).split())
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def generation_speed(config: RunConfig) -> float:
    """New tokens per second of one text after a prompt from the validation set, greedy, including the time to read the
    prompt: the median over SECONDS."""
    folder = evaluated_run(config)
    config = resolve(config, folder).config
    parts = assemble_evaluation(config, folder)
    generator = assemble_generator(config, config.samples, parts.model.eval(), parts.tokenizer, parts.device)
    decoder = generator.decoder
    first = Loader(parts.data.validation, config.data, config.seed).batch(0, 1).inputs[0]
    prompt = first[: min(PROMPT, decoder.limit // 2)].tolist()
    new = min(NEW, decoder.limit - len(prompt))

    def write() -> float:
        started = time.perf_counter()
        logits, cache = decoder.read([prompt], new)
        for _ in range(new - 1):
            logits = decoder.next(logits.argmax(-1), cache)
        logits.argmax(-1).tolist()  # waits for the device
        return new / (time.perf_counter() - started)

    with generator.autocast():
        began, speeds = time.perf_counter(), [write()]
        while time.perf_counter() - began < SECONDS:
            speeds.append(write())
    return statistics.median(speeds)


def outcome(folder: Path) -> dict[str, Any] | None:
    """What a process has written for a candidate; None if it has not."""
    try:
        found = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
