"""task=inspect inspect.on=RUN_FILE: candidates measured on a run's data, one process each."""

from __future__ import annotations

import csv
import io
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
import transformers
import yaml
from stand_ins import stand_in
from start_runs import write_run

from pretune.launch.command_line import main
from pretune.tasks.inspect.figure import draw_tradeoff, unbeaten
from pretune.tasks.inspect.measure import Measured
from pretune.tasks.inspect.measured_table import MeasuredRow, measured_columns
from pretune.tasks.inspect.table import texts

MAIN = Path(__file__).parents[3] / "src" / "main.py"
KEYS = """\
stage: {kind: pretrain, init_from: models/none}
budget: {steps: 20}
batch: {tokens: 256, micro_batch: 2}
evaluation: {every: 50}
threads: 1
"""
HELD_OUT = [f"{n} dogs and a cat ate the mat of {n * 7} houses" for n in range(12)]
ON = (
    "data/source@data.validation.source=files",
    "data.validation.source.files=[held_out.jsonl]",
    "data.validation.fraction=null",
    "data.packing.mode=documents",
    "data.packing.isolate=true",
)
"""The texts in HELD_OUT are held out, each whole and seen by no other: what transformers can compute too."""
MODELS = ("models/llama", "models/qwen2", "tuned", "models/mixtral", "model=nano")


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins, a run, and a run file whose own start does not exist."""
    root = tmp_path_factory.mktemp("measured")
    stand_in(root / "models/llama", "llama 3.1", "llama3")
    stand_in(root / "models/qwen2", "qwen2", "qwen2")
    shape = {"vocab_size": 448, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    mixtral = transformers.MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3)
    transformers.MixtralForCausalLM(mixtral).save_pretrained(root / "models/mixtral")  # which has no tokenizer
    write_texts(root / "texts.jsonl", [f"the cat number {n} sat on the mat, and {n} dogs ate it" for n in range(60)])
    write_texts(root / "held_out.jsonl", HELD_OUT)
    write_run(root / "run.yaml", "texts.jsonl", KEYS)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        tuned = ("name=tuned", "stage.init_from=models/qwen2", *ON)
        assert main(["--config", "run.yaml", *tuned]) == 0
    return root


def command(*more: str) -> list[str]:
    names = ",".join(MODELS)
    asked = ("name=choice", "task=inspect", f"inspect.models=[{names}]", "inspect.on=run.yaml", "inspect.seconds=1")
    return ["--config", "run.yaml", *asked, *ON, *more]


@pytest.fixture(scope="module")
def printed(place: Path) -> subprocess.CompletedProcess[str]:
    done = [sys.executable, str(MAIN), *command()]
    return subprocess.run(done, cwd=place, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def table(place: Path, printed: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    assert printed.returncode == 0, printed.stderr
    with (place / "runs/choice/measured.csv").open(newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def bits_per_byte(folder: Path) -> float:
    """Of the held-out texts, by transformers in float64: each a document that ends in EOS."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    nats, num_bytes = 0.0, 0
    for text in HELD_OUT:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        nats += float(losses.sum())
        num_bytes += len(tokenizer.decode(ids[0, 1:-1]).encode())
    return nats / math.log(2) / num_bytes


@pytest.mark.parametrize("name", ["models/llama", "models/qwen2"])
def test_what_an_untrained_model_knows_is_what_transformers_says(
    name: str, place: Path, table: dict[str, dict[str, str]]
) -> None:
    assert float(table[name]["bits/byte, zero-shot"]) == pytest.approx(bits_per_byte(place / name), rel=1e-4)


def test_a_run_is_measured_from_its_checkpoint(place: Path, table: dict[str, dict[str, str]]) -> None:
    rows = [json.loads(line) for line in (place / "runs/tuned/metrics.jsonl").read_text().splitlines()]
    last = next(row["val/bits_per_byte"] for row in reversed(rows) if "val/bits_per_byte" in row)
    assert float(table["tuned"]["bits/byte, zero-shot"]) == pytest.approx(last, rel=1e-5)


def test_each_has_its_seconds_of_training_and_its_speeds(place: Path, table: dict[str, dict[str, str]]) -> None:
    measured = [table[name] for name in MODELS if not table[name]["error"]]
    assert len(measured) == 3
    for row in measured:
        if row["model"] != "tuned":  # which has seen all it can learn from
            # Not that it is less: how far a second reaches depends on the machine.
            assert float(row["bits/byte, after 1 s"]) != float(row["bits/byte, zero-shot"])
        assert min(float(row[key]) for key in ("tokens/s, training", "tokens/s, generation", "peak memory")) > 0
        assert row["fits here"] == "full fine-tuning, LoRA, QLoRA"
    configs = list(place.glob("runs/choice/candidates/*/config.yaml"))
    for path in configs:
        said = yaml.safe_load(path.read_text())
        assert (said["budget"]["time"], said["budget"]["steps"]) == (1.0, None)
        assert not (path.parent / "checkpoints").exists(), "weights are not kept"
    assert len(configs) == 3


def test_what_cannot_be_measured_says_why(
    table: dict[str, dict[str, str]], printed: subprocess.CompletedProcess[str]
) -> None:
    assert "no tokenizer" in table["models/mixtral"]["error"]
    assert "vocab" in table["model=nano"]["error"] or "tokenizer" in table["model=nano"]["error"]
    for name in ("models/mixtral", "model=nano"):
        assert f"{name}: {table[name]['error']}" in printed.stderr


def test_the_trade_off_is_drawn_and_on_the_page(place: Path, table: dict[str, dict[str, str]]) -> None:
    choice = place / "runs/choice"
    picture = matplotlib.image.imread(io.BytesIO((choice / "tradeoff.png").read_bytes()))
    assert picture.shape[0] > 400
    page = (choice / "inspect.html").read_text()
    assert page.count("<table>") == 2
    assert "data:image/png;base64" in page
    assert all(name in page for name in ("models/llama", "models/qwen2", "tuned"))


@pytest.mark.slow
def test_the_same_command_measures_nothing_twice(place: Path, table: dict[str, dict[str, str]]) -> None:
    def measured() -> dict[Path, int]:
        """Those that could be measured; what failed is tried again."""
        every = place.glob("runs/choice/candidates/*/outcome.json")
        return {path: path.stat().st_mtime_ns for path in every if "mixtral" not in str(path)}

    outcomes = measured()
    assert len(outcomes) == 3
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        assert main(command()) == 0
    assert measured() == outcomes
    with (place / "runs/choice/measured.csv").open(newline="") as file:
        assert {row["model"]: row for row in csv.DictReader(file)} == table


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(place: Path, table: dict[str, dict[str, str]]) -> None:
    # The second is a candidate that is new with this budget; the first was measured above.
    other = [one.replace("inspect.seconds=1", "inspect.seconds=600").replace("choice", "long") for one in command()]
    process = subprocess.Popen([sys.executable, str(MAIN), *other], cwd=place, stdout=-1, stderr=-1, text=True)
    log = "runs/long/candidates/*/metrics.jsonl"
    while process.poll() is None and not list(place.glob(log)):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped before anything was measured; run the same command to go on" in out
    assert list(place.glob("runs/long/candidates/*/checkpoints/*")), "it goes on from there"


def measured(name: str, bits: float, accuracy: float | None, speed: float) -> Measured:
    rows: list[dict[str, Any]] = [{"step": 0, "seconds": 0.0, "val/bits_per_byte": bits + 1}]
    rows.append({"step": 9, "seconds": 9.0, "val/bits_per_byte": bits})
    if accuracy is not None:
        rows[-1] |= {"mathqa/accuracy": accuracy, "mathqa/accuracy_error": 0.02, "mathqa/chance": 0.2}
    summary = {"step": 9, "seconds": 10.0, "tokens": 5000, "peak_memory_bytes": 2**29}
    return Measured(name, Path(name), rows, summary, speed)


def test_accuracies_have_columns_and_panels_of_their_own() -> None:
    three = [measured("a", 1.0, 0.5, 90.0), measured("b", 2.0, None, 50.0), measured("c", 0.5, 0.6, 20.0)]
    rows = [MeasuredRow(one, 1000, ()) for one in three]
    header, body = texts(measured_columns(rows, 10.0, "here"), rows)
    first = dict(zip(header, body[0], strict=True))
    assert first["mathqa/accuracy, after 10 s"] == "50.0% ± 2.0%"
    assert (first["guessing"], first["tokens/s, training"], first["fits here"]) == ("20.0%", "500", "nothing")
    with_accuracy = matplotlib.image.imread(io.BytesIO(draw_tradeoff(three)))
    without = matplotlib.image.imread(io.BytesIO(draw_tradeoff(three[1:2])))
    assert with_accuracy.shape[0] == 2 * without.shape[0]


def test_a_model_is_unbeaten_unless_another_is_better_in_one_and_not_worse_in_the_other() -> None:
    assert unbeaten([(1, 5), (2, 4), (2, 3), (3, 1), (0, 5), (3, 1)]) == [0, 1, 3, 5]
