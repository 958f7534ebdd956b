"""Whoever does what a message advises gets past it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_data import preference_data, write_preferences
from recorded import rows, series

from pretune.core.config import ConfigError, InputError, UserError, validate
from pretune.dispatch import run
from pretune.launch.compose import composed as composed_by_hydra
from pretune.launch.compose import plain
from pretune.launch.place import placed
from pretune.run.config import RunConfig
from pretune.run.out_of_memory import out_of_memory
from pretune.tasks.train.micro_batch import MicroBatch

Compose = Callable[..., dict[str, Any]]
PowerCut = Callable[..., None]
TUNED = ("stage=finetune", "stage.init_from=base")
LORA = (*TUNED, "adapter=lora")
HEAD = "adapter.targets=[attention,head]"
DPO = ("stage=dpo", "stage.init_from=base", "data=ultrafeedback", "data.sequence_length=64", "batch.tokens=1024")

SMALL = ("data.sequence_length=32", "batch.tokens=256", "model.dim=32", "model.mlp_dim=48", "model.head_dim=16")

ADVISED: dict[str, tuple[Sequence[str], Sequence[Sequence[str]]]] = {
    # What is wrong; and each remedy, all of it: its text must be in the message.
    "positions": (["model.max_sequence_length=16"], [["data.sequence_length=16"], ["model.max_sequence_length=32"]]),
    "batch": (["batch.tokens=1000"], [["batch.tokens=896"], ["batch.tokens=1024"]]),
    "warmup": (["batch.warmup={start: 100, over: 999}", "batch.tokens=1000"],
               [["batch.warmup={start: 128, over: 999}", "batch.tokens=1024"]]),
    "inherited": (["data/tokenizer=inherited"], [["stage.init_from=base"]]),
    "adapter": (["adapter=lora"], [["stage.init_from=base"], ["adapter=none"]]),
    "patience": (["early_stopping.patience=2", "evaluation.every=null"], [["evaluation.every=5"]]),
    "options": (["evaluation.option_accuracy=true"],
                [["evaluation.option_accuracy=false"], ["data/format=mathqa", "data.format.rationale=none"]]),
    "answers": (["evaluation.answers.measure=true"],
                [["evaluation.answers.measure=false"], ["data/format=mathqa"], ["data/format=gsm8k"]]),
    "emulate": (["precision.emulate=true"], [["precision.emulate=false"], ["precision=fp8", "precision.emulate=true"]]),
    "fp8 adapter": ([*LORA, "precision=fp8"], [["precision=bf16"], ["adapter=none"]]),
    "fp8 length": (["precision=fp8", "data.sequence_length=8", "batch.micro_batch=1"], [["data.sequence_length=16"]]),
    "fp8 qat": (["precision=fp8", "quantization=qat_int8_int4", "quantization.group_size=16"], [["precision=bf16"]]),
    "4 bits": ([*TUNED, "quantization=qlora_nf4"],
               [["quantization=none"], *([f"adapter={kind}"] for kind in ("lora", "dora", "loha", "lokr"))]),
    "4 bits, dropout": ([*TUNED, "adapter=dora", "adapter.dropout=0.1", "quantization=qlora_nf4"],
                        [["adapter.dropout=0.0"], ["quantization=none"]]),
    "head, dora": ([*TUNED, "adapter=dora", HEAD, "model.tied_embeddings=false"], [["adapter=lora"]]),
    "new rows": ([*LORA, "adapter.train_embeddings=new_rows"],
                 [["adapter.train_embeddings=none"], ["adapter.train_embeddings=all"],
                  ["data.tokenizer.add_tokens=['<new>']"]]),
    "rows, targets": ([*LORA, HEAD, "adapter.train_embeddings=all"],
                      [["adapter.targets=[attention]"], ["adapter.train_embeddings=none"]]),
    "rows, qat": ([*LORA, "adapter.train_embeddings=all", "quantization=qat_int8_int4", "quantization.group_size=16"],
                  [["adapter.train_embeddings=none"], ["quantization=none"]]),
    "template": (["data.tokenizer.add_tokens=template"], [["data.tokenizer.add_tokens=[]"]]),
    "head, qat": ([*LORA, HEAD, "model.tied_embeddings=false", "quantization=qat_int8_int4",
                   "quantization.group_size=16"], [["adapter.targets=[attention]"]]),
    "integers": (["quantization=int8_int4", "quantization.group_size=16"],
                 [["quantization=none"], ["quantization=qat_int8_int4", "quantization.group_size=16"],
                  ["task=evaluate"], ["task=generate"], ["task=export"]]),
    "groups": (["quantization=qat_int8_int4", "quantization.group_size=12"],
               [["quantization.group_size=8"], ["quantization.group_size=16"]]),
    "qat dropout": ([*LORA, "adapter.dropout=0.1", "quantization=qat_int8_int4", "quantization.group_size=16"],
                    [["adapter.dropout=0.0"]]),
    "dpo data": (["stage=dpo", "stage.init_from=base"], [["data=ultrafeedback", "data.sequence_length=32"]]),
    "dpo noise": ([*DPO, "neftune_alpha=5"], [["neftune_alpha=null"]]),
    "dpo dropout": ([*DPO, "model.dropout=0.1"], [["model.dropout=0.0"]]),
    "dpo reference": ([*DPO, "stage.objective.reference=adapter_off"],
                      [["stage.objective.reference=model"], ["stage.objective.reference=cached"]]),
    "finetune": (["stage.kind=finetune"], [["stage.init_from=base"]]),
    "objective": (["stage.kind=dpo", "stage.init_from=base"],
                  [["stage=dpo", "stage.init_from=base", "data=ultrafeedback"]]),
    "beams, temperature": (["generate.num_beams=2", "generate.temperature=1.0"], [["generate.temperature=0"]]),
    "beams, stop": (["generate.num_beams=2", "generate.temperature=0", "generate.stop=[x]"],
                    [["generate.stop=[]"], ["generate.num_beams=1"]]),
    "program, beams": (["generate.num_beams=2", "generate.temperature=0", "generate.runtime=executorch"],
                       [["generate.num_beams=1"]]),
    "program, compiled": (["generate.compile=true", "generate.runtime=executorch"], [["generate.compile=false"]]),
    "program": (["generate.export=x"], [["generate.runtime=executorch"]]),
    "two prompts": (["generate.prompt=x", "generate.file=y"], [["generate.prompt=null"], ["generate.file=null"]]),
    "keep": (["export.format=onnx", "export.adapter=keep"], [["export.adapter=merge"]]),
    "export dtype": (["export.format=onnx", "export.dtype=float16"], [["export.dtype=float32"]]),
    "warmup and decay": (["schedule=trapezoid", "schedule.warmup=0.7", "schedule.decay=0.6"], [["schedule.decay=0.3"]]),
    "budget": (["budget.steps=null"], [["budget.steps=1"], ["budget.tokens=1000"], ["budget.time=1m"]]),
    "heads, dropout": ([*LORA, HEAD, "model.tied_embeddings=false", "adapter.dropout=0.1"], [["adapter.dropout=0.0"]]),
    "heads, init": ([*LORA, HEAD, "model.tied_embeddings=false", "adapter.init=pissa"],
                    [["adapter.init=zero"], ["adapter.init=gaussian"]]),
    "orthogonal": ([*LORA, "adapter.rank=3", "adapter.init=orthogonal"], [["adapter.rank=4"]]),
    "pairs": ([*DPO, "data.packing.isolate=false"], [["data.packing.isolate=true"]]),
    "pairs, split": ([*DPO, "data.packing.too_long=split"],
                     [["data.packing.too_long=drop"], ["data.packing.too_long=cut"]]),
    "sides": (["data.validation.fraction=null"], [["data.validation.fraction=0.1"]]),
    "time": (["budget.time=5 parsecs"], [["budget.time=90s"], ["budget.time=1h30m"], ["budget.time=300"]]),
}  # fmt: skip
"""Advice about the configuration alone."""


@pytest.mark.parametrize("case", ADVISED)
def test_advice_about_the_configuration_is_good(case: str, composed: Compose) -> None:
    def small(*overrides: str) -> dict[str, Any]:
        return composed("smoke", "precision=fp32", *SMALL, *overrides)

    wrong, remedies = ADVISED[case]
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig, small(*wrong))
    for remedy in remedies:
        changed = tuple(change.partition("=")[0] for change in remedy)
        rest = [one for one in wrong if one.partition("=")[0] not in changed and not one.startswith(f"{changed[0]}.")]
        validate(RunConfig, small(*rest, *remedy))
        key, _, value = remedy[0].partition("=")
        assert value.strip("[]") in str(caught.value) or key.rpartition(".")[2] in str(caught.value), remedy


def of(folder: Path, *overrides: str) -> dict[str, Any]:
    """What `--config FOLDER/config.yaml` and overrides come to."""
    file = folder / "config.yaml"
    with composed_by_hydra(file, placed(file, overrides)) as config:
        return plain(config, file)


def error_of(mapping: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        run(mapping)
    return str(caught.value)


@pytest.mark.parametrize("remedy", [
    "batch.micro_batch=2", "batch.micro_batch=auto", "precision.activation_checkpointing=true",
    "stage.objective.chunk_tokens=16", "evaluation.micro_batch=1",
])  # fmt: skip
def test_a_run_that_ran_out_of_memory_goes_on_with_what_its_message_advises(
    remedy: str, tiny: Compose, power_cut: PowerCut, tmp_path: Path
) -> None:
    fixed, smallest = MicroBatch(4, "cpu", None), MicroBatch(1, "cpu", None)
    said = [str(out_of_memory(validate(RunConfig, tiny())))]
    for micro_batch in (fixed, smallest):
        with pytest.raises(InputError) as caught:
            micro_batch.halve(4)
        said.append(str(caught.value))
    key, _, value = remedy.partition("=")
    assert any(key in one for one in said) or value == "auto"
    settings = ("budget.steps=8", "checkpoint.every=2", "batch.micro_batch=4", "samples.prompts=[]")
    runs = tmp_path / "runs"
    assert run(tiny("name=whole", *settings)) == 0
    power_cut(tiny("name=cut", *settings), 6)
    assert run(of(runs / "cut", remedy)) == 0
    for name in ("train/loss", "val/loss"):
        assert series(runs / "cut", name) == pytest.approx(series(runs / "whole", name), rel=1e-5)


@pytest.fixture
def cut(tiny: Compose, power_cut: PowerCut, tmp_path: Path) -> Path:
    """A run that was cut off at step 6, with checkpoints of steps 2 and 4."""
    power_cut(tiny("name=cut", "budget.steps=8", "checkpoint.every=2", "checkpoint.keep=null", "samples.prompts=[]"), 6)
    return tmp_path / "runs" / "cut"


@pytest.mark.parametrize("other", ["bf16", "tf32"])
def test_another_precision(other: str, cut: Path) -> None:
    assert run(of(cut, f"precision={other}", "precision.compile=false")) == 0


def test_another_configuration(cut: Path) -> None:
    assert "optimizer.lr: 0.003 -> 0.1" in (said := error_of(of(cut, "optimizer.lr=0.1")))
    assert said.endswith("choose another name=...")
    assert run(of(cut, "optimizer.lr=0.1", "name=another")) == 0
    assert run(of(cut)) == 0


def test_other_data(cut: Path, texts: Path) -> None:
    texts.write_text(texts.read_text() + json.dumps({"text": "One more document, which nobody had asked for."}) + "\n")
    remedy = "start a new run from its weights: name=... stage.init_from=cut data/tokenizer=inherited"
    assert error_of(of(cut)).endswith(remedy)
    assert run(of(cut, "name=new", "stage.init_from=cut", "data/tokenizer=inherited")) == 0
    assert rows(cut.parent / "new")[-1]["step"] == 8


def test_a_damaged_summary(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(of(cut)) == 0
    whole = json.loads((cut / "summary.json").read_text())
    (cut / "summary.json").write_text('{"step": 3')
    assert "delete it and run the training again to rewrite it" in error_of(of(cut))
    (cut / "summary.json").unlink()
    assert run(of(cut)) == 0
    again = json.loads((cut / "summary.json").read_text())
    assert again.keys() == whole.keys()
    assert [again[key] for key in ("step", "tokens", "val/loss", "best_val_loss", "data")] == [
        whole[key] for key in ("step", "tokens", "val/loss", "best_val_loss", "data")
    ]
    assert "is complete" not in capsys.readouterr().out.splitlines()[-1]


def test_a_damaged_line_of_metrics(cut: Path) -> None:
    path = cut / "metrics.jsonl"
    path.write_text("oops\n" + path.read_text())
    assert "line 1 is not JSON" in (said := error_of(of(cut)))
    assert "delete that line" in said
    path.write_text(path.read_text().partition("\n")[2])
    assert run(of(cut)) == 0


def test_a_step_that_has_no_checkpoint(cut: Path) -> None:
    said = error_of(of(cut, "task=evaluate", "checkpoint.use=3"))
    (advised,) = re.findall(r"set checkpoint\.use to (.*)", said)
    for use in re.split(", | or ", advised):
        assert run(of(cut, "task=evaluate", f"checkpoint.use={use}")) == 0


def test_resume(cut: Path) -> None:
    assert "resume=never; choose another name" in error_of(of(cut, "resume=never"))
    assert run(of(cut, "resume=never", "name=another")) == 0
    assert "correct name or output_dir" in error_of(of(cut, "resume=must", "name=nobody"))
    assert run(of(cut, "resume=must")) == 0


def test_a_vocabulary_that_is_too_small(tiny: Compose) -> None:
    said = error_of(tiny("name=small", "model.vocab_size=290", "budget.steps=1"))
    (advised,) = re.findall(r"set (model\.vocab_size=\d+) or choose another tokenizer", said)
    assert run(tiny("name=small", advised, "budget.steps=1")) == 0
    assert run(tiny("name=other", "model.vocab_size=290", "data.tokenizer.vocab_size=280", "budget.steps=1")) == 0


def test_blocks_that_do_not_divide(tiny: Compose) -> None:
    assert run(tiny("name=base", "budget.steps=2")) == 0
    settings = [*LORA, "name=tuned", "quantization=qlora_nf4", "adapter.rank=2", "budget.steps=1"]
    said = error_of(tiny(*settings, "quantization.block_size=100"))
    (advised,) = re.findall(r"set it to a divisor of \d+, such as (\d+)", said)
    assert run(tiny(*settings, f"quantization.block_size={advised}")) == 0


def test_exports(cut: Path) -> None:
    assert run(of(cut)) == 0
    assert "export.adapter=merge" in error_of(of(cut, "task=export", "export.adapter=keep"))
    assert run(of(cut, "task=export", "export.adapter=merge")) == 0
    assert "exists already; delete it" in error_of(of(cut, "task=export"))
    assert run(of(cut, "task=export", "export.output=" + str(cut.parent / "out"))) == 0
    shutil.rmtree(cut / "export")
    assert run(of(cut, "task=export")) == 0
    said = error_of(of(cut, "task=export", "export.format=integers"))
    for kind in ("int8_int4", "int4_weight_only", "int8_weight_only"):
        assert kind in said
        options = (f"quantization={kind}", "quantization.group_size=16", "export.measure=false")
        assert run(of(cut, "task=export", "export.format=integers", *options)) == 0


def test_a_prompt(cut: Path, tmp_path: Path) -> None:
    said = error_of(of(cut, "task=generate"))
    (tmp_path / "prompts.txt").write_text("The\n")
    for advised in ("generate.prompt=some text", f"generate.file={tmp_path / 'prompts.txt'}"):
        assert advised.partition("=")[0] in said
        assert run(of(cut, "task=generate", advised, "generate.max_new_tokens=2")) == 0


def test_pairs_go_on_with_smaller_chunks(tiny: Compose, composed: Compose, power_cut: PowerCut, tmp_path: Path) -> None:
    assert run(tiny("name=base", "budget.steps=2", "model.max_sequence_length=256")) == 0
    file = write_preferences(tmp_path / "preferences.jsonl")
    mapping = tiny(
        "name=dpo",
        *DPO[:2],
        "budget.steps=4",
        "checkpoint.every=2",
        "batch.tokens=512",
        "model.max_sequence_length=256",
    )
    mapping["data"] |= preference_data(file, composed, "cut")
    mapping["batch"]["micro_batch"] = 2
    power_cut(mapping, 3)
    assert run(of(tmp_path / "runs" / "dpo", "stage.objective.chunk_tokens=32", "batch.micro_batch=1")) == 0


def test_memory_that_ends_on_the_first_step_is_one_line(tiny: Compose) -> None:
    from pretune.tasks.train.running import Instruments

    def full(training: Any, what: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(InputError) as caught:
        run(tiny(), Instruments(on_begin=full))
    assert "\n" not in str(caught.value)
