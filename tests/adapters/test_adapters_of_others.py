"""Adapters that peft made on models of transformers: what they compute, here and in what we make of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted import adapter_section, of_form, perturb
from hub_models import reference
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretune.adapters import files
from pretune.adapters.attach import attach, merge
from pretune.adapters.from_huggingface import their_adapter
from pretune.adapters.huggingface import adapter_for_huggingface
from pretune.core.config import InputError
from pretune.core.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pretune.model.huggingface.fitting import family_of
from pretune.model.huggingface.folding import adapter_layers
from pretune.run.pretrained import PretrainedModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
TOKENS = torch.randint(0, 101, (2, 17), generator=torch.Generator().manual_seed(1))
QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
"""What peft targets on most models unless told otherwise."""
ALL: dict[str, Any] = {"target_modules": "all-linear"}
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6}
LYCORIS: dict[str, Any] = {"r": 4, "alpha": 6}
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 3},
    "alpha_pattern": {"v_proj": 5, r"layers\.[01]\.mlp\.down_proj": 12},
}
VOCABULARY: dict[str, Any] = {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}

CASES: dict[str, tuple[str, Any]] = {
    "lora on q and v": ("llama", peft.LoraConfig(**LORA, **QV)),
    "lora everywhere": ("qwen2", peft.LoraConfig(**LORA, **ALL)),
    "lora patterns": ("llama", peft.LoraConfig(**LORA, **ALL, **PATTERNS)),
    "rslora patterns": ("llama biases", peft.LoraConfig(**LORA, **ALL, **PATTERNS, use_rslora=True)),
    "lora on the vocabulary": ("llama", peft.LoraConfig(**LORA, **VOCABULARY)),
    "lora on a tied vocabulary": ("qwen2", peft.LoraConfig(**LORA, **VOCABULARY, ensure_weight_tying=True)),
    "lora in one block": ("qwen3", peft.LoraConfig(**LORA, target_modules=["up_proj"], layers_to_transform=[1])),
    "lora phi3": ("phi3", peft.LoraConfig(**LORA, **ALL)),
    "lora gpt2": ("gpt2", peft.LoraConfig(**LORA, **ALL, fan_in_fan_out=True)),
    "dora gpt2 in part": (
        "gpt2",
        peft.LoraConfig(**LORA, target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True),
    ),
    "lora gemma3": ("gemma3", peft.LoraConfig(**LORA, **QV, use_rslora=True)),
    "dora olmo2": ("olmo2", peft.LoraConfig(**LORA, **ALL, use_dora=True)),
    "dora on q and v": ("llama", peft.LoraConfig(**LORA, **QV, use_dora=True)),
    "dora patterns": ("qwen2", peft.LoraConfig(**LORA, **ALL, **PATTERNS, use_dora=True)),
    "loha on q and v": ("qwen2", peft.LoHaConfig(**LYCORIS, **QV)),
    "loha patterns": ("llama", peft.LoHaConfig(**LYCORIS, **ALL, **PATTERNS)),
    "lokr on single layers": ("llama", peft.LoKrConfig(**LYCORIS, target_modules=["o_proj", "down_proj"])),
    "lokr factor phi3": ("phi3", peft.LoKrConfig(r=2, alpha=3, **ALL, decompose_factor=4)),
}
"""The model and peft's configuration."""
TARGETS = {
    "lora on q and v": ["attention.qkv"],
    "dora on q and v": ["attention.qkv"],
    "loha on q and v": ["attention.qkv"],
    "lora gemma3": ["attention.qkv"],
    "dora gpt2 in part": ["attention.qkv", "mlp.up"],
    "lora on the vocabulary": ["embedding", "head", "attention.output"],
    "lora on a tied vocabulary": ["embedding", "attention.output"],
    "lora in one block": ["layers.1.mlp.gate_up"],
    "lokr on single layers": ["attention.output", "mlp.down"],
}


def made(case: str, folder: Path) -> Any:
    """peft's model with random factors, whose files are in folder/base and folder/adapter."""
    family, config = CASES[case]
    base = reference(family, vocab_size=101, pad_token_id=0)
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = peft.get_peft_model(base, copy.deepcopy(config))
    perturb(model, 0.2)
    model.save_pretrained(str(folder / "adapter"))
    return model.eval()


def section_of(case: str, **changes: Any) -> Any:
    config = CASES[case][1]
    kind = "dora" if getattr(config, "use_dora", False) else config.peft_type.value.lower()
    own = {"rank": config.r, "alpha": float(getattr(config, "lora_alpha", 0) or config.alpha)}
    if kind in ("lora", "dora"):
        own["rslora"] = config.use_rslora
    if kind == "lokr":
        own["factor"] = None if config.decompose_factor == -1 else config.decompose_factor
    return adapter_section(kind, **{"targets": TARGETS.get(case, ["all"]), **own, **changes})


def plain(folder: Path) -> Any:
    """Our model with the weights of folder/base."""
    from pretune.model.transformer import Transformer

    found = PretrainedModel(folder / "base", "base")
    model = Transformer(found.config())
    found.load(model)
    return model.eval()


def taken(case: str, folder: Path) -> Any:
    """The same with the adapter of folder/adapter."""
    model = plain(folder)
    theirs = their_adapter(folder / "adapter", adapter_layers(model.config, False))
    theirs.check(section_of(case), model)
    attach(model, section_of(case), 0, "base", theirs.patterns)
    theirs.load(model)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        if hasattr(model, "unembed"):
            return model.unembed(model(TOKENS))
        return model(TOKENS).logits


def export(model: Any, folder: Path, name: str) -> Path:
    """The adapter of `model` as peft's files for the model of transformers."""
    ours, theirs = folder / f"{name}-ours", folder / name
    for one in (ours, theirs):
        one.mkdir()
    save_file({key: tensor.detach() for key, tensor in files.adapter_tensors(model).items()}, ours / ADAPTER_WEIGHTS)
    (ours / ADAPTER_CONFIG).write_text(json.dumps(files.adapter_config(model)))
    transposed = family_of(model.config).transposed
    tensors, content = adapter_for_huggingface(ours, adapter_layers(model.config, False), transposed)
    save_file(tensors, theirs / ADAPTER_WEIGHTS)
    (theirs / ADAPTER_CONFIG).write_text(json.dumps({**content, "base_model_name_or_path": str(folder / "base")}))
    return theirs


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_peft_computes_before_and_after_training(case: str, tmp_path: Path) -> None:
    expected, base = logits(made(case, tmp_path)), logits(plain(tmp_path))
    model = taken(case, tmp_path)
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    perturb(model, 0.1)  # as training would, in every value of its own
    trained = logits(model)
    assert (trained - expected).abs().max() > 0.01
    kept = peft.AutoPeftModelForCausalLM.from_pretrained(str(export(model, tmp_path, "kept")))
    torch.testing.assert_close(logits(kept.eval()), trained, rtol=1e-5, atol=1e-5)
    merge(model)
    torch.testing.assert_close(logits(model), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["lora", "lora orthogonal", "dora", "loha", "lokr"])
def test_our_own_comes_back_bit_for_bit(form: str, tmp_path: Path) -> None:
    made("lora everywhere", tmp_path)
    targets = ["attention.output", "mlp.down"] if form == "lokr" else ["all"]
    section, model = of_form(form, targets=targets), plain(tmp_path)
    attach(model, section, 0, "base")
    perturb(model)
    kept = export(model, tmp_path, "kept")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(kept))
    torch.testing.assert_close(logits(theirs.eval()), logits(model), rtol=1e-5, atol=1e-5)
    first = their_adapter(kept, adapter_layers(model.config, False))
    again, section = plain(tmp_path), of_form(form, targets=targets, **({"init": "zero"} if "lora" in form else {}))
    first.check(section, again)
    attach(again, section, 1, "base", first.patterns)
    first.load(again)
    assert not any(first.patterns)
    assert_equal(files.adapter_tensors(again), files.adapter_tensors(model))


def test_one_of_others_comes_back_bit_for_bit_once_it_is_ours(tmp_path: Path) -> None:
    made("dora patterns", tmp_path)
    model = taken("dora patterns", tmp_path)
    perturb(model)
    again = their_adapter(export(model, tmp_path, "kept"), adapter_layers(model.config, False))
    other = plain(tmp_path)
    attach(other, section_of("dora patterns"), 0, "base", again.patterns)
    again.load(other)
    assert_equal(files.adapter_tensors(other), files.adapter_tensors(model))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_was_zero_is_trained_from_here_on(tmp_path: Path) -> None:
    """Keys, which the adapter is not on, are rows of the matrix that it is on here."""
    made("lora on q and v", tmp_path)
    model = taken("lora on q and v", tmp_path)
    second = files.adapter_tensors(model)["base_model.model.layers.0.attention.qkv.lora_B.weight"]
    assert not second[32:48].any()
    model.unembed(model(TOKENS)).square().sum().backward()
    assert second.grad is not None
    assert second.grad[32:48].any()


def test_each_thing_to_know_is_one_line(tmp_path: Path) -> None:
    made("lora on q and v", tmp_path)
    theirs = their_adapter(tmp_path / "adapter", adapter_layers(plain(tmp_path).config, False))
    (bare,) = theirs.notes(str(tmp_path / "base"))
    assert bare.endswith("is not on k_proj, part of one layer here (qkv): training adapts them too")
    other, _ = theirs.notes("owner/name@main")
    assert other.endswith(f"says that it was trained on {tmp_path / 'base'}, not on owner/name@main")


def change(folder: Path, **keys: Any) -> None:
    path = folder / "adapter" / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head'] changes what the adapter computes, or"),
        ({"bias": "all"}, "bias = all changes"),
        ({"lora_bias": True}, "lora_bias = True changes"),
        ({"layer_replication": [[0, 2]]}, "layer_replication = [[0, 2]] changes"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices = [3] changes"),
        ({"use_of_tomorrow": 3}, "use_of_tomorrow = 3 changes what the adapter computes, or is not known here: merge"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa_niter_4 may have changed the weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = olora may have changed the weights below the adapter"),
        ({"peft_type": "IA3"}, "peft_type = IA3 is none of lora, dora, loha and lokr: merge it with peft"),
        ({"r": "4"}, "r = 4 must be a positive whole number"),
        ({"lora_alpha": None}, "lora_alpha = None must be a positive number"),
        ({"rank_pattern": {"q_proj(": 4}}, "rank_pattern: 'q_proj(' is no regular expression"),
        ({"rank_pattern": [4]}, "rank_pattern = [4] must be an object"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern['q_proj'] = -1 must be a positive number"),
    ],
)
def test_what_it_cannot_be_here_is_named(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    made("lora on q and v", tmp_path)
    change(tmp_path, **keys)
    with pytest.raises(InputError) as caught:
        their_adapter(tmp_path / "adapter", adapter_layers(plain(tmp_path).config, False))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "changes", "settings"),
    [
        ("lora on q and v", {"rank": 8}, "set adapter.rank=4"),
        ("lora on q and v", {"alpha": 8.5, "rslora": True}, "set adapter.alpha=6 adapter.rslora=false"),
        ("lora on q and v", {"targets": ["all"]}, "set adapter.targets=[attention.qkv]"),
        ("lora on q and v", {"init": "pissa"}, "set adapter.init=zero"),
        ("lora everywhere", {"targets": ["qkv"]}, "set adapter.targets=[all]"),
        ("lora in one block", {"targets": ["gate_up"]}, "set adapter.targets=[layers.1.mlp.gate_up]"),
        ("lora on the vocabulary", {"targets": ["all"]}, "set adapter.targets=[attention.output,embedding,head]"),
        ("lokr factor phi3", {"factor": None}, "set adapter.factor=4"),
    ],
)
def test_another_section_says_what_to_set(case: str, changes: dict[str, Any], settings: str, tmp_path: Path) -> None:
    made(case, tmp_path)
    model = plain(tmp_path)
    theirs = their_adapter(tmp_path / "adapter", adapter_layers(model.config, False))
    with pytest.raises(InputError) as caught:
        theirs.check(section_of(case, **changes), model)
    assert str(caught.value).endswith(settings)


def test_another_kind_says_all_that_there_is_to_set(tmp_path: Path) -> None:
    made("lora on q and v", tmp_path)
    model = plain(tmp_path)
    theirs = their_adapter(tmp_path / "adapter", adapter_layers(model.config, False))
    with pytest.raises(InputError) as caught:
        theirs.check(adapter_section("loha", targets=["attention.qkv"]), model)
    assert str(caught.value).endswith("set adapter=lora adapter.rank=4 adapter.alpha=6 adapter.rslora=false")


def test_a_kronecker_product_on_a_part_of_a_layer_is_refused(tmp_path: Path) -> None:
    case = "lokr on single layers"
    base = reference("llama", vocab_size=101, pad_token_id=0)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoKrConfig(**LYCORIS, target_modules=["q_proj"])
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
    model = plain(tmp_path)
    theirs = their_adapter(tmp_path / "adapter", adapter_layers(model.config, False))
    with pytest.raises(InputError, match="is on q_proj, part of one layer here"):
        theirs.check(section_of(case), model)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "other base"])
def test_what_does_not_fit_is_named_and_nothing_is_changed(fault: str, tmp_path: Path) -> None:
    case = "lora on q and v"
    made(case, tmp_path)
    path, name = (
        tmp_path / "adapter" / ADAPTER_WEIGHTS,
        "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight",
    )
    stored, model = load_file(path), plain(tmp_path)
    if fault == "missing":
        del stored[name]
    if fault == "extra":
        stored["base_model.model.model.layers.7.self_attn.v_proj.lora_A.weight"] = torch.ones(4, 32)
    if fault == "shape":
        stored[name] = torch.ones(4, 33)
    if fault == "other base":
        stored["base_model.model.lm_head.weight"] = torch.ones(101, 32)
    save_file(stored, path)
    theirs = their_adapter(tmp_path / "adapter", adapter_layers(model.config, False))
    attach(model, section_of(case), 0, "base", theirs.patterns)
    before = copy.deepcopy(files.adapter_tensors(model))
    expected = {
        "missing": f"does not fit the model of stage.init_from: {name} is missing",
        "extra": "layers.7.self_attn.v_proj.lora_A.weight has no place",
        "shape": f"{name} is [4, 33], in the model [4, 32]",
        "other base": "has its own lm_head.weight, which is not that of stage.init_from: merge it with peft",
    }
    with pytest.raises(InputError) as caught:
        theirs.load(model)
    assert expected[fault] in str(caught.value)
    assert_equal(files.adapter_tensors(model), before)


def test_an_embedding_that_a_tied_head_shares_is_refused(tmp_path: Path) -> None:
    base = reference("llama tied, wide heads", vocab_size=101, pad_token_id=0)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(**LORA, target_modules=["embed_tokens"])
    peft.get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    model = plain(tmp_path)
    theirs = their_adapter(tmp_path / "adapter", adapter_layers(model.config, False))
    with pytest.raises(InputError, match=r"is on the embedding alone .* and this model has one matrix for embedding"):
        theirs.check(section_of("lora on q and v"), model)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    made("lora on q and v", tmp_path)
    (tmp_path / "adapter" / ADAPTER_WEIGHTS).rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(InputError, match="is a pickle, which may run code when it is read"):
        their_adapter(tmp_path / "adapter", adapter_layers(plain(tmp_path).config, False))
