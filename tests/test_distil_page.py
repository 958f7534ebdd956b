"""Every command of the page "Distil a bigger model into a small one" runs, at tiny size, on stand-ins for its
models."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_commands import commands_of
from stand_ins import CHATS, RUNS, TINY, stand_in, write_data

from pretune.launch.command_line import main


@pytest.mark.slow
def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    for model in ("HuggingFaceTB/SmolLM-135M", "HuggingFaceTB/SmolLM-360M"):
        stand_in(Path(model), "llama tied, wide heads", "qwen2", False)
    found = commands_of("how-to/distil.md")
    assert len(found) >= 7
    for file, *given in found:
        name, shipped = Path(file).stem, file.startswith("src/config/run/")
        more = [*TINY, *(CHATS if "sft" in name else ())] if shipped else []
        if name in ("quickstart_pretrain", "distill_small"):
            more += ["budget={steps: 2, time: null, count: []}", "model.vocab_size=1024",
            "data/source=python_docs_small",
                     "model.dim=32", "model.num_layers=1", "data.validation.fraction=0.2"]  # fmt: skip
        more += ["quantization.group_size=16"] if "quantization=qat_int8_int4" in given else []
        place = str(RUNS / Path(file).name) if shipped else file
        assert main(["--config", place, *given, *more]) == 0, f"{file} {given}: {capsys.readouterr().err[-500:]}"
