"""Rules between sections: each rule alone, and all violated ones reported together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from library_models import library_section

from pretune.core.config import ConfigError, validate
from pretune.run.config import RunConfig
from pretune.run.rules import RULES, broken

BROKEN = {
    "sequences_fit_the_model": ["model.max_sequence_length=16"],
    "steps_are_whole_micro_batches": ["batch.tokens=1000"],
    "exports_have_the_features_of_the_model": ["model.architecture=qwen2", "model.bias.mlp=true"],
    "an_inherited_tokenizer_has_a_run": ["data/tokenizer=inherited"],
    "an_adapter_has_trained_weights": ["adapter=lora"],
    "what_is_measured_is_in_the_data": ["evaluation.option_accuracy=true"],
    "float8_multiplies_whole_matrices": ["precision=fp8", "data.sequence_length=8", "batch.micro_batch=1"],
    "an_adapted_vocabulary_is_plain": ("stage=finetune", "stage.init_from=x", "adapter=dora", "adapter.targets=[head]"),
    "rows_are_trained_beside_the_adapter": (
        "stage=finetune",
        "stage.init_from=x",
        "adapter=lora",
        "adapter.train_embeddings=new_rows",
    ),
    "frozen_weights_have_an_adapter": ["quantization=qlora_nf4"],
    "integers_come_after_training_or_with_it": ["quantization=int8_int4", "quantization.group_size=16"],
    "preferences_have_pairs": ["stage=dpo", "stage.init_from=base"],
    "early_stopping_needs_evaluations": ["early_stopping.patience=2", "evaluation.every=null"],
    "a_reference_is_the_start": ["stage=dpo", "stage.init_from=base", "neftune_alpha=5", "data/format=preference"],
    "a_model_of_transformers_has_less": ["export.format=onnx"],
    "shared_parameters_are_plain": ["parallel=fsdp", "optimizer=adamw_8bit"],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_each_rule_can_be_broken_alone(rule: Any, tiny: Callable[..., dict[str, Any]]) -> None:
    other = rule.__name__ == "a_model_of_transformers_has_less"
    section = library_section("phi", max_position_embeddings=1024)
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig, tiny(*BROKEN[rule.__name__]) | ({"model": section.model_dump()} if other else {}))
    assert "\n" not in str(caught.value), "one rule, one line"


def test_all_broken_rules_are_reported_together(tiny: Callable[..., dict[str, Any]]) -> None:
    changes = ["adapter=lora", "evaluation.option_accuracy=true", "model.max_sequence_length=16"]
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig, tiny(*changes))
    message = str(caught.value)
    for part in ("exceeds the model", "adapter=lora", "option_accuracy"):
        assert part in message
    assert len(message.splitlines()) == 3
    assert broken(validate(RunConfig, tiny())) == []
