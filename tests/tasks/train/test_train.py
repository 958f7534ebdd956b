"""The training loop, run on a tiny model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import rows, series
from safetensors.torch import load_file

from pretune.core.config import ConfigError, InputError, validate
from pretune.data.formats.build import build_formatter
from pretune.data.formats.documents import problems
from pretune.dispatch import run
from pretune.optim.budget import Step
from pretune.optim.config import Overhead
from pretune.optim.trace import read_trace
from pretune.run.config import RunConfig
from pretune.run.model import evaluation_model
from pretune.run.tokenizer import assemble_tokenizer
from pretune.run.weights import evaluated_run
from pretune.tasks.train.running import Instruments, Run

Compose = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.removeprefix("step_")))
    return load_file(newest / "model.safetensors")


def test_a_run_leaves_what_the_design_promises(tiny: Compose, tmp_path: Path) -> None:
    samples = ("samples.every=10", "samples.prompts=[The cat]")
    assert run(tiny("name=one", "precision=bf16", *samples, "report.after_training=true")) == 0
    folder = tmp_path / "runs" / "one"
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "samples.jsonl", "report.html", "tokenizer"} <= names
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000010", "step_00000020"]
    assert [row["step"] for row in rows(folder) if "train/loss" in row] == [5, 10, 15, 20]
    assert [row["step"] for row in rows(folder) if "val/loss" in row] == [0, 10, 20]
    losses = series(folder, "val/loss")
    assert losses[-1] < losses[0] - 0.5
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == 20
    assert summary["tokens"] == 20 * 256
    assert summary["val/loss"] == losses[-1]


def test_the_learning_rate_ends_where_the_schedule_does(tiny: Compose, tmp_path: Path) -> None:
    overrides = ["schedule=linear", "schedule.warmup=0.25", "log_every=1", "budget.steps=8", "optimizer.lr=1e-3"]
    assert run(tiny("name=one", *overrides)) == 0
    rates = series(tmp_path / "runs" / "one", "train/lr")
    expected = [0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert rates == pytest.approx([1e-3 * factor for factor in expected], abs=1e-9)


def test_no_step_is_lost_when_only_the_clock_ends_the_run(tiny: Compose, tmp_path: Path) -> None:
    overrides = ["schedule=cosine", "schedule.warmup=0.5", "log_every=1", "budget.steps=null", "budget.time=0.2s"]
    assert run(tiny("name=one", *overrides)) == 0
    assert min(series(tmp_path / "runs" / "one", "train/lr")) > 0


@pytest.mark.parametrize("packing", ["stream", "documents", "none"])
def test_the_same_updates_whatever_the_micro_batch(packing: str, tiny: Compose, tmp_path: Path) -> None:
    settings = ["budget.steps=4", f"data.packing.mode={packing}", "log_every=1", "precision=fp32"]
    settings += ["data.packing.isolate=true", "precision.compile=false"]
    for micro_batch in (8, 4, 1):
        assert run(tiny(f"name=m{micro_batch}", f"batch.micro_batch={micro_batch}", *settings)) == 0
    runs = tmp_path / "runs"
    for other in ("m4", "m1"):
        for name, tolerance in (("train/loss", 1e-5), ("train/grad_norm", 1e-4)):
            assert series(runs / other, name) == pytest.approx(series(runs / "m8", name), abs=tolerance)


def test_compiled_is_the_same_training(tiny: Compose, tmp_path: Path) -> None:
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        settings = ["precision=fp32", f"precision.compile={compiled}", "budget.steps=3", "log_every=1"]
        assert run(tiny(f"name={name}", *settings)) == 0
    runs = tmp_path / "runs"
    assert series(runs / "compiled", "train/loss") == pytest.approx(series(runs / "eager", "train/loss"), abs=1e-4)
    assert not any("_orig_mod" in name for name in final_weights(runs / "compiled"))
    # Compiling runs a batch that counts toward no budget and leaves the random generator unchanged.
    assert rows(runs / "compiled")[-1]["tokens"] == rows(runs / "eager")[-1]["tokens"]


class SimulatedTime:
    """A clock that stands, except that what begins moves it by `seconds(what)`."""

    def __init__(self, seconds: Callable[[Step | Overhead], float]) -> None:
        self.now, self.seconds = 0.0, seconds

    def instruments(self) -> Instruments:
        """Instruments of a run that takes this time, on a device that need not be measured."""
        return Instruments(lambda: self.now, lambda device, precisions: 1e12, self.pass_by)

    def pass_by(self, run: Run, what: Step | Overhead) -> None:
        if run.state.finished and run.saved:
            return  # what evaluates the model as it is converted: here, nothing is
        self.now += self.seconds(what)


def test_timed_runs_end_within_one_percent_at_the_schedules_end(tiny: Compose, tmp_path: Path) -> None:
    """Sixty steps of four micro-batches, uneven by a third; evaluation and checkpoints are not counted."""
    generator = random.Random(1)

    def seconds(what: Step | Overhead) -> float:
        if isinstance(what, Step):
            return generator.uniform(0.7, 1.3) * what.tokens / 256
        return {"evaluation": 7.0, "checkpoint": 3.0}.get(what, 0.0)

    instruments = SimulatedTime(seconds).instruments()
    settings = ["schedule=linear", "budget.steps=null", "budget.time=1m", "batch.micro_batch=2", "samples.prompts=[]"]
    for number in range(5):
        assert run(tiny(f"name=run{number}", f"seed={number}", *settings), instruments) == 0
        summary = summary_of(tmp_path / "runs" / f"run{number}")
        assert summary["seconds"] == pytest.approx(60, rel=0.01)
        assert summary["train/lr"] == 0.0
        assert summary["time/evaluation"] == 7.0 * (1 + -(-summary["step"] // 10))
        trace = read_trace(tmp_path / "runs" / f"run{number}" / "progress.txt")
        assert len(trace) == summary["step"]


@pytest.mark.parametrize("count", ["[]", "[evaluation]", "[evaluation,checkpoint]"])
def test_a_budget_may_count_more_than_training(count: str, tiny: Compose, tmp_path: Path) -> None:
    """The final evaluation and checkpoint are paid for too, where they count."""
    seconds = {"evaluation": 5.0, "checkpoint": 2.0}
    simulated = SimulatedTime(lambda what: 1.0 if isinstance(what, Step) else seconds.get(what, 0.0))
    settings = ["budget.steps=null", "budget.time=100s", "samples.prompts=[]"]
    assert run(tiny("name=one", f"budget.count={count}", *settings), simulated.instruments()) == 0
    summary, newest = summary_of(tmp_path / "runs" / "one"), rows(tmp_path / "runs" / "one")[-1]
    counted = sum(summary[f"time/{kind}"] for kind in ("evaluation", "checkpoint") if kind in count)
    assert counted == 0 if count == "[]" else counted > 30
    assert summary["seconds"] == summary["step"]
    assert summary["seconds"] + counted == pytest.approx(100, rel=0.01)
    assert summary["train/lr"] == pytest.approx(0.1 * 3e-3), "the schedule's end"
    assert summary["time/compilation"] == 0
    assert newest["time/evaluation"] == summary["time/evaluation"]


def test_a_timed_run_is_replayed_bit_for_bit(tiny: Compose, tmp_path: Path) -> None:
    settings = ["model.dropout=0.1", "schedule=linear", "budget.steps=null", "batch.micro_batch=2", "log_every=1"]
    assert run(tiny("name=timed", "budget.time=1s", *settings)) == 0
    runs = tmp_path / "runs"
    for name, replay in (("again", "timed"), ("once_more", runs / "again" / "progress.txt")):
        # Evaluating more often changes only durations.
        assert run(tiny(f"name={name}", f"budget.replay={replay}", "evaluation.every=4", *settings)) == 0
        assert (runs / name / "progress.txt").read_text() == (runs / "timed" / "progress.txt").read_text()
        for figure in ("train/loss", "train/lr", "train/grad_norm"):
            assert series(runs / name, figure) == series(runs / "timed", figure)
        first, second = final_weights(runs / "timed"), final_weights(runs / name)
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert summary_of(runs / name)["tokens"] == summary_of(runs / "timed")["tokens"]


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_batches_grow_from_their_start(tiny: Compose, tmp_path: Path) -> None:
    warmup = ["batch.warmup={start: 64, over: 1000}", "batch.micro_batch=2", "budget.steps=null", "budget.tokens=3000"]
    assert run(tiny("name=warm", "log_every=1", *warmup)) == 0
    tokens = [step.tokens for step in read_trace(tmp_path / "runs" / "warm" / "progress.txt")]
    assert tokens == [64] * 6 + [128] * 3 + [192] * 2 + [256] * 8
    assert sum(tokens) >= 3000 > sum(tokens[:-1])
    totals = [row["tokens"] for row in rows(tmp_path / "runs" / "warm") if "train/loss" in row]
    assert totals == [sum(tokens[: step + 1]) for step in range(len(tokens))]


def test_fine_tuning_starts_from_the_runs_weights_and_trains_them_all(tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny("name=base", "budget.steps=10")) == 0
    settings = ["stage=finetune", "stage.init_from=base", "data.tokenizer={kind: inherited}", "optimizer.lr=1e-2"]
    settings += ["schedule=constant", "schedule.warmup=0.0"]
    mapping = tiny("name=tuned", *settings)
    # Hydra merges mappings; a fine-tuning run file chooses a data option with an inherited tokenizer.
    mapping["data"]["tokenizer"] = {"kind": "inherited", "add_tokens": []}
    assert run(mapping) == 0
    runs = tmp_path / "runs"
    assert series(runs / "tuned", "val/loss")[0] == pytest.approx(series(runs / "base", "val/loss")[-1], abs=1e-6)
    before, after = final_weights(runs / "base"), final_weights(runs / "tuned")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (runs / "tuned" / "tokenizer" / "tokenizer.json").read_bytes() == (
        runs / "base" / "tokenizer" / "tokenizer.json"
    ).read_bytes()


def test_the_likeliest_option_is_the_answer_to_a_word_problem(tiny: Compose, composed: Compose, tmp_path: Path) -> None:
    word_problems = composed("quickstart_finetune")["data"]
    assert run(tiny("name=base", "budget.steps=1", "model.max_sequence_length=256")) == 0
    mapping = tiny("name=tuned", "stage=finetune", "stage.init_from=base", "model.max_sequence_length=256")
    mapping["data"] = word_problems
    mapping["data"]["source"]["num_problems"] = 400
    mapping["data"]["validation"]["fraction"] = 0.25
    mapping["data"]["sequence_length"] = 256
    mapping["batch"] |= {"tokens": 1024, "micro_batch": 4}
    mapping["evaluation"] |= {"option_accuracy": True, "max_problems": 40}
    assert run(mapping) == 0
    figures = rows(tmp_path / "runs" / "tuned")[-1]
    assert figures["mathqa/chance"] == pytest.approx(0.2)
    assert figures["mathqa/problems"] == 40
    assert figures["mathqa/accuracy"] == right_answers(mapping, 40) / 40


def right_answers(mapping: dict[str, Any], num_problems: int) -> int:
    """To how many held-out problems the right option is the likeliest, each option read by itself."""
    mapping["checkpoint"]["use"] = "newest"
    config, right = validate(RunConfig, mapping), 0
    model, tokenizer = evaluation_model(config, evaluated_run(config), CPU), assemble_tokenizer(config)
    formatter = build_formatter(config.data.format, tokenizer.template_tokens)
    for problem in islice(problems(config.data, formatter), num_problems):
        prompt, likelihoods = tokenizer.encode(problem.prompt), []
        for option in problem.options:
            end = [tokenizer.eos_id] if problem.closing is None else tokenizer.encode(problem.closing)
            answer = [*tokenizer.encode(option), *end]
            with torch.no_grad():
                logits = model.eval().unembed(model(torch.tensor([prompt + answer])))[0].double()
            after = logits[len(prompt) - 1 : -1].log_softmax(-1)
            likelihoods.append(sum(row[token].item() for row, token in zip(after, answer, strict=True)))
        right += likelihoods.index(max(likelihoods)) == problem.correct
    return right


class TestBadInput:
    """Each mistake gives one message, and nothing is written."""

    @pytest.fixture
    def refused(self, tmp_path: Path) -> Callable[[dict[str, Any]], str]:
        def refuse(mapping: dict[str, Any]) -> str:
            with pytest.raises((InputError, ConfigError)) as caught:
                run(mapping)
            assert not (Path(mapping["output_dir"]) / mapping["name"]).exists()
            return str(caught.value)

        return refuse

    def test_init_from_that_does_not_exist(self, tiny: Compose, refused: Callable[..., str]) -> None:
        assert run(tiny("name=quickstart", "budget.steps=1")) == 0
        message = refused(tiny("name=tuned", "stage=finetune", "stage.init_from=quikstart"))
        assert "no run 'quikstart'; did you mean 'quickstart'?" in message

    def test_init_from_of_another_shape(self, tiny: Compose, refused: Callable[..., str]) -> None:
        assert run(tiny("name=base", "budget.steps=1")) == 0
        message = refused(tiny("name=tuned", "stage=finetune", "stage.init_from=base", "model.mlp_dim=64"))
        assert "base is another model than `model` says (model.mlp_dim = 64, but 48 there): take its own" in message

    def test_tokenizer_larger_than_the_vocabulary(self, tiny: Compose, refused: Callable[..., str]) -> None:
        message = refused(tiny("name=one", "model.vocab_size=280"))
        assert "the tokenizer has 300 tokens" in message
        assert "280" in message

    def test_an_empty_dataset(self, tiny: Compose, texts: Path, refused: Callable[..., str]) -> None:
        texts.write_text("")
        assert str(texts) in refused(tiny("name=one"))

    def test_a_file_that_is_not_json(self, tiny: Compose, texts: Path, refused: Callable[..., str]) -> None:
        lines = texts.read_text().splitlines()
        lines[6] = '{"text": "no end'
        texts.write_text("\n".join(lines) + "\n")
        message = refused(tiny("name=one"))
        assert str(texts) in message
        assert "line 7" in message

    def test_an_output_folder_that_cannot_be_written(self, tiny: Compose, tmp_path: Path) -> None:
        (tmp_path / "occupied").write_text("a file, not a folder")
        with pytest.raises(InputError, match="cannot write to"):
            run(tiny("name=one", f"output_dir={tmp_path / 'occupied'}"))
        assert (tmp_path / "occupied").read_text() == "a file, not a folder"

    def test_a_device_that_is_not_there(self, tiny: Compose, refused: Callable[..., str]) -> None:
        missing = "mps" if torch.cuda.is_available() else "cuda"
        assert f"device={missing}" in refused(tiny("name=one", f"device={missing}"))

    def test_a_replay_of_what_is_not_there(self, tiny: Compose, tmp_path: Path, refused: Callable[..., str]) -> None:
        assert run(tiny("name=timed", "budget.steps=2")) == 0
        assert "did you mean 'timed'?" in refused(tiny("name=again", "budget.replay=time"))
        message = refused(tiny("name=again", "budget.replay=timed", "batch.micro_batch=2", "data.sequence_length=24",
                               "batch.tokens=240"))  # fmt: skip
        assert "a step of 256 tokens, which is not a multiple of a micro-batch of 48" in message
        (tmp_path / "runs" / "timed" / "progress.txt").write_text("0.0 256\n")
        assert "ends after 1 steps" in refused(tiny("name=again", "budget.replay=timed"))

    def test_a_batch_that_grows_in_odd_steps(self, tiny: Compose, refused: Callable[..., str]) -> None:
        message = refused(tiny("name=one", "batch.warmup={start: 96, over: 1000}"))
        assert "tokens (256) is not a multiple of warmup.start (96)" in message
        message = refused(tiny("name=one", "batch.warmup={start: 64, over: 1000}"))
        assert "batch.warmup.start (64) is not a multiple of data.sequence_length * batch.micro_batch" in message

    def test_a_missing_column(self, tiny: Compose, refused: Callable[..., str]) -> None:
        assert "body" in refused(tiny("name=one", "data.format.column=body"))


def test_the_smoke_run_works_as_it_is(composed: Compose, tmp_path: Path) -> None:
    assert run(composed("smoke", f"output_dir={tmp_path / 'runs'}")) == 0
    losses = series(tmp_path / "runs" / "smoke", "val/loss")
    assert losses[-1] < losses[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_is_full_ends_the_run_with_one_line(tiny: Compose, tmp_path: Path) -> None:
    metrics = tmp_path / "runs" / "full" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.symlink_to("/dev/full")
    with pytest.raises(InputError, match="no space left on device; free some space"):
        run(tiny("name=full"))
