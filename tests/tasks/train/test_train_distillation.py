"""Runs that learn from a teacher: their updates, files and resumes, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from library_models import library_section
from recorded import rows, series, weights
from tiny import transformers_llama
from torch import Tensor

from pretune.core.batch import IGNORE
from pretune.core.config import ConfigError, InputError, validate
from pretune.data.loader import Loader
from pretune.data.shards import prepare
from pretune.dispatch import run
from pretune.model.huggingface.weights import to_huggingface
from pretune.model.transformer import Transformer
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, cache_folder
from pretune.run.tokenizer import assemble_tokenizer
from pretune.run.weights import load_run
from pretune.tasks.plan.estimate import make_plan

Compose = Callable[..., dict[str, Any]]
PowerCut = Callable[..., None]
KEPT = ("stage.objective.top_k=8",)
CACHED = (*KEPT, "stage.objective.cached=true")
BIG = ("name=big", "model.dim=64", "model.num_heads=4", "model.num_kv_heads=2", "model.max_sequence_length=64",
       "budget.steps=12")  # fmt: skip
QAT = ("quantization=qat_int8_int4", "quantization.group_size=16", "quantization.start=0.0")


@pytest.fixture
def distil(tiny: Compose) -> Compose:
    """`distil(*overrides)`: a run that learns from the run `big`, a wider model, which is trained here."""
    assert run(tiny(*BIG)) == 0

    def compose(*overrides: str) -> dict[str, Any]:
        return tiny(
            "stage=distill", "stage.objective.teacher=big", "stage.objective.chunk_tokens=50", "budget.steps=6",
            "log_every=1", "evaluation.every=3", "checkpoint.every=2", "schedule=constant", "samples.prompts=[]",
            *overrides,
        )  # fmt: skip

    return compose


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("kept", [None, 5])
def test_two_steps_are_those_of_a_plain_loop(kind: str, kept: int | None, distil: Compose, tmp_path: Path) -> None:
    mapping = distil(
        "name=one", "budget.steps=2", "optimizer.weight_decay=0.0", "optimizer.clip_norm=null", "optimizer.eps=1e-3",
        f"stage.objective.divergence={kind}", "stage.objective.beta=0.3", "stage.objective.alpha=0.7",
        "stage.objective.temperature=2.0", f"stage.objective.top_k={json.dumps(kept)}",
    )  # fmt: skip
    assert run(mapping) == 0
    config = validate(RunConfig, mapping)
    big = validate(RunConfig, mapping | {"name": "big", "model": read_model(tmp_path / "runs" / "big")})
    teacher, student = Transformer(big.model), Transformer(config.model)
    load_run(teacher, RunFolder(tmp_path / "runs" / "big"))
    student.reset_parameters(torch.Generator().manual_seed(config.seed))
    theirs, ours = transformers_llama(teacher).double().eval(), transformers_llama(student).double().train()
    data = prepare(config.data, assemble_tokenizer(config), cache_folder())
    loader = Loader(data.train, config.data, config.seed)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    for step in range(2):
        batch = loader.batch(8 * step, 8)
        with torch.no_grad():
            p = (theirs(batch.inputs).logits / 2).softmax(-1)
        logits = ours(batch.inputs).logits
        q, scored = (logits / 2).softmax(-1), batch.targets != IGNORE
        if kept is not None:
            tokens = p.topk(kept).indices
            p, q = (torch.cat([one.gather(-1, tokens), 1 - one.gather(-1, tokens).sum(-1, True)], -1) for one in (p, q))
        m = 0.3 * p + 0.7 * q
        apart = {
            "forward_kl": (p * (p / q).log()).sum(-1),
            "reverse_kl": (q * (q / p).log()).sum(-1),
            "jensen_shannon": 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1),
        }[kind][scored].mean()
        nll = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
        recorded = {
            name: series(tmp_path / "runs" / "one", f"train/{name}")[step] for name in ("cross_entropy", "divergence")
        }
        # The likeliest tokens' log-probabilities have 16 bits.
        assert recorded == pytest.approx(
            {"cross_entropy": nll.item(), "divergence": apart.item()}, rel=1e-3 if kept else 1e-5, abs=1e-6
        )
        optimizer.zero_grad()
        (0.3 * nll + 0.7 * 4 * apart).backward()
        optimizer.step()
    found = to_huggingface(weights_only(tmp_path / "runs" / "one", 2), config.model)
    for name, value in ours.state_dict().items():
        if name in found:
            torch.testing.assert_close(found[name].double(), value, rtol=0, atol=2e-5 if kept else 1e-6, msg=name)


def read_model(folder: Path) -> dict[str, Any]:
    from pretune.run.folder import read_config

    return read_config(folder / "config.yaml")["model"]


def weights_only(folder: Path, step: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def test_both_parts_are_reported_and_the_held_out_loss_is_the_cross_entropy(
    distil: Compose, tiny: Compose, tmp_path: Path
) -> None:
    assert run(distil("name=one", "stage.objective.temperature=1.5")) == 0
    folder = tmp_path / "runs" / "one"
    parts = [series(folder, f"train/{name}") for name in ("loss", "cross_entropy", "divergence")]
    for loss, cross_entropy, divergence in zip(*parts, strict=True):
        assert loss == pytest.approx(0.5 * cross_entropy + 0.5 * 1.5**2 * divergence, rel=1e-5)
    assert series(folder, "val/divergence")[-1] < 0.9 * series(folder, "val/divergence")[0]
    last = rows(folder)[-1]
    assert run(distil("name=one", "stage.objective.temperature=1.5", "task=evaluate")) == 0
    measured = json.loads((folder / "evaluation.json").read_text())
    assert measured["val/divergence"] == pytest.approx(last["val/divergence"], rel=1e-5)
    for name in ("val/loss", "val/bits_per_byte"):
        assert measured[name] == pytest.approx(last[name], rel=1e-5)
    # The same weights, measured by a run of another objective, which knows no teacher
    shutil.rmtree(tmp_path / "runs" / "big")
    assert run(tiny("name=one", "task=evaluate")) == 0
    plain = json.loads((folder / "evaluation.json").read_text())
    assert plain["val/loss"] == pytest.approx(last["val/loss"], rel=1e-5)
    assert "val/divergence" not in plain


@pytest.mark.parametrize("more", [(), CACHED])
def test_the_same_updates_whatever_the_micro_batch(more: tuple[str, ...], distil: Compose, tmp_path: Path) -> None:
    for micro_batch in (4, 1):
        assert (
            run(distil(f"name=m{micro_batch}", f"batch.micro_batch={micro_batch}", "evaluation.every=null", *more)) == 0
        )
    runs = tmp_path / "runs"
    for name in ("train/loss", "train/divergence", "train/grad_norm"):
        assert series(runs / "m1", name) == pytest.approx(series(runs / "m4", name), abs=2e-4), name


@pytest.mark.parametrize("more", [(), KEPT, CACHED])
def test_resumed_is_bit_for_bit_the_uninterrupted_run(
    more: tuple[str, ...], distil: Compose, tmp_path: Path, power_cut: PowerCut
) -> None:
    assert run(distil("name=whole", *more)) == 0
    power_cut(distil("name=cut", *more), 4)
    assert run(distil("name=cut", *more)) == 0
    for name in ("train/loss", "val/loss", "val/divergence"):
        assert series(tmp_path / "runs" / "cut", name) == series(tmp_path / "runs" / "whole", name)
    whole, cut = (weights(tmp_path / "runs" / name, 6) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


MIX = ("data/mix=files", "data.mix.pretraining.share=0.5", "data.mix.pretraining.validation.fraction=0.2")


@pytest.mark.parametrize("more", [(), ("data.packing.isolate=true",), MIX], ids=["stream", "isolated", "mixed"])
def test_what_is_stored_is_what_the_teacher_says(
    more: tuple[str, ...], distil: Compose, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if more is MIX:
        lines = texts.read_text().splitlines()
        (tmp_path / "other.jsonl").write_text("\n".join(line.replace("cat", "fox") for line in lines[:30]))
        more = (*MIX, f"data.mix.pretraining.source.files=[{tmp_path / 'other.jsonl'}]")
    for name, how in (("asked", KEPT), ("stored", CACHED)):
        assert run(distil(f"name={name}", *how, *more)) == 0
    said = capsys.readouterr().err
    assert "note: the teacher's outputs of" in said
    runs = tmp_path / "runs"
    for name in ("train/loss", "train/divergence", "val/loss", "val/divergence"):
        assert series(runs / "stored", name) == pytest.approx(series(runs / "asked", name), abs=1e-5), name
    tables = sorted(cache_folder().glob("reference-*/*.npy"))
    assert len(tables) == (8 if "data/mix=files" in more else 4)
    # Now they are there, and nothing is asked of the teacher.
    assert run(distil("name=again", *CACHED, *more)) == 0
    assert "the teacher's outputs" not in capsys.readouterr().err
    assert series(runs / "again", "train/loss") == series(runs / "stored", "train/loss")
    # What another teacher, or this one at another temperature, says is stored apart.
    assert run(distil("name=other", *CACHED, *more, "stage.objective.temperature=2", "budget.steps=1")) == 0
    assert len(list(cache_folder().glob("reference-*/*.npy"))) == 2 * len(tables)


def test_the_size_on_disk_is_what_was_announced(
    distil: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(distil("name=one", *CACHED, "budget.steps=1")) == 0
    for folder in cache_folder().glob("reference-*"):
        size = sum(path.stat().st_size - 128 for path in folder.glob("*.npy"))  # without the headers
        assert size % (32 * (4 * 8 + 2)) == 0, "4 * top_k + 2 bytes per token"
        assert f"take {size / 2**20:.1f} MiB in {folder}" in capsys.readouterr().err or folder
    shutil.rmtree(cache_folder())
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(InputError, match=r"the teacher's outputs of .* take .* but only .* free .* lower .*top_k"):
        run(distil("name=two", *CACHED))
    assert not (tmp_path / "runs" / "two").exists()


def test_damaged_outputs_are_computed_again(
    distil: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(distil("name=one", *CACHED)) == 0
    whole = {path: path.read_bytes() for path in cache_folder().glob("reference-*/*")}
    path = next(path for path in whole if path.name == "tokens.npy")
    path.write_bytes(whole[path][::-1])
    assert run(distil("name=two", *CACHED)) == 0
    assert capsys.readouterr().err.count("were damaged: computed again") == 1
    assert path.read_bytes() == whole[path]
    assert series(tmp_path / "runs" / "two", "train/loss") == series(tmp_path / "runs" / "one", "train/loss")


@pytest.mark.parametrize(
    "more",
    [
        ("stage.init_from=base", "adapter=lora", "adapter.rank=4", "optimizer.lr=1e-2"),
        ("stage.init_from=base", *QAT),
        ("stage.init_from=base", "adapter=lora", "quantization=qlora_nf4", "quantization.block_size=16"),
        ("ema.decay=0.5",),
        ("neftune_alpha=5", "model.dropout=0.1"),
        (*KEPT, "early_stopping.patience=1", "evaluation.every=1"),
        ("data.packing.isolate=true", "batch.micro_batch=auto"),
        ("model.vocab_size=384", "model.tied_embeddings=false", "model.softcap=10"),
        ("stage.objective.teacher_dtype=bfloat16",),
    ],
    ids=["lora", "qat", "qlora", "ema", "noise", "early stopping", "auto", "larger table", "bf16 teacher"],
)
def test_it_learns_whatever_else_the_run_does(
    more: tuple[str, ...], distil: Compose, tiny: Compose, tmp_path: Path
) -> None:
    if "stage.init_from=base" in more:
        assert run(tiny("name=base", "budget.steps=4")) == 0
    assert run(distil("name=one", *more)) == 0
    folder = tmp_path / "runs" / "one"
    assert series(folder, "val/divergence")[-1] < series(folder, "val/divergence")[0]
    assert run(distil("name=one", *more, "task=evaluate")) == 0
    measured, last = json.loads((folder / "evaluation.json").read_text()), series(folder, "val/divergence")[-1]
    if "early_stopping.patience=1" not in more:
        assert measured["val/divergence"] == pytest.approx(last, rel=0.02)


def test_a_run_that_starts_from_its_teacher_has_nothing_to_learn_from_it(distil: Compose, tmp_path: Path) -> None:
    shape = ("model.dim=64", "model.num_heads=4", "model.num_kv_heads=2", "model.max_sequence_length=64")
    assert run(distil("name=one", "stage.init_from=big", "stage.objective.alpha=1", *shape)) == 0
    assert series(tmp_path / "runs" / "one", "val/divergence")[0] == pytest.approx(0, abs=1e-6)
    assert series(tmp_path / "runs" / "one", "train/loss")[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("more", [(), KEPT])
def test_compiled_is_eager(more: tuple[str, ...], distil: Compose, tmp_path: Path) -> None:
    for name, compiled in (("compiled", "true"), ("eager", "false")):
        assert run(distil(f"name={name}", f"precision.compile={compiled}", *more)) == 0
    runs = tmp_path / "runs"
    for name in ("train/loss", "train/divergence", "val/divergence"):
        assert series(runs / "compiled", name) == pytest.approx(series(runs / "eager", name), rel=1e-4)


@pytest.mark.parametrize("model_type", ["phi", "mamba"])  # a bias on the logits; no mask between documents
def test_a_teacher_that_transformers_computes(model_type: str, distil: Compose, tiny: Compose, tmp_path: Path) -> None:
    theirs = tiny("name=theirs", "budget.steps=4")
    theirs["model"] = library_section(model_type, vocab_size=320).model_dump(mode="json")
    assert run(theirs) == 0
    mapping = distil("name=one", "stage.objective.teacher=theirs", "stage.objective.alpha=1.0", "budget.steps=20")
    assert run(mapping) == 0
    first, *_, last = series(tmp_path / "runs" / "one", "train/divergence")
    assert last < 0.8 * first
    assert make_plan(validate(RunConfig, mapping)).memory["teacher"] > 0


def test_a_teacher_of_others_gives_its_tokenizer(distil: Compose, tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny(*BIG, "task=export", f"export.output={tmp_path / 'theirs'}")) == 0
    teacher = f"stage.objective.teacher={tmp_path / 'theirs'}"
    mapping = distil("name=own", teacher)
    mapping["data"]["tokenizer"] = {"kind": "inherited", "add_tokens": []}
    assert run(mapping) == 0
    assert run(distil("name=other")) == 0
    for name in ("train/loss", "val/divergence"):
        found, wanted = (series(tmp_path / "runs" / run_name, name) for run_name in ("own", "other"))
        assert found == pytest.approx(wanted, rel=1e-4)


def test_it_goes_on_with_the_teacher_that_it_began_with(
    distil: Compose, tiny: Compose, power_cut: PowerCut, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    power_cut(distil("name=one"), 4)
    (runs / "big").rename(tmp_path / "moved")
    assert run(tiny(*BIG, "seed=5")) == 0
    with pytest.raises(InputError, match=r"one learned from other weights than big has now; restore them"):
        run(distil("name=one"))
    assert run(distil("name=one", f"stage.objective.teacher={tmp_path / 'moved'}")) == 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (("stage.objective.teacher=bigg",), r"stage\.objective\.teacher: no run 'bigg'; did you mean 'big'"),
            (("stage.objective.teacher=bad",), r"bad cannot be its own teacher"),
            (("stage.objective.cached=true",), r"set top_k to how many"),
            (("stage.objective.top_k=320",), r"top_k \(320\) is not less than the number of tokens"),
            (("stage.objective.alpha=0",), "alpha"),
            (("stage.objective.temperature=0",), "temperature"),
            (("stage.objective.divergence=kl",), "divergence"),
            (("stage.kind=pretrain",), r"choose both by stage=distill"),
            (("data.tokenizer.vocab_size=310",), r"big has another tokenizer than the run"),
            (("data.sequence_length=128", "batch.tokens=512"), "exceeds the 64 positions of .*big"),
        ],
    )
    def test_one_line_before_anything_is_written(
        self, overrides: tuple[str, ...], message: str, distil: Compose, tmp_path: Path
    ) -> None:
        with pytest.raises((ConfigError, InputError), match=message) as said:
            run(distil("name=bad", *overrides))
        assert "\n" not in str(said.value)
        assert not (tmp_path / "runs" / "bad").exists()

    def test_a_teacher_without_a_checkpoint(self, distil: Compose, tmp_path: Path) -> None:
        shutil.rmtree(tmp_path / "runs" / "big" / "checkpoints")
        with pytest.raises(InputError, match="big has no checkpoint yet"):
            run(distil("name=bad"))

    def test_a_teacher_that_cannot_be_read(self, distil: Compose, tmp_path: Path) -> None:
        path = tmp_path / "runs" / "big" / "config.yaml"
        path.write_text(path.read_text().replace("num_layers", "layers"))
        with pytest.raises(InputError, match=r"the model in .*big.config\.yaml cannot be read: .*layers"):
            run(distil("name=bad"))


def test_the_plan_counts_the_teacher(distil: Compose) -> None:
    plans = {
        name: make_plan(validate(RunConfig, distil("name=one", "task=plan", "plan.device=a100-40gb", *more)))
        for name, more in {
            "asked": (),
            "16 bits": ("stage.objective.teacher_dtype=bfloat16",),
            "stored": CACHED,
        }.items()
    }
    parameters = 320 * 64 + 2 * (64 * (2 * 64 + 64) + 3 * 64 * 48 + 2 * 64) + 64
    assert plans["asked"].memory["teacher"] == pytest.approx(4 * parameters, rel=0.05)
    assert plans["16 bits"].memory["teacher"] == plans["asked"].memory["teacher"] // 2
    assert "teacher" not in plans["stored"].memory
    assert plans["asked"].flops_per_token > plans["stored"].flops_per_token + 2 * 0.9 * parameters
