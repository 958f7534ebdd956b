"""DPO against the published formula on log-probabilities of transformers' Llama, and against TRL if installed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import Tensor

from pretune.core.batch import IGNORE, Batch
from pretune.core.config import validate
from pretune.model.huggingface.weights import to_huggingface
from pretune.model.transformer import Transformer
from pretune.objectives.config import DPOConfig
from pretune.objectives.preference import dpo, num_pairs, pair_log_probs, score_pairs

LENGTH = 24
# Prompt, chosen and rejected tokens of each pair of each sequence.
ROWS = [[(2, 4, 3), (1, 2, 5)], [(3, 5, 6)], [(1, 1, 1), (1, 3, 1), (2, 2, 2)], []]


def config(**changes: Any) -> DPOConfig:
    section = {"kind": "dpo", "beta": 0.3, "label_smoothing": 0.0, "length_normalized": False, "reference": "auto"}
    return validate(DPOConfig, {**section, "chunk_tokens": 10, **changes})


def pairs(seed: int = 0) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """Prompt, chosen and rejected token ids of every pair, sequence by sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [tuple(torch.randint(0, 61, (size,), generator=generator) for size in sizes) for sizes in row] for row in ROWS
    ]  # type: ignore[return-value]


def packed(rows: list[list[tuple[Tensor, Tensor, Tensor]]]) -> Batch:
    """The pairs side by side, as the loader packs them."""
    inputs = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
    targets, ids = torch.full_like(inputs, IGNORE), torch.zeros(len(rows), LENGTH, dtype=torch.int32)
    for row, content in enumerate(rows):
        column = number = 0
        for prompt, *sides in content:
            for side in sides:
                document = torch.cat([prompt, side])
                stop = column + len(document)
                inputs[row, column:stop] = document
                targets[row, column + len(prompt) - 1 : stop - 1] = side
                ids[row, column:stop] = number
                column, number = stop, number + 1
        ids[row, column:] = number
    return Batch(inputs, targets, ids)


def with_reference(batch: Batch, model: Transformer) -> Batch:
    with torch.no_grad():
        reference = {"log_probs": pair_log_probs(model, batch, 10)}
        return Batch(batch.inputs, batch.targets, batch.document_ids, reference)


def llama(model: Transformer, dtype: torch.dtype = torch.float64) -> Any:
    """transformers' Llama with the weights of `model`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = model.config
    other = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.dim,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.mlp_dim,
            vocab_size=shape.vocab_size,
            rms_norm_eps=shape.norm.eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope.theta},
            tie_word_embeddings=True,
        )
    )
    other.load_state_dict(to_huggingface(model.state_dict(), shape), strict=False)
    return other.to(dtype).eval()


def published_loss(model: Any, reference: Any, section: DPOConfig) -> tuple[Tensor, int]:
    """Equation 7 of arXiv 2305.18290, one sequence at a time, in the models' precision; and the number of pairs."""

    def log_prob(which: Any, prompt: Tensor, side: Tensor) -> Tensor:
        logits = which(torch.cat([prompt, side])[None]).logits[0]
        log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return log_probs.gather(-1, side[:, None]).sum()

    losses = []
    for prompt, *sides in (pair for row in pairs() for pair in row):
        gained = [log_prob(model, prompt, side) - log_prob(reference, prompt, side).detach() for side in sides]
        if section.length_normalized:
            gained = [one / len(side) for one, side in zip(gained, sides, strict=True)]
        margin = section.beta * (gained[0] - gained[1])
        smooth = section.label_smoothing
        losses.append(-(1 - smooth) * F.logsigmoid(margin) - smooth * F.logsigmoid(-margin))
    return torch.stack(losses).sum(), len(losses)


@pytest.mark.parametrize(
    "changes", [{}, {"label_smoothing": 0.2}, {"length_normalized": True, "beta": 2.0}, {"beta": 0.05}]
)
def test_loss_and_gradients_are_the_published_ones(changes: dict[str, Any]) -> None:
    section, batch = config(**changes), packed(pairs())
    policy, start = tiny_model(0), tiny_model(1)
    sums = dpo(policy, with_reference(batch, start), section)
    theirs = llama(policy)
    wanted, number = published_loss(theirs, llama(start), section)
    assert num_pairs(batch) == number == 6
    torch.testing.assert_close(sums["loss"].double(), wanted, rtol=1e-6, atol=1e-6)
    sums["loss"].backward()
    wanted.backward()
    names = {"embedding": "model.embed_tokens", "layers.1.mlp.down": "model.layers.1.mlp.down_proj"}
    for ours, other in names.items():
        found, expected = policy.get_submodule(ours).weight.grad, theirs.get_submodule(other).weight.grad
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_rewards_and_accuracy_are_what_they_are_called() -> None:
    section, batch = config(), packed(pairs())
    policy, start = tiny_model(0), tiny_model(1)
    filled = with_reference(batch, start)
    sums, scores = dpo(policy, filled, section), score_pairs(policy, filled, section)
    assert int(scores.real.sum()) == 6
    assert scores.num_tokens[scores.real].tolist() == [[4, 3], [2, 5], [5, 6], [1, 1], [3, 1], [2, 2]]
    chosen, rejected = scores.rewards[scores.real].unbind(-1)
    margin = chosen - rejected
    assert 0 < int((margin > 0).sum()) < 6
    assert sums["accuracy"].item() == int((margin > 0).sum())
    torch.testing.assert_close(sums["reward_margin"], margin.sum())
    torch.testing.assert_close(sums["reward_chosen"], chosen.sum())
    torch.testing.assert_close(sums["reward_rejected"], rejected.sum())
    assert not any(sums[name].requires_grad for name in sums if name != "loss")


@pytest.mark.parametrize("changes", [{}, {"label_smoothing": 0.3}, {"length_normalized": True, "beta": 5.0}])
def test_against_itself_the_loss_is_ln_2_and_half_of_the_pairs_are_right(changes: dict[str, Any]) -> None:
    model, batch = tiny_model(), packed(pairs())
    sums = dpo(model, with_reference(batch, model), config(**changes))
    assert sums["loss"].item() / 6 == pytest.approx(math.log(2), abs=1e-7)
    assert sums["accuracy"].item() / 6 == 0.5
    sums["loss"].backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_packed_is_one_pair_at_a_time_and_rows_add_up() -> None:
    section, batch = config(), packed(pairs())
    policy, start = tiny_model(0), tiny_model(1)
    filled = with_reference(batch, start)
    whole = dpo(policy, filled, section)
    alone = [packed([[pair]]) for row in pairs() for pair in row]
    for parts in ([with_reference(one, start) for one in alone], [filled.part(row, row + 1) for row in range(4)]):
        sums = [dpo(policy, part, section) for part in parts]
        for name, value in whole.items():
            torch.testing.assert_close(sum(part[name] for part in sums), value, rtol=1e-5, atol=1e-5)


def test_what_comes_before_or_beside_an_answer_is_not_scored() -> None:
    model, batch = tiny_model(), packed(pairs())
    with torch.no_grad():
        before = pair_log_probs(model, batch, 10)
    # Changes the chosen side of the first pair in the first sequence: the rest of the sequence is unaffected.
    inputs = batch.inputs.clone()
    inputs[0, 2:6] = (inputs[0, 2:6] + 1) % 61
    with torch.no_grad():
        after = pair_log_probs(model, Batch(inputs, batch.targets, batch.document_ids), 10)
    assert after[0, 0, 0] != before[0, 0, 0]
    changed = after != before
    changed[0, 0, 0] = False
    assert not changed.any()


def test_a_pair_without_an_answer_counts_for_nothing() -> None:
    section, batch = config(), packed(pairs())
    policy, start = tiny_model(0), tiny_model(1)
    targets = batch.targets.clone()
    targets[1][batch.document_ids[1] == 1] = IGNORE  # type: ignore[index]
    cut = Batch(batch.inputs, targets, batch.document_ids)
    assert num_pairs(cut) == 5
    sums = dpo(policy, with_reference(cut, start), section)
    others = dpo(policy, with_reference(packed([row for n, row in enumerate(pairs()) if n != 1]), start), section)
    torch.testing.assert_close(sums["loss"], others["loss"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler does what it deprecates
def test_compiled_as_one_graph_equals_eager() -> None:
    section, policy, start = config(), tiny_model(0, num_layers=1), tiny_model(1, num_layers=1)
    batch = with_reference(packed(pairs()), start)
    eager = dpo(policy, batch, section)
    compiled = torch.compile(dpo, fullgraph=True, dynamic=False, backend="aot_eager")(policy, batch, section)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value)
    parameters = list(policy.parameters())
    gradients = torch.autograd.grad(compiled["loss"], parameters)
    for found, expected in zip(gradients, torch.autograd.grad(eager["loss"], parameters), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def trl_trainer(trl: Any, policy: Any, start: Any, folder: Path, **settings: Any) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{number}": number for number in range(61)}, unk_token="w1"))
    arguments = trl.DPOConfig(
        output_dir=str(folder), beta=0.3, max_length=None, bf16=False, report_to=[], use_cpu=True, **settings
    )
    return trl.DPOTrainer(
        model=policy,
        ref_model=start,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "w2", "chosen": "w3", "rejected": "w4"}]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0"),
    )


def trl_batch(rows: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """Pairs as in TRL's collator: one side per row, all chosen sides first."""
    sequences = [(prompt, side) for index in (1, 2) for prompt, side in ((row[0], row[index]) for row in rows)]
    batch = {name: torch.zeros(len(sequences), LENGTH, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["completion_mask"] = torch.zeros_like(batch["input_ids"])
    for row, (prompt, side) in enumerate(sequences):
        stop = len(prompt) + len(side)
        batch["input_ids"][row, :stop] = torch.cat([prompt, side])
        batch["attention_mask"][row, :stop] = 1
        batch["completion_mask"][row, len(prompt) : stop] = 1
    return batch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [({"loss_type": ["sigmoid"]}, {}), ({"loss_type": ["sigmoid_norm"]}, {"length_normalized": True})],
)
def test_the_loss_is_that_of_trl(theirs: dict[str, Any], ours: dict[str, Any], tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed; the published formula is tested without it")
    policy, start = tiny_model(0), tiny_model(1)
    models = llama(policy, torch.float32), llama(start, torch.float32)
    trainer = trl_trainer(trl, *models, tmp_path, **theirs)
    rows = [pair for row in pairs() for pair in row]
    wanted = trainer.compute_loss(trainer.model.eval(), trl_batch(rows)).item()
    sums = dpo(policy, with_reference(packed(pairs()), start), config(**ours))
    assert sums["loss"].item() / len(rows) == pytest.approx(wanted, abs=1e-6)
