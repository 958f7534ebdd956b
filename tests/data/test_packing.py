from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import MATHQA, byte_tokenizer, data_config, files, write_lines, write_texts

from pretune.core.batch import IGNORE
from pretune.core.config import ConfigError, InputError
from pretune.data.config import FileTokenizer
from pretune.data.loader import Loader
from pretune.data.packing import best_fit, make_plan
from pretune.data.shards import prepare
from pretune.data.tokenizer import load_tokenizer
from pretune.data.tokens import TokenData
from pretune.model.transformer import Transformer
from pretune.objectives.language_modeling import score_tokens

PACKINGS = [
    {"mode": mode, "too_long": too_long, "isolate": isolate}
    for mode in ("stream", "documents", "none")
    for too_long in ("cut", "split", "drop")
    for isolate in (True, False)
]


def scored_transitions(data: TokenData, length: int, packing: dict[str, Any]) -> list[tuple[int, int]]:
    """Every (input, target) that should be scored, derived from the documents alone."""
    ends = data.document_ends
    tokens, flags = data.read(0, data.num_tokens)
    flags = np.ones(len(tokens), dtype=bool) if flags is None else flags
    pairs = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        stop = int(end)
        if packing["mode"] != "stream" and stop - begin > length:
            if packing["too_long"] == "drop":
                continue
            if packing["too_long"] == "cut":
                stop = int(begin) + length + 1
        pairs += [(int(tokens[at]), int(tokens[at + 1])) for at in range(int(begin), stop - 1) if flags[at + 1]]
    if packing["mode"] == "stream" and not packing["isolate"]:
        pairs += [(int(tokens[end - 1]), int(tokens[end])) for end in ends[:-1] if flags[end]]
    return sorted(pairs)


@given(
    st.lists(st.text("ab \n", min_size=1, max_size=40), min_size=8, max_size=25, unique=True),
    st.integers(2, 24),
    st.sampled_from(PACKINGS),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_transition_is_scored_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], length: int, packing: dict[str, Any]
) -> None:
    """With any packing, each scored token is predicted exactly once, EOS included, and no other token is."""
    folder = tmp_path_factory.mktemp("data")
    changes = {"sequence_length": length, "packing": packing, "validation": {"fraction": 0.01, "seed": 0}}
    config = data_config(source=files(write_texts(folder, texts)), **changes)
    own = {"source": files(write_texts(folder, ["held out"], "validation.jsonl")), "fraction": None, "seed": 0}
    config = data_config(source=config.source.model_dump(mode="json"), **(changes | {"validation": own}))
    data = prepare(config, byte_tokenizer(), folder).train
    expected = scored_transitions(data, length, packing)
    if not expected and packing["too_long"] == "drop":
        return
    found = []
    for batch in Loader(data, config, seed=0).batches(3):
        assert batch.inputs.shape == batch.targets.shape == (3, length)
        keep = batch.targets != IGNORE
        found += list(zip(batch.inputs[keep].tolist(), batch.targets[keep].tolist(), strict=True))
        if batch.document_ids is not None:
            assert batch.document_ids.shape == batch.inputs.shape
            # Within a sequence, a document is contiguous: its ids never decrease.
            assert (batch.document_ids.diff(dim=1) >= 0).all()
    assert sorted(found) == expected


def test_packed_is_unpacked(tmp_path: Path, tiny_model: Transformer) -> None:
    """The loss of a token does not depend on the documents that its document is packed with."""
    losses = {}
    for mode in ("documents", "none"):
        packing = {"mode": mode, "too_long": "drop", "isolate": True}
        config = data_config(format=MATHQA, packing=packing, sequence_length=192)
        data = prepare(config, byte_tokenizer(), tmp_path).train
        total, count = 0.0, 0
        for batch in Loader(data, config, seed=0).batches(8):
            total += score_tokens(tiny_model, batch, 4096).nll.double().sum().item()
            count += batch.num_scored()
        losses[mode] = (total, count)
    assert losses["documents"][1] == losses["none"][1]
    assert losses["documents"][0] == pytest.approx(losses["none"][0], rel=1e-5)


def test_padding_is_never_scored_and_its_content_does_not_matter(tmp_path: Path, tiny_model: Transformer) -> None:
    packing = {"mode": "none", "too_long": "drop", "isolate": True}
    config = data_config(format=MATHQA, packing=packing, sequence_length=192)
    batch = next(Loader(prepare(config, byte_tokenizer(), tmp_path).train, config, seed=0).batches(4))
    assert batch.document_ids is not None
    padding = batch.document_ids == 1
    assert padding.any()
    assert (batch.targets[padding] == IGNORE).all()
    before = score_tokens(tiny_model, batch, 4096).nll
    batch.inputs[padding] = 7
    assert torch.equal(before, score_tokens(tiny_model, batch, 4096).nll)


@given(st.lists(st.integers(1, 32), min_size=1, max_size=300))
def test_best_fit_overfills_no_row_and_beats_first_come(lengths: list[int]) -> None:
    sizes = np.array(lengths)
    rows = best_fit(sizes, 32)
    fill = np.bincount(rows, weights=sizes)
    assert fill.max() <= 32
    assert (fill > 0).all()
    # Best fit decreasing needs at most 11/9 of the optimum plus one sequence (Johnson 1973).
    assert len(fill) <= max(11 / 9 * np.ceil(sizes.sum() / 32) + 1, 2 * sizes.sum() / 32 + 1)


def test_a_million_documents_are_packed_without_a_loop_over_them() -> None:
    lengths = np.random.default_rng(1).integers(20, 160, size=1_000_000)
    plan = make_plan(np.cumsum(lengths), 512, "documents", "drop", everything)
    assert plan.report["padding"] < 0.01 * lengths.sum()


def everything(start: int, stop: int) -> bool:
    """All tokens of these documents are scored."""
    return start < stop


@pytest.mark.parametrize(("too_long", "lost"), [("cut", 23 + 16), ("split", 0), ("drop", 40 + 17 + 33)])
def test_what_is_too_long_is_counted(too_long: Any, lost: int) -> None:
    plan = make_plan(np.cumsum([5, 40, 16, 17, 33]), 16, "documents", too_long, everything)
    assert (plan.report["too_long"], plan.report["lost_tokens"]) == (3, lost)
    if too_long == "drop":
        assert sorted(plan.lengths.tolist()) == [5, 16]
    if too_long == "cut":
        assert sorted(plan.lengths.tolist()) == [5, 16, 16, 16, 16]
    if too_long == "split":
        # 17 = 16 inputs and one last target; 33 = 16 + 16 inputs and one last target.
        assert sorted(plan.lengths.tolist()) == [5, 8, 16, 16, 16, 16, 16, 16]


def test_mathqa_wastes_hardly_anything(shared_data: Path, tmp_path: Path) -> None:
    packing = {"mode": "documents", "too_long": "drop", "isolate": True}
    source = files(shared_data / "mathqa" / "train.json")
    config = data_config(source=source, format=MATHQA, packing=packing, sequence_length=512)
    path = str(shared_data / "tokenizers" / "gpt2" / "tokenizer.json")
    tokenizer = load_tokenizer(
        FileTokenizer(kind="file", path=path, eos="<|endoftext|>", add_tokens=()), config, tmp_path
    )
    loader = Loader(prepare(config, tokenizer, tmp_path).train, config, seed=1)
    assert loader.report["padding"] < 0.02 * loader.num_sequences * 512


def test_a_data_set_without_a_row_is_an_error(tmp_path: Path) -> None:
    records = [{"text": f"far too long for a row of eight tokens {number}"} for number in range(10)]
    packing = {"mode": "documents", "too_long": "drop", "isolate": True}
    config = data_config(source=files(write_lines(tmp_path / "a.jsonl", records)), packing=packing, sequence_length=8)
    with pytest.raises(InputError, match="does not give one sequence of 8 tokens"):
        Loader(prepare(config, byte_tokenizer(), tmp_path).train, config, seed=1)


@pytest.mark.parametrize("too_long", ["cut", "split"])
def test_parts_of_long_documents_keep_what_is_scored_and_no_more(tmp_path: Path, too_long: str) -> None:
    format = {"kind": "prompt_completion", "prompt": "p", "completion": "c", "score_prompt": False}
    records = [{"p": "short", "c": "yes"}, {"p": "p" * 30, "c": "0123456789"}, {"p": "q" * 10, "c": "abcdefghijklm"},
               {"p": "r" * 90, "c": "z"}]  # fmt: skip
    held_out = {"source": files(write_lines(tmp_path / "v.jsonl", [{"p": "p", "c": "c"}])), "fraction": None}
    packing = {"mode": "documents", "too_long": too_long, "isolate": True}
    config = data_config(source=files(write_lines(tmp_path / "a.jsonl", records)), validation=held_out, format=format,
                         packing=packing, sequence_length=16)  # fmt: skip
    loader = Loader(prepare(config, byte_tokenizer(), tmp_path).train, config, seed=1)
    targets = torch.cat([batch.targets[batch.targets != IGNORE] for batch in loader.batches(4)]).tolist()
    eos, text = byte_tokenizer().eos_id, byte_tokenizer().decode([token for token in targets if token])
    assert loader.report["too_long"] == 3
    if too_long == "cut":
        # A truncated answer has no end to learn; a document cut before its answer is left out.
        assert sorted(text) == sorted("yes" + "abcdefg")
        assert targets.count(eos) == 1
        assert loader.num_sequences == 2
    else:
        assert sorted(text) == sorted("yes" + "0123456789" + "abcdefghijklm" + "z")
        assert targets.count(eos) == 4
        assert loader.report["lost_tokens"] == 16 + 80


PAIRS = {"mode": "pairs", "isolate": True}
PREFERENCE = {"kind": "preference", "template": {"kind": "instruction", "preamble": True, "score_prompt": False}}


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=30),
    st.integers(4, 20),
    st.sampled_from(["drop", "cut"]),
)
def test_pairs_stay_whole_side_by_side_and_fit(sizes: list[tuple[int, int]], capacity: int, too_long: Any) -> None:
    lengths = np.array(sizes).reshape(-1)
    ends = np.cumsum(lengths)
    plan = make_plan(ends, capacity, "pairs", too_long, everything)
    begins = ends - lengths
    document = np.searchsorted(ends, plan.starts, side="right")
    assert (begins[document] == plan.starts).all()
    assert (document[::2] % 2 == 0).all()
    assert (document[1::2] == document[::2] + 1).all()
    assert (plan.sequence_starts % 2 == 0).all()
    fits = [pair for pair, both in enumerate(sizes) if sum(both) <= capacity]
    assert sorted(document[::2] // 2) == (list(range(len(sizes))) if too_long == "cut" else fits)
    used = np.add.reduceat(plan.lengths, plan.sequence_starts[:-1]) if len(plan.lengths) else np.zeros(0)
    assert (used <= capacity).all()
    for at in range(0, len(document), 2):
        whole, kept = lengths[document[at : at + 2]], plan.lengths[at : at + 2]
        assert (plan.goes_on[at : at + 2] == (kept < whole)).all()
        if whole.sum() <= capacity:
            assert (kept == whole).all()
        else:
            assert kept.sum() == capacity
            assert (kept >= np.minimum(whole, capacity // 2)).all()
    assert plan.report["too_long"] == len(sizes) - len(fits)


def test_a_pair_that_loses_an_answer_is_left_out() -> None:
    # The last four tokens of each side are its answer; the second pair's prompts fill half a sequence or more.
    ends = np.cumsum([6, 6, 14, 14, 7, 5])
    begins = np.concatenate([[0], ends[:-1]])

    def any_scored(start: int, stop: int) -> bool:
        document = int(np.searchsorted(ends, start, side="right"))
        return bool(start < stop and stop > max(int(begins[document]), int(ends[document]) - 4))

    plan = make_plan(ends, 16, "pairs", "cut", any_scored)
    assert sorted(plan.starts.tolist()) == sorted(begins[[0, 1, 4, 5]].tolist())
    assert plan.report["too_long"] == 1
    assert plan.report["lost_tokens"] == 28


def test_the_sides_of_a_pair_are_numbered_2k_and_2k_plus_1(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "c" * (i + 1), "rejected": "r" * 3} for i in range(13)]
    held_out = rows.pop()
    source, other = write_lines(tmp_path / "a.jsonl", rows), write_lines(tmp_path / "b.jsonl", [held_out])
    config = data_config(
        source=files(source), validation={"source": files(other), "fraction": None}, format=PREFERENCE,
        packing=PAIRS | {"too_long": "drop"}, sequence_length=700,
    )  # fmt: skip
    data = prepare(config, byte_tokenizer(), tmp_path).train
    tokenizer, seen = byte_tokenizer(), []
    loader = Loader(data, config, seed=1)
    for batch in loader.batches(2):
        assert batch.document_ids is not None
        for inputs, targets, ids in zip(batch.inputs, batch.targets, batch.document_ids, strict=True):
            scored = [targets[(ids == number) & (targets != IGNORE)].tolist() for number in range(int(ids.max()) + 1)]
            scored = [tokenizer.decode(one) for one in scored if one]
            assert len(inputs) == 700
            seen += list(zip(scored[::2], scored[1::2], strict=True))
    assert sorted(seen) == sorted((row["chosen"], row["rejected"]) for row in rows)
    # A batch is a pure function of its position.
    assert torch.equal(loader.batch(7, 3).inputs, torch.cat([loader.batch(7 + i, 1).inputs for i in range(3)]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": PAIRS | {"too_long": "split"}}, "would separate the sides of a pair"),
        ({"packing": {"mode": "pairs", "isolate": False, "too_long": "drop"}}, "must not see the other"),
        ({"packing": {"mode": "documents", "isolate": True, "too_long": "drop"}}, "needs packing.mode pairs"),
        ({"format": {"kind": "text", "column": "text"}}, "needs packing.mode pairs"),
        (
            {
                "format": {
                    "kind": "preference",
                    "template": {"kind": "instruction", "preamble": True, "score_prompt": True},
                }
            },
            "score_prompt must be false",
        ),
    ],
)
def test_what_pairs_do_not_go_with(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data_config(**{"format": PREFERENCE, "packing": PAIRS | {"too_long": "drop"}} | changes)
