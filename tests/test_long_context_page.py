"""Every command of the page "Stretch the context" runs, at tiny size, on a stand-in for its model."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_commands import commands_of
from stand_ins import RUNS, TINY, stand_in, write_data

from pretune.launch.command_line import main

SMALL = (
    "data/source@data.source.text=python_docs_small", "data.source.num_examples=60", "data.source.min_length=70",
    "data.source.max_length=100", "data.sequence_length=128", "data/mix=none", "model.max_sequence_length=256",
    "data.validation.fraction=0.2", "budget.steps=2", "batch.tokens=256", "batch.micro_batch=2",
)  # fmt: skip
ASKED = (
    "data/source@evaluation.retrieval.source.text=python_docs_small", "evaluation.retrieval.lengths=[64,100]",
    "evaluation.retrieval.examples=1", "model.max_sequence_length=256",
)  # fmt: skip


@pytest.mark.slow
def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    stand_in(Path("HuggingFaceTB/SmolLM-135M"), "llama tied, wide heads", "qwen2", False)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "some.jsonl").write_text('{"text": "a cat sees a dog under a red house and runs"}\n')
    found = commands_of("how-to/long-context.md")
    assert len(found) == 4
    for file, *given in found:
        shipped = file.startswith("src/config/run/")
        keys = {one.partition("=")[0] for one in given}
        small = [one for one in ((*TINY, *SMALL) if shipped else ASKED) if one.partition("=")[0] not in keys]
        sizes = ASKED if not shipped else ()
        place = str(RUNS / Path(file).name) if shipped else file
        assert main(["--config", place, *given, *small, *sizes]) == 0, (
            f"{file} {given}: {capsys.readouterr().err[-500:]}"
        )
