"""A model grows by the tokens that a run adds, as transformers resizes it and peft trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from new_tokens import FAMILIES, LORA, composed, logits, resized, start, step, tokens
from stand_ins import write_data
from torch import nn

from pretune.adapters.attach import merge
from pretune.model.transformer import Transformer
from pretune.optim.optimizers import build_optimizer
from pretune.run.model import training_model
from pretune.run.tokenizer import assemble_tokenizer


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_grows_as_transformers_resizes_it(family: str) -> None:
    folder, size = start(family)
    config = composed("optimizer.lr=1e-2", "optimizer.weight_decay=0.1")
    assert (config.model.vocab_size, assemble_tokenizer(config).added_ids) == (size + 2, (size, size + 1))
    ours, theirs, x = training_model(config, torch.device("cpu")).eval(), resized(folder, size + 2), tokens(size + 2)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, x), logits(theirs, x), rtol=1e-5, atol=1e-5)
        # With its noise, of 1e-9 of the old rows' covariance, it is nearly the same.
        noisy = transformers.AutoModelForCausalLM.from_pretrained(folder)
        noisy.resize_token_embeddings(size + 2)
        torch.testing.assert_close(logits(ours, x), logits(noisy.eval(), x), rtol=1e-3, atol=1e-3)
    decayed = [one for one in theirs.parameters() if one.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [one for one in theirs.parameters() if one.dim() < 2]},
    ]
    section = config.optimizer
    theirs_ = torch.optim.AdamW(groups, section.lr, section.betas, weight_decay=0.0)  # pyright: ignore
    step(ours, x, build_optimizer(section, ours))
    step(theirs, x, theirs_)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, x), logits(theirs, x), rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(
        ours.embedding.weight[: size + 2], theirs.get_input_embeddings().weight, rtol=0, atol=1e-5
    )


def test_rows_that_no_token_had_are_taken_first() -> None:
    """As in published models, whose tables are padded: the table keeps its size."""
    folder, size = start("llama tied", spare=40)
    config = composed()
    assert config.model.vocab_size == size + 40
    model, old = training_model(config, torch.device("cpu")), resized(folder, size + 40).get_input_embeddings().weight
    new = model.embedding.weight
    torch.testing.assert_close(new[size : size + 2], old[:size].mean(0).expand(2, -1))
    assert torch.equal(new[:size], old[:size])
    assert torch.equal(new[size + 2 : size + 40], old[size + 2 :])


def same_factors(ours: Transformer, theirs: Any) -> None:
    """Give peft's LoRA layers on o_proj and down_proj, or GPT-2's of that meaning, the factors of ours."""
    layers = theirs.base_model.model
    layers = layers.transformer.h if hasattr(layers, "transformer") else layers.model.layers
    for mine, yours in zip(ours.layers, layers, strict=True):
        attention = yours.attn.c_proj if hasattr(yours, "attn") else yours.self_attn.o_proj
        mlp = yours.mlp.c_proj if hasattr(yours.mlp, "c_proj") else yours.mlp.down_proj
        for one, other in ((mine.attention.output, attention), (mine.mlp.down, mlp)):
            for factor in ("lora_A", "lora_B"):
                weight = getattr(one, factor)["default"].weight
                with torch.no_grad():
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
                    getattr(other, factor)["default"].weight.copy_(weight)


def peft_section(family: str, tied: bool, trained: str, ids: list[int]) -> dict[str, Any]:
    """What the LoraConfig of peft says for the same training."""
    table = FAMILIES[family][1]
    if trained == "new_rows":
        return {"trainable_token_indices": dict.fromkeys([table] if tied else [table, "lm_head"], ids)}
    return {"modules_to_save": [table, "lm_head"], "ensure_weight_tying": tied}


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("trained", ["new_rows", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_trained_beside_an_adapter_as_in_peft(family: str, trained: str) -> None:
    folder, size = start(family)
    config = composed(*LORA, f"adapter.train_embeddings={trained}", "optimizer.weight_decay=0.1")
    ours, x = training_model(config, torch.device("cpu")), tokens(size + 2)
    tied, ids = config.model.tied_embeddings, [size, size + 1]
    section = peft.LoraConfig(
        r=2, lora_alpha=32, target_modules=list(FAMILIES[family][2:]), fan_in_fan_out=family == "gpt2",
        **peft_section(family, tied, trained, ids),
    )  # fmt: skip
    theirs: Any = peft.get_peft_model(resized(folder, size + 2), section)
    same_factors(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, x), logits(theirs, x), rtol=1e-5, atol=1e-5)
    frozen = ours.embedding.token_adapter.base_layer if trained == "new_rows" else ours.embedding.original_module  # pyright: ignore
    before = frozen.weight.clone()
    optimizer = build_optimizer(config.optimizer, ours)
    trainable = [one for one in theirs.parameters() if one.requires_grad]
    padding = (config.model.padded_vocab_size - size - 2) * config.model.dim * (1 if tied else 2)
    assert sum(one.numel() for group in optimizer.param_groups for one in group["params"]) == (
        sum(one.numel() for one in trainable) + (padding if trained == "all" else 0)
    )
    theirs_ = torch.optim.AdamW(trainable, config.optimizer.lr, config.optimizer.betas, weight_decay=0.1)  # pyright: ignore
    for _ in range(2):
        optimizer.zero_grad()
        theirs_.zero_grad()
        step(ours, x, optimizer)
        step(theirs, x, theirs_)
    with torch.no_grad():
        wanted = logits(theirs, x)
        torch.testing.assert_close(logits(ours, x), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(frozen.weight, before)
        table = ours.embedding.weight
        assert (table[:size] - before[:size]).any() == (trained == "all"), "the old rows are frozen"
        assert (table[size : size + 2] - before[size : size + 2]).any()
        merge(ours)
        assert isinstance(ours.embedding, nn.Embedding)
        torch.testing.assert_close(logits(ours, x), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits(theirs.merge_and_unload(), x), wanted, rtol=1e-5, atol=1e-5)
