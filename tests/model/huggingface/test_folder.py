"""Models that transformers saved, read from their folders: logits, gradients and texts are transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hub_models import FAMILIES, reference, reference_config
from safetensors.torch import load_file, save_file
from tiny import imported
from torch import Tensor

from pretune.core.batch import Batch
from pretune.model.huggingface.config_json import huggingface_config, read_config
from pretune.model.huggingface.folder import WEIGHTS, Found, StoredTensors, open_folder
from pretune.model.huggingface.weights import load_huggingface, to_huggingface
from pretune.model.transformer import Transformer
from pretune.objectives.language_modeling import language_modeling

TOKENS = torch.randint(0, 101, (3, 25), generator=torch.Generator().manual_seed(1))


def read(folder: Path) -> Transformer:
    found = open_folder(folder)
    model = Transformer(found.config)
    load_huggingface(found.tensors, model)
    return model


def close(ours: Tensor, theirs: Tensor) -> None:
    # The bias of a key that is not rotated has no gradient but rounding: a softmax ignores what all logits share.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * max(theirs.abs().max().item(), 1e-3))


@pytest.fixture(params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Transformer, Found]:
    theirs = reference(request.param)
    theirs.save_pretrained(tmp_path)
    return theirs, read(tmp_path), open_folder(tmp_path)


def test_logits_and_gradients_are_those_of_transformers(both: tuple[Any, Transformer, Found]) -> None:
    theirs, model, found = both
    inputs, targets = TOKENS[:, :-1], TOKENS[:, 1:]
    logits, wanted = model.unembed(model(inputs)), theirs(inputs).logits
    close(logits, wanted)
    for output in (logits, wanted):
        F.cross_entropy(output.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    converted = to_huggingface(gradients, found.config)
    references = {name: one.grad for name, one in theirs.named_parameters() if one.grad is not None}
    assert converted.keys() == references.keys()
    for name, gradient in converted.items():
        close(gradient, references[name])


def test_the_loss_is_that_of_transformers(both: tuple[Any, Transformer, Found]) -> None:
    theirs, model, _ = both
    data = Batch(TOKENS[:, :-1], TOKENS[:, 1:], None, None)
    loss = language_modeling(model, data, chunk_tokens=16) / data.targets.numel()
    close(loss, theirs(TOKENS, labels=TOKENS).loss)


def test_packed_documents_are_what_each_is_alone(both: tuple[Any, Transformer, Found]) -> None:
    theirs, model, _ = both
    lengths = [4, 9, 12]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    row = TOKENS[:1]
    with torch.no_grad():
        logits = model.unembed(model(row, document_ids=ids))
        for ours, document in zip(logits.split(lengths, 1), row.split(lengths, 1), strict=True):
            close(ours, theirs(document).logits)


def generated(theirs: Any, prompts: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """64 greedy tokens [B, 64] after each prompt, and the logits [B, 64, V] that they were chosen from."""
    mask = torch.arange(prompts.shape[1]) >= starts[:, None]
    out = theirs.generate(
        prompts, attention_mask=mask.long(), do_sample=False, max_new_tokens=64, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, prompts.shape[1] :], torch.stack(out.logits, 1)


def test_texts_of_a_batch_padded_on_the_left_are_those_of_transformers(both: tuple[Any, Transformer, Found]) -> None:
    theirs, model, _ = both
    starts = torch.tensor([0, 5, 11])
    prompts = TOKENS.masked_fill(torch.arange(25) < starts[:, None], 0)
    # Logits, then 64 greedy tokens, one at a time from a cache.
    model.eval()
    theirs.eval()
    with torch.no_grad():
        if model.config.rope.follows_length:
            # transformers rotates all rows by the longest; in ours, as for each text alone.
            alone = [
                generated(theirs, row[None, start:], start[None] * 0)
                for row, start in zip(prompts, starts, strict=True)
            ]
            texts, wanted = (torch.cat(parts) for parts in zip(*alone, strict=True))
        else:
            texts, wanted = generated(theirs, prompts, starts)
        cache, new = model.new_cache(starts, 25 + 64), prompts
        for step in range(64):
            read = cache.to_read(new)
            cache.advance(read.shape[1])
            ours = model.unembed(model(read, cache=cache)[:, -1])
            close(ours, wanted[:, step])
            new = ours.argmax(-1, keepdim=True)
            assert torch.equal(new[:, 0], texts[:, step])


def test_in_and_out_again_gives_the_same_tensors_bit_for_bit(
    both: tuple[Any, Transformer, Found], tmp_path: Path
) -> None:
    _, model, found = both
    back, stored = to_huggingface(model.state_dict(), found.config), load_file(tmp_path / WEIGHTS)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)


EXCEPT = {
    "_name_or_path", "transformers_version", "dtype", "eos_token_id",  # of the file, or given by the caller
    "max_window_layers", "no_rope_layer_interval",  # count only where layers are not listed, as they are
    "original_max_position_embeddings", "partial_rotary_factor",  # repeat rope_parameters
    "n_ctx",  # repeats n_positions
}  # fmt: skip
"""What an exported config.json need not have from the one that was read."""


def test_in_and_out_again_gives_a_config_that_transformers_reads_alike(
    both: tuple[Any, Transformer, Found], tmp_path: Path
) -> None:
    _, _, found = both
    stored = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    content = huggingface_config(found.config, 0, "float32")
    (tmp_path / "config.json").write_text(json.dumps(content))
    written = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    differing = {key for key in stored.keys() | written.keys() if stored.get(key, 0) != written.get(key, 0)}
    if differing.intersection(("rope_parameters", "max_position_embeddings")):  # YaRN's defaults and stretched length
        assert stored["rope_parameters"].items() <= written["rope_parameters"].items()
        assert written["rope_parameters"]["rope_type"] == "yarn"
        differing -= {"rope_parameters", "max_position_embeddings"}
    assert differing - EXCEPT == set()
    assert read_config(tmp_path) == found.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_stored_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = reference("qwen2").to(dtype)
    theirs.save_pretrained(tmp_path)
    found = open_folder(tmp_path)
    assert {one.dtype for one in found.tensors.values()} == {dtype}
    model = imported(found.tensors, found.config)  # in float32, from those values
    close(model.unembed(model(TOKENS)), theirs.float()(TOKENS).logits)


def test_shards_are_one_model(tmp_path: Path) -> None:
    theirs = reference("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    close(read(tmp_path).unembed(read(tmp_path)(TOKENS)), theirs(TOKENS).logits)


@pytest.mark.parametrize(("added", "tied"), [(0.0, True), (0.25, False)])
def test_a_stored_head_is_left_out_only_where_it_is_the_embedding(added: float, tied: bool, tmp_path: Path) -> None:
    theirs = reference("qwen3")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    head = tensors["model.embed_tokens.weight"] + added * TOKENS.float().std()
    save_file({**tensors, "lm_head.weight": head}, tmp_path / WEIGHTS, {"format": "pt"})
    found = open_folder(tmp_path)
    assert found.config.tied_embeddings is tied
    reloaded = type(theirs).from_pretrained(tmp_path)
    close(read(tmp_path).unembed(read(tmp_path)(TOKENS)), reloaded(TOKENS).logits)


def test_gpt2_as_its_authors_stored_it(tmp_path: Path) -> None:
    """Names without a prefix, and masks among the weights."""
    theirs = reference("gpt2")
    theirs.save_pretrained(tmp_path)
    before = read(tmp_path).state_dict()
    tensors = {name.removeprefix("transformer."): one for name, one in load_file(tmp_path / WEIGHTS).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 96, 96).tril() for layer in range(3)}
    masks |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(3)}
    save_file(tensors | masks, tmp_path / WEIGHTS, {"format": "pt"})
    after = read(tmp_path).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_file_without_the_prefix_is_the_same_model(tmp_path: Path) -> None:
    theirs = reference("llama tied, wide heads")
    theirs.save_pretrained(tmp_path)
    before = read(tmp_path).state_dict()
    theirs.model.save_pretrained(tmp_path)  # the model without its head, which is tied: layers.0..., not model.layers.0
    assert "embed_tokens.weight" in load_file(tmp_path / WEIGHTS)
    after = read(tmp_path).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(StoredTensors(tmp_path)) == len(load_file(tmp_path / WEIGHTS))


@pytest.mark.parametrize("case", ["olmo2", "gemma", "gemma2", "gemma3"])
def test_bfloat16_is_as_far_from_float32_as_in_transformers(case: str, tmp_path: Path) -> None:
    theirs = reference(case).eval()
    theirs.save_pretrained(tmp_path)
    model = read(tmp_path).eval()
    with torch.no_grad():
        exact = theirs(TOKENS).logits
        theirs.bfloat16()
        model.bfloat16()
        rounded = model.unembed(model(TOKENS)), theirs(TOKENS).logits
    ours, wanted = ((one.float() - exact).square().mean().sqrt() for one in rounded)
    assert ours <= 1.2 * wanted


PUBLISHED_KEYS: dict[str, dict[str, Any]] = {
    "llama": {"is_llama_config": True, "pretraining_tp": 1, "rope_interleaved": False, "rope_scaling": None},
    "qwen2": {"use_mrope": False, "max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False},
    "smollm3": {"max_window_layers": 28, "pretraining_tp": 2, "use_sliding_window": False, "sliding_window": None},
    "phi3": {"auto_map": {"AutoConfig": "code.Config"}, "embd_pdrop": 0.0, "original_max_position_embeddings": 96},
    "gpt2": {"n_ctx": 96, "summary_type": "cls_index", "summary_use_proj": True, "summary_first_dropout": 0.1},
    "gemma2": {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"},
    "gemma3": {"_sliding_window_pattern": 6, "use_bidirectional_attention": False, "attn_logit_softcapping": None},
}


@pytest.mark.parametrize("case", PUBLISHED_KEYS)
def test_keys_of_published_files_that_change_nothing_are_known(case: str, tmp_path: Path) -> None:
    reference_config(case).save_pretrained(tmp_path)
    plain, file = read_config(tmp_path), tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | PUBLISHED_KEYS[case]))
    assert read_config(tmp_path) == plain
