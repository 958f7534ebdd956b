"""Let a model continue texts.

B prompts that are still being continued, P columns of the longest prompt, V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretune.assembly import assemble_model, assemble_tokenizer, measured_run, pick_device
from pretune.config import ConfigError, InputError
from pretune.data.tokenizer import Tokenizer
from pretune.model.attention import KVCache
from pretune.model.transformer import Transformer
from pretune.precision import autocast
from pretune.run_config import RunConfig, SamplingConfig


def generate(config: RunConfig) -> int:
    """task=generate: continue `generate.prompt` with a checkpoint of the run that `config` names (checkpoint.use)."""
    if config.generate.prompt is None:
        raise ConfigError("there is nothing to continue; set generate.prompt='some text'")
    folder = measured_run(config)
    device, tokenizer = pick_device(config.device), assemble_tokenizer(config)
    model = assemble_model(config, folder, device)
    with autocast(config.precision, device):
        for text in continue_texts(model, tokenizer, [config.generate.prompt], config.generate, device):
            print(config.generate.prompt + text)
    return 0


def continue_texts(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig, device: torch.device
) -> list[str]:
    """What the model writes after each prompt."""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    new = continuations(model, tokenizer.vocab_size, tokenizer.eos_id, ids, sampling, device)
    return [tokenizer.decode(tokens) for tokens in new]


@torch.no_grad()
def continuations(
    model: Transformer,
    tokenizer_vocab_size: int,
    eos_id: int,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    device: torch.device,
) -> list[list[int]]:
    """The new tokens of each prompt, without the EOS that ended it.

    The model, on `device`, is left in the mode it came in. A text ends at EOS, after max_new_tokens, or where it fills
    the model's positions. An empty prompt starts a new document. What a prompt becomes depends on its place in the
    list, on the seed and on the weights; the other prompts change it by rounding at most. Raises InputError for a
    prompt that leaves no room for a new token.
    """
    limit = model.config.max_sequence_length
    prompts = [prompt or [eos_id] for prompt in prompts]
    _check_lengths(prompts, limit)
    room = [min(sampling.max_new_tokens, limit - len(prompt)) for prompt in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    generator = torch.Generator().manual_seed(sampling.seed)
    active = list(range(len(prompts)))
    was_training = model.training
    model.eval()
    try:
        tokens, cache = _left_padded(model, prompts, max(room, default=0), device)
        while active:
            logits = _next_logits(model, tokens, cache)[:, :tokenizer_vocab_size]
            # Drawn for every prompt, ended ones too: when one ends is nothing to the others.
            luck = torch.rand(len(prompts), generator=generator, dtype=torch.float64)[active]
            chosen = choose(logits, sampling, luck)
            for row, token in zip(active, chosen.tolist(), strict=True):
                new[row].append(token)
            going_on = [at for at, row in enumerate(active) if new[row][-1] != eos_id and len(new[row]) < room[row]]
            if len(going_on) < len(active):
                active = [active[at] for at in going_on]
                rows = torch.tensor(going_on, dtype=torch.int64)
                chosen = chosen[rows]
                cache.keep(rows.to(device))
            tokens = chosen[:, None].to(device)
    finally:
        model.train(was_training)
    return [tokens[:-1] if tokens[-1:] == [eos_id] else tokens for tokens in new]


def choose(logits: Tensor, sampling: SamplingConfig, luck: Tensor) -> Tensor:
    """A token id for each row of logits [B, V], on the CPU: temperature first, then top_k, then top_p.

    luck [B] in [0, 1) picks a place on the scale of cumulative probability, likeliest token first where top_k or top_p
    is set. Temperature 0 takes the likeliest token.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1).cpu()
    # Shifted before it is divided: the smallest temperature then makes -inf of the others, not NaN of all.
    scaled = (logits.float() - logits.float().amax(-1, keepdim=True)) / sampling.temperature
    ids = None
    if sampling.top_k is not None or sampling.top_p is not None:
        scaled, ids = scaled.topk(min(sampling.top_k or scaled.shape[-1], scaled.shape[-1]))
    # On the CPU, as not every accelerator has float64; in float64, the product below is always less than the sum.
    probabilities = scaled.softmax(-1).cpu().double()
    if sampling.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (before < sampling.top_p)
    cumulative = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulative, luck[:, None] * cumulative[:, -1:], right=True)
    return (place if ids is None else ids.cpu().gather(-1, place))[:, 0]


def _left_padded(
    model: Transformer, prompts: list[list[int]], num_new: int, device: torch.device
) -> tuple[Tensor, KVCache]:
    """Prompts as [B, P], padded on the left so that all end in the same column; and an empty cache with room enough."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    starts = torch.tensor([longest - len(prompt) for prompt in prompts], dtype=torch.int64, device=device)
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.head_weight.dtype
    cache = KVCache(model.config, starts, longest + num_new, dtype)
    return torch.tensor(rows, dtype=torch.int64, device=device), cache


def _next_logits(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    return model.unembed(model(tokens, cache=cache)[:, -1])  # [B, V]


def _check_lengths(prompts: list[list[int]], limit: int) -> None:
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) >= limit:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, and the model has room for {limit}, prompt and answer "
                "together; shorten it"
            )
