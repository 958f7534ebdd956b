"""Every command of the page "Start from a model of others" runs, at tiny size, on stand-ins for the models it names."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from library_models import library_model
from page_commands import commands_of
from published import model_folder
from stand_ins import ALPACA, CHATS, MATHQA, PREFERENCES, RUNS, TINY, VOCABULARY, stand_in, write_data

from pretune.launch.command_line import main
from pretune.model.huggingface.families import FAMILIES

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "others.md"
MODELS = {
    "HuggingFaceTB/SmolLM-135M": ("llama tied, wide heads", "qwen2", False),
    "Qwen/Qwen2.5-0.5B": ("qwen2", "qwen2", True),
    "meta-llama/Llama-3.2-1B": ("llama 3.1", "llama3", False),
    "models/gpt2": ("gpt2", "gpt2", False),
}
"""Folders in place of the models on the hub: a folder of that name comes before the hub."""


def at_tiny_size(file: str, given: list[str]) -> Iterator[str]:
    """Overrides that make a run file small, where the command does not give them."""
    name = Path(file).stem
    data = CHATS if "sft" in name else ALPACA if "llama" in name else MATHQA
    if "stage=dpo" in given:
        data = PREFERENCES
    more = ["adapter.rank=2"] if "lora" in name else []
    more += ["quantization.block_size=32"] if "qlora" in name else []
    more += ["quantization.group_size=16"] if "quantization=qat_int8_int4" in given else []
    keys = {one.partition("=")[0] for one in given}
    small = {one.partition("=")[0]: one for one in (*TINY, *data, *more)}  # the last one counts
    yield from (override for key, override in small.items() if key not in keys)


@pytest.mark.slow
def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    for model, (case, tokenizer, template) in MODELS.items():
        stand_in(Path(model), case, tokenizer, template)
    mamba = model_folder(Path("state-spaces/mamba-130m-hf"), "qwen2")
    library_model("mamba", vocab_size=VOCABULARY).inner.save_pretrained(mamba)
    found = commands_of("how-to/others.md")
    assert len(found) >= 15
    for file, *given in found:
        monkeypatch.setattr(sys, "stdin", io.StringIO("2 cats?\n/quit\n"))
        shipped = file.startswith("src/config/run/")
        place = str(RUNS / Path(file).name) if shipped else file
        more = at_tiny_size(file, given) if shipped else ()
        assert main(["--config", place, *given, *more]) == 0, f"{file} {given}: {capsys.readouterr().err[-500:]}"


def test_it_names_every_family() -> None:
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `.*?` \|", PAGE.read_text(), re.MULTILINE))))
    assert set(FAMILIES) <= named
