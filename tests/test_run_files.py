"""Every run file, and every option of every group, composes and validates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from omegaconf import OmegaConf

from pretune.core.config import validate
from pretune.launch import compose
from pretune.launch.groups import CONFIGS
from pretune.launch.model_of_start import filled, nano
from pretune.model.config import ModelConfig
from pretune.run.config import RunConfig

RUN_FILES = sorted(path.stem for path in (CONFIGS / "run").glob("*.yaml"))
OPTIONS = sorted(
    f"{file.parent.relative_to(CONFIGS)}={file.stem}"
    for file in CONFIGS.glob("*/**/*.yaml")
    if file.parent.name not in ("run", "common")
)

PREFERENCES = ("stage=dpo", "data=ultrafeedback", "data/format=preference", "data/format=preference_chat")


LONG = ("model.max_sequence_length=2048",)
OF_OTHERS = dict.fromkeys(("smollm_135m_sft", "smollm_arc_lora", "smollm_arc_full"), LONG)
"""What the model of others that a run file starts from has, and nano has not."""


@pytest.mark.parametrize("name", RUN_FILES)
def test_run_file_composes_and_is_named_after_its_file(name: str, composed: Callable[..., dict[str, Any]]) -> None:
    config = validate(RunConfig, composed(name, *OF_OTHERS.get(name, ())))
    assert config.name == name


@pytest.mark.parametrize("name", RUN_FILES)
def test_run_file_names_the_schema_for_editors(name: str) -> None:
    """The package comes first: Hydra reads no further, and /run/NAME in a defaults list would set run.* without it."""
    first, second, *_ = (CONFIGS / "run" / f"{name}.yaml").read_text().splitlines()
    assert (first, second) == ("# @package _global_", "# yaml-language-server: $schema=../schema.json")


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_validates(option: str) -> None:
    stage = "dpo" if option in PREFERENCES else "finetune"
    extra = [f"stage={stage}", "stage.init_from=somewhere", "model.max_sequence_length=1024", "batch.tokens=16384"]
    if option.startswith("stage="):
        extra = ["stage.init_from=somewhere"]
    if option == "quantization=qlora_nf4":
        extra = [*extra, "adapter=lora"]
    if option.startswith("quantization=int"):
        extra = [*extra, "task=export"]  # only trained models are stored in this form
    if option in PREFERENCES and not option.startswith("data="):
        extra += ["data=ultrafeedback", "model.max_sequence_length=512"]
    if option == "evaluation=arc":
        extra += ["data=grid_puzzles"]
    if option == "model=transformers":
        extra = ["++model.config={model_type: gpt2}"]
    if option.startswith("model/rope/scaling=") and not option.endswith(("linear", "ntk")):
        extra += ["model.rope.scaling.original_max_position_embeddings=512"]
    file = CONFIGS / "base.yaml"
    with compose.composed(file, ["name=x", "budget.steps=1", option, *extra]) as config:
        for key in OmegaConf.missing_keys(config):
            OmegaConf.update(config, key, ["texts/*.jsonl"] if key.endswith("files") else "somewhere")
        validate(RunConfig, compose.plain(filled(config, nano()), file))


def test_a_source_can_be_exchanged_from_the_command_line(composed: Callable[..., dict[str, Any]]) -> None:
    train, held_out = "data/source=files", "data/source@data.validation.source=files"
    names = ["data.source.files=[a.json]", "data.validation.source.files=[b.json]"]
    config = validate(RunConfig, composed("mathqa_1h_baseline", train, held_out, *names))
    assert config.data.source.kind == "files"
    assert config.data.validation.source is not None
    assert config.data.validation.source.kind == "files"


def test_the_baselines_are_the_reference_systems(composed: Callable[..., dict[str, Any]]) -> None:
    config = validate(RunConfig, composed("slimpajama_3h_baseline"))
    model, optimizer, schedule = config.model, config.optimizer, config.schedule
    assert (model.num_layers, model.dim, model.num_heads, model.head_dim, model.mlp_dim) == (10, 1024, 16, 64, 2816)
    assert (model.padded_vocab_size, model.rope.theta, model.norm.eps) == (50304, 1e4, 1e-5)
    assert (config.data.sequence_length, config.batch.tokens, config.accumulation) == (512, 131_072, 4)
    assert optimizer.kind == "adamw"
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.clip_norm) == (1e-3, (0.9, 0.95), 0.1, 1.0)
    assert schedule.kind == "cycle"
    assert (schedule.warmup, schedule.initial, schedule.final) == (0.3, 1 / 25, 1 / 25 / 1e4)
    assert (config.budget.steps, config.budget.time) == (10_000, 3 * 3600)
    tuned = validate(RunConfig, composed("mathqa_1h_baseline"))
    assert (tuned.optimizer.lr, tuned.schedule.kind, tuned.budget.steps) == (5e-6, "cosine", 4000)
    assert isinstance(tuned.model, ModelConfig)
