"""A model that transformers builds computes the same in our loop: loss, step, documents, texts."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from decoding import decoder, ids
from library_models import SIZES, library_model, library_section
from optimizer_sections import adamw
from torch import Tensor

from pretune.core.batch import IGNORE, Batch
from pretune.core.config import ConfigError, InputError, validate
from pretune.model.build import new_model
from pretune.model.costs import matrix_parameters, parameters_by_part, training_flops
from pretune.model.counts import count_parameters
from pretune.model.transformers_model.config import TransformersConfig, library_config
from pretune.model.transformers_model.folder import load_folder, read_section, save_folder
from pretune.model.transformers_model.model import TransformersModel
from pretune.objectives.language_modeling import language_modeling, score_tokens
from pretune.optim.optimizers import build_optimizer

TOKENS = torch.randint(2, 100, (2, 21), generator=torch.Generator().manual_seed(3))
BATCH = Batch(TOKENS[:, :-1].contiguous(), TOKENS[:, 1:].contiguous(), None)


def own_loss(model: TransformersModel) -> Tensor:
    """transformers' loss of the same model, the mean over tokens."""
    return model.inner(input_ids=BATCH.inputs, labels=BATCH.targets, shift_labels=BATCH.targets).loss


@pytest.mark.parametrize("kind", SIZES)
def test_the_loss_is_transformers_own(kind: str) -> None:
    model = library_model(kind)
    assert model.check() is None
    loss = language_modeling(model, BATCH, 16) / BATCH.targets.numel()
    torch.testing.assert_close(loss, own_loss(model), rtol=1e-5, atol=1e-5)
    scores = score_tokens(model, BATCH, 16)
    torch.testing.assert_close(scores.nll.mean(), loss.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "phi", "gpt_neox", "opt", "mamba", "cohere"])
def test_a_step_gives_transformers_weights(kind: str) -> None:
    ours, theirs = library_model(kind), library_model(kind)
    section = adamw(eps=1e-3)  # a key's bias has no gradient but rounding, which must not decide a step
    optimizer = build_optimizer(section, ours)
    (language_modeling(ours, BATCH, 16) / BATCH.targets.numel()).backward()
    optimizer.step()
    decayed = {name for group in optimizer.param_groups if group["weight_decay"] for name in group["param_names"]}
    groups = [
        {"params": [one for name, one in theirs.named_parameters() if (name in decayed) == decays],
         "weight_decay": section.weight_decay if decays else 0.0}
        for decays in (True, False)
    ]  # fmt: skip
    reference = torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps)
    own_loss(theirs).backward()
    reference.step()
    after = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, after[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", SIZES)
def test_documents_in_a_row_do_not_see_each_other(kind: str) -> None:
    model = library_model(kind).eval()
    documents = torch.tensor([[0] * 7 + [1] + [2] * 12, [5] * 20])
    with torch.no_grad():
        together = model(BATCH.inputs, documents)
        pieces = [BATCH.inputs[:1, :7], BATCH.inputs[:1, 7:8], BATCH.inputs[:1, 8:], BATCH.inputs[1:]]
        apart = [model(piece) for piece in pieces]
    torch.testing.assert_close(together[:1], torch.cat(apart[:3], 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1:], apart[3], rtol=1e-4, atol=1e-5)


def test_a_recurrent_model_learns_from_documents_apart() -> None:
    model = library_model("mamba")
    assert not model.isolates
    documents = torch.tensor([[0] * 7 + [1] * 13, [0] * 20])
    targets = BATCH.targets.clone()
    targets[0, 6] = IGNORE
    language_modeling(model, Batch(BATCH.inputs, targets, documents), 16).backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    for rows, targets_of in ((BATCH.inputs[:1, :7], targets[:1, :7]), (BATCH.inputs[:1, 7:], targets[:1, 7:]),
                             (BATCH.inputs[1:], targets[1:])):  # fmt: skip
        language_modeling(model, Batch(rows, targets_of, None), 16).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["mixtral", "phi", "gpt_neox", "opt", "mamba", "bloom", "gemma2"])
def test_greedy_texts_are_those_of_generate(kind: str) -> None:
    model = library_model(kind).eval()
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [30, 31]]
    found = ids(decoder(model, 101, vocab_size=101), prompts, max_new_tokens=64)
    for prompt, text in zip(prompts, found, strict=True):
        whole = model.inner.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert text == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["phi", "mamba"])
def test_beams_are_those_of_generate(kind: str) -> None:
    model = library_model(kind).eval()
    found = ids(decoder(model, 101, vocab_size=101), [[5, 6, 7]], max_new_tokens=8, num_beams=3)
    whole = model.inner.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, num_beams=3, eos_token_id=None, pad_token_id=0
    )
    assert found == [whole[0, 3:].tolist()]


@pytest.mark.parametrize("kind", ["mixtral", "phi", "gpt_neox", "opt", "mamba"])
def test_the_folder_comes_back_as_it_is(kind: str, tmp_path: Path) -> None:
    model = library_model(kind).eval()
    wanted = model.unembed(model(BATCH.inputs)).detach()
    save_folder(model, tmp_path, 7, "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.eos_token_id == 7
    torch.testing.assert_close(theirs.eval()(BATCH.inputs).logits, wanted, rtol=1e-5, atol=1e-5)
    back = TransformersModel(read_section(tmp_path)).eval()
    load_folder(tmp_path, back)
    torch.testing.assert_close(back.unembed(back(BATCH.inputs)), wanted, rtol=0, atol=0)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, third = (TransformersModel(library_section("mamba")) for _ in range(3))
    before = torch.get_rng_state()
    for model, seed in ((first, 3), (second, 3), (third, 4)):
        model.reset_parameters(torch.Generator().manual_seed(seed))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), second.parameters(), third.parameters(), strict=True))
    assert all(torch.equal(one, other) for one, other, _ in pairs)
    assert not all(torch.equal(one, other) for one, _, other in pairs)


def test_counts_are_those_of_the_model() -> None:
    model = library_model("mixtral")
    total = sum(parameter.numel() for parameter in model.inner.parameters())
    assert count_parameters(model).total == sum(parameters_by_part(model).values()) == total
    experts = sum(one.numel() for one in model.inner.parameters() if one.dim() == 3)
    matrices = sum(one.numel() for one in model.inner.parameters() if one.dim() == 2) - 101 * 32  # the embedding
    assert matrix_parameters(model) == (matrices + experts // 2,) * 2
    assert training_flops(model, 20) == 6 * (matrices + experts // 2) + 12 * 2 * 4 * 8 * 20


def test_a_copy_and_a_skeleton_are_models_too() -> None:
    model = library_model("opt")
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(BATCH.inputs), model(BATCH.inputs))
    with torch.device("meta"):
        bare = new_model(library_section("opt"))
    assert {name: one.shape for name, one in bare.named_parameters()} == {
        name: one.shape for name, one in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "config has no model_type: give the contents of a config.json"),
        ({"model_type": "brand_new"}, "'brand_new' is no architecture that transformers builds"),
        (
            {"model_type": "brand_new", "auto_map": {"AutoConfig": "configuration_new.NewConfig"}},
            "it needs code that comes with the model (configuration_new.NewConfig), which is never run",
        ),
        ({"model_type": "clip"}, "'clip' is no language model in transformers"),
        ({"model_type": "opt", "quantization_config": {"bits": 4}}, "use the model's unquantized weights"),
        ({"model_type": "mixtral", "hidden_size": "many"}, "transformers does not take this config of model_type"),
    ],
)
def test_what_transformers_does_not_build_is_refused_in_a_line(config: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as refused:
        library_config(config)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError):
        validate(TransformersConfig, {"kind": "transformers", "vocab_size": 9, "config": config})


def test_weights_that_are_of_another_model_are_refused(tmp_path: Path) -> None:
    save_folder(library_model("phi"), tmp_path, 7, "float32")
    for changes, expected in (
        ({"num_hidden_layers": 3}, "weights of the model are not there"),
        ({"num_hidden_layers": 1}, "weights have no place in the model"),
        ({"intermediate_size": 40}, "weights have another shape than config.json says"),
    ):
        with pytest.raises(InputError, match=expected):
            load_folder(tmp_path, TransformersModel(library_section("phi", **changes)))
    with pytest.raises(InputError, match="a sequence of 129 tokens is longer than the 128 positions"):
        library_model("phi")(torch.zeros(1, 129, dtype=torch.int64))
