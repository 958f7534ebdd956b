"""task=inspect: the table of models, against transformers and huggingface_hub."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fake_hub import SHA, serve
from huggingface_hub import ModelCard, get_local_safetensors_metadata
from stand_ins import VOCABULARY, stand_in
from start_runs import write_run

from pretune.launch.command_line import main

MAIN = Path(__file__).parents[3] / "src" / "main.py"
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# A model\n"
TRAINED = """\
stage: {kind: pretrain, init_from: models/llama}
budget: {steps: 2}
batch: {tokens: 128, micro_batch: 2}
evaluation: {every: 1}
checkpoint: {every: 1}
"""


def mixtral(folder: Path) -> None:
    """A mixture of experts, which Pretune's transformer cannot hold."""
    shape = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "max_position_embeddings": 96}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape, **more)).save_pretrained(folder)


def own_code(folder: Path) -> None:
    """A model that only its own code builds."""
    folder.mkdir()
    about = {"model_type": "openelm", "auto_map": {"AutoConfig": "code.Config"}, "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins in models/, a trained run in runs/tuned, and a run file."""
    root = tmp_path_factory.mktemp("inspect")
    models = root / "models"
    stand_in(models / "llama", "llama 3.1", "llama3", tie_word_embeddings=False)
    (models / "llama" / "README.md").write_text(CARD)
    stand_in(models / "qwen2", "qwen2", "qwen2", template=False)
    (models / "qwen2" / "LICENSE").write_text("\n  Qwen RESEARCH LICENSE AGREEMENT\n\nBy using ...\n")
    weights = transformers.AutoModelForCausalLM.from_pretrained(models / "qwen2", dtype=torch.bfloat16)
    weights.save_pretrained(models / "qwen2", max_shard_size="20KB")
    (models / "qwen2" / "model.safetensors").unlink(missing_ok=True)
    stand_in(models / "gemma3", "gemma3", "gemma")
    mixtral(models / "mixtral")
    own_code(models / "openelm")
    stand_in(models / "broken", "llama", "llama3")
    whole = (models / "broken" / "model.safetensors").read_bytes()
    (models / "broken" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    texts = ("".join(f"the cat and the dog number {n} " * 3) for n in range(40))
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_run(root / "run.yaml", "texts.jsonl", TRAINED)
    before = os.getcwd()
    os.chdir(root)
    try:
        assert main(["--config", "run.yaml"]) == 0
    finally:
        os.chdir(before)
    return root


@pytest.fixture(scope="module")
def hub(place: Path) -> Iterator[str]:
    files = {path.name: path.read_bytes() for path in (place / "models" / "qwen2").iterdir()}
    pickled = {"config.json": files["config.json"], "pytorch_model.bin": b"0"}
    with serve({"models/me/qwen": files | {"README.md": CARD.encode()}, "models/me/pickled": pickled}) as endpoint:
        yield endpoint


MODELS = "tuned,models/llama,models/qwen2,models/gemma3,models/mixtral,models/openelm,models/broken,models/none"


@pytest.fixture(scope="module")
def printed(place: Path, hub: str) -> subprocess.CompletedProcess[str]:
    """What is printed for all of them, in a process that has the hub's address from its beginning."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    names = f"{MODELS},me/qwen,me/pickled,me/none,model=smollm_135m"
    command = [sys.executable, str(MAIN), "--config", "run.yaml", "name=choice", "task=inspect"]
    return subprocess.run(
        [*command, f"inspect.models=[{names}]", "inspect.context=64", "inspect.device=16GiB"],
        env=inherited | {"HF_ENDPOINT": hub, "HF_HOME": str(place / "hf"), "COLUMNS": "100"},
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def table(place: Path, printed: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    """models.csv by model."""
    assert printed.returncode == 0, printed.stderr
    with (place / "runs/choice/models.csv").open(newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def counted(model: Any) -> tuple[int, int]:
    """Parameters by transformers, and without the embedding and the head."""
    head = model.get_output_embeddings().weight
    untied = 0 if head is model.get_input_embeddings().weight else head.numel()
    return model.num_parameters(), model.num_parameters(exclude_embeddings=True) - untied


@pytest.mark.parametrize("name", ["models/llama", "models/qwen2", "models/gemma3", "models/mixtral"])
def test_the_figures_are_those_of_transformers(name: str, place: Path, table: dict[str, dict[str, str]]) -> None:
    row = table[name]
    config = transformers.AutoConfig.from_pretrained(place / name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert (int(row["parameters"]), int(row["without embeddings"])) == counted(model)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    assert (int(row["heads"]), int(row["KV heads"])) == (heads, kv_heads)
    sizes = [size for size in range(1, heads + 1) if heads % size == kv_heads % size == 0]
    assert row["tensor-parallel sizes"] == ", ".join(map(str, sizes))
    assert int(row["layers"]) == config.num_hidden_layers
    assert (int(row["width"]), int(row["vocabulary"])) == (config.hidden_size, config.vocab_size)
    assert int(row["context"]) == config.max_position_embeddings
    assert row["architecture"] == config.model_type
    rope = config.rope_parameters
    assert float(row["RoPE theta"]) == rope.get("full_attention", rope)["rope_theta"]
    if "sliding_attention" in rope:
        assert float(row["in windows"]) == rope["sliding_attention"]["rope_theta"]
    stored = get_local_safetensors_metadata(place / name).parameter_count
    assert {"F32": "float32", "BF16": "bfloat16"}[max(stored, key=lambda one: stored[one])] == row["dtype"]
    if name != "models/mixtral":
        tokenizer = transformers.AutoTokenizer.from_pretrained(place / name)
        assert row["chat template"] == str(tokenizer.chat_template is not None)
        assert f"eos {tokenizer.eos_token}" in row["special tokens"]


def test_positions_that_are_stretched_say_by_which_rule(table: dict[str, dict[str, str]]) -> None:
    assert table["models/llama"]["RoPE scaling"] == "llama3 x 8"
    assert table["models/gemma3"]["RoPE scaling"] == "linear x 4"
    assert table["models/qwen2"]["RoPE scaling"] == ""


def test_licences_come_from_the_card_or_the_licence_file(place: Path, table: dict[str, dict[str, str]]) -> None:
    assert table["models/llama"]["licence"] == ModelCard.load(place / "models/llama/README.md").data.license
    assert table["models/qwen2"]["licence"] == "Qwen RESEARCH LICENSE AGREEMENT"
    assert table["models/gemma3"]["licence"] == ""
    assert table["me/qwen"]["licence"] == "apache-2.0"


def test_a_model_on_the_hub_is_read_without_its_weights(place: Path, table: dict[str, dict[str, str]]) -> None:
    shared = set(table["models/qwen2"]) - {"model", "is a", "licence"}
    assert {key: table["me/qwen"][key] for key in shared} == {key: table["models/qwen2"][key] for key in shared}
    there = {path.name for path in place.glob(f"hf/hub/models--me--qwen/snapshots/{SHA}/*")}
    assert "config.json" in there
    assert not any(name.endswith(".safetensors") for name in there)


def test_what_trains_a_model_and_why_not_our_transformer(table: dict[str, dict[str, str]], place: Path) -> None:
    markdown = (place / "runs/choice/models.md").read_text()
    line = next(line for line in markdown.splitlines() if line.startswith("| trained by"))
    assert "model=transformers (model_type = mixtral)" in line
    assert "which is never run)" in line
    assert table["models/openelm"]["context"] == "2048"
    full, experts = (int(table["models/mixtral"][key]) for key in ("memory: full fine-tuning", "parameters"))
    assert full > 16 * experts
    assert table["models/openelm"]["memory: full fine-tuning"] == ""


def test_a_model_that_cannot_be_read_has_a_row_that_says_why(
    table: dict[str, dict[str, str]], printed: subprocess.CompletedProcess[str], place: Path
) -> None:
    for name, why in {
        "models/broken": "download it again",
        "models/none": "neither a run in runs, nor a folder, nor owner/name on the hub",
        "me/pickled": "a pickle",
        "me/none": "me/none",
    }.items():
        assert why in table[name]["error"]
        assert f"{name}: {table[name]['error']}" in printed.stderr
        assert f"- {name}: " in (place / "runs/choice/models.md").read_text()
    assert not any(table[name]["error"] for name in ("tuned", "models/llama", "me/qwen", "model=smollm_135m"))


def test_a_run_says_where_it_is(table: dict[str, dict[str, str]], place: Path) -> None:
    row, run = table["tuned"], place / "runs/tuned"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss, step = min((one["val/loss"], one["step"]) for one in rows if "val/loss" in one)
    assert (row["stage"], row["step"], row["complete"]) == ("pretrain", "2", "True")
    assert row["best"] == f"{loss:.4f} at step {step}"
    assert int(row["on disk"]) == sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert row["dtype"] == "float32"
    assert row["parameters"] == table["models/llama"]["parameters"]


def test_memory_grows_with_what_is_trained(place: Path, table: dict[str, dict[str, str]]) -> None:
    row = table["model=smollm_135m"]
    parameters = int(row["parameters"])
    assert parameters == 134_515_008  # HuggingFaceTB/SmolLM-135M
    ways = ("full fine-tuning", "LoRA", "QLoRA", "generation")
    full, lora, qlora, generation = (int(row[f"memory: {way}"]) for way in ways)
    assert generation < qlora < lora < full
    assert full > 16 * parameters  # weights, gradients and two moments in float32
    config = transformers.AutoConfig.from_pretrained(place / "models/llama")
    cache = transformers.DynamicCache(config=config)
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "models/llama", dtype=torch.bfloat16)
    model(torch.zeros(1, 64, dtype=torch.int64), past_key_values=cache)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert int(table["models/llama"]["memory: generation"]) == pytest.approx(weights + kept + 4 * VOCABULARY, rel=0.01)


def test_every_line_fits_the_terminal(printed: subprocess.CompletedProcess[str]) -> None:
    shown = printed.stdout.partition("Memory:")[0].splitlines()
    assert max(map(len, shown)) <= 100
    assert sum(line.startswith("parameters ") for line in shown) > 1, "several tables, one below the other"


def test_nothing_to_compare_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(place)
    assert main(["--config", "run.yaml", "task=inspect"]) == 2
    assert "inspect.models, which is empty" in capsys.readouterr().err
    assert main(["--config", "run.yaml", "task=inspect", "inspect.models=[models/broken,nothing]"]) == 2
    assert "nothing: neither a run" in capsys.readouterr().err
    assert main(["--config", "run.yaml", "task=inspect", "inspect.models=[tuned]", "inspect.device=h101"]) == 2
    assert "did you mean 'h100'" in capsys.readouterr().err
