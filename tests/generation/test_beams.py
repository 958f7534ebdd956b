"""Beam search against transformers' generate on the same weights, and against exhaustive search."""

from __future__ import annotations

import itertools

import pytest
import torch
from decoding import PROMPTS, decoder, decoding
from tiny import tiny_model

from pretune.generation.beams import beam_search
from pretune.model.huggingface.weights import to_huggingface
from pretune.model.transformer import Transformer


def llama(model: Transformer):
    """transformers' Llama with the weights of a tiny model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = model.config
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.dim,
        intermediate_size=ours.mlp_dim,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        max_position_embeddings=ours.max_sequence_length,
        rms_norm_eps=ours.norm.eps,
        tie_word_embeddings=True,
    )
    theirs = LlamaForCausalLM(config)
    missing, unexpected = theirs.load_state_dict(to_huggingface(model.state_dict(), ours), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return theirs.eval()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "changes",
    [
        {"num_beams": 2},
        {"num_beams": 4, "length_penalty": 2.0},
        {"num_beams": 3, "length_penalty": -1.0},
        {"num_beams": 3, "repetition_penalty": 1.4, "length_penalty": 0.0},
    ],
)
def test_beams_are_those_of_transformers(changes, seed) -> None:
    model = tiny_model(
        seed=seed, num_kv_heads=2, init={"std": 0.2, "output": "plain", "embedding_std": 0.2, "head_std": 0.2}
    )
    ends, config = [9, 17, 33], decoding(max_new_tokens=10, **changes)
    theirs = llama(model)
    found = beam_search(decoder(model, *ends), PROMPTS, config)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        wanted = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
            repetition_penalty=config.repetition_penalty,
            max_new_tokens=config.max_new_tokens,
        )[0, len(prompt) :].tolist()
        assert tokens == wanted


def test_enough_beams_find_the_likeliest_text_of_all() -> None:
    model = tiny_model(vocab_size=5)
    (found,) = beam_search(decoder(model, -1, vocab_size=5), [[1, 2]], decoding(max_new_tokens=3, num_beams=25))
    texts = torch.tensor([[1, 2, *text] for text in itertools.product(range(5), repeat=3)])
    with torch.no_grad():
        scores = model.unembed(model(texts)).log_softmax(-1)[:, 1:-1].gather(-1, texts[:, 2:, None]).sum((1, 2))
    assert found == texts[scores.argmax(), 2:].tolist()
