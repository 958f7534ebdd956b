"""Part of quantization.py: speed and memory of decoding with a run's weights, rounded or not, or with its .pte.

On its own it measures nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from side_by_side import peak_memory, reset_peak_memory

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from pretune.core.config import validate
from pretune.run.config import RunConfig

PROMPT, NEW, REPEATS = 32, 64, 3


def decode(variant: str, run: Path, rounding: Sequence[str]) -> dict[str, float]:
    """New tokens per second after one prompt, and the peak memory this takes, including the model."""
    from pretune.compute.device import pick_device
    from pretune.compute.precision import autocast
    from pretune.generation.decode import Decoder, Vocabulary
    from pretune.run.folder import find_run, read_config
    from pretune.run.model import evaluation_model

    config = configured(read_config(run / "config.yaml"), variant, rounding)
    device = pick_device(config.device)
    at_rest = reset_peak_memory(device.type)
    model = evaluation_model(config, find_run(config.name, config.output_dir), device).eval()
    decoder = Decoder(model, Vocabulary(config.model.vocab_size, frozenset()), device, None)
    with autocast(config.precision, device):
        return {"tokens_per_second": writing_speed(decoder), "peak_bytes": peak_memory(device.type) - at_rest}


def configured(settings: dict[str, Any], variant: str, rounding: Sequence[str]) -> RunConfig:
    """The configuration of a run, as generation would use it with the weights of a variant."""
    changes: dict[str, Any] = {"task": "generate"}
    if variant != "bf16":
        values = dict(key.removeprefix("quantization.").split("=") for key in rounding)
        section = {"kind": variant, **values, "group_size": int(values["group_size"])}
        changes["quantization"] = section | ({"start": 0.0} if variant.startswith("qat") else {})
    return validate(RunConfig, {**settings, **changes})


def decode_program(files: Path) -> dict[str, float]:
    """The same for an exported .pte in ExecuTorch's runtime, and its size."""
    from pretune.generation.decode import Decoder, Vocabulary
    from pretune.runtimes.executorch.program import Program, load_runtime
    from pretune.runtimes.manifest import PROGRAM

    load_runtime()
    at_rest, about = reset_peak_memory("cpu"), json.loads((files / "pretune.json").read_text())
    vocabulary = Vocabulary(about["vocab_size"], frozenset())
    decoder = Decoder(Program(files / PROGRAM), vocabulary, torch.device("cpu"))
    return {
        "program_tokens_per_second": writing_speed(decoder),
        "program_peak_bytes": peak_memory("cpu") - at_rest,
        "program_bytes": (files / PROGRAM).stat().st_size,
    }


def writing_speed(decoder: Any) -> float:
    """New tokens per second after one prompt, with greedy decoding, including the time to read the prompt."""
    seconds = []
    for _ in range(REPEATS + 1):  # the first is a warm-up
        started = time.perf_counter()
        logits, cache = decoder.read([list(range(1, PROMPT + 1))], NEW)
        for _ in range(NEW - 1):
            logits = decoder.next(logits.argmax(-1), cache)
        seconds.append(time.perf_counter() - started)
    return NEW / statistics.median(seconds[1:])
