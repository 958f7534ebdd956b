"""The likeliest tokens of a teacher, against torch's own softmax and top-k over all logits at once."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from pretune.core.batch import Batch
from pretune.objectives.config import DistillationConfig
from pretune.objectives.distillation import teacher_outputs


@pytest.mark.parametrize("rounded", [False, True])
def test_the_likeliest_tokens_and_all_others_together(rounded: bool) -> None:
    """In chunks that do not divide the positions, and under autocast, as a run on a CPU with bfloat16 asks for them."""
    config = DistillationConfig.model_construct(chunk_tokens=5, top_k=3, temperature=2.0)
    model = tiny_model()
    tokens = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=rounded):
        found = teacher_outputs(config, 61, None)(model, Batch(tokens, tokens, None))
        wanted = model.unembed(model(tokens)).float().div(2.0).log_softmax(-1)
    values = wanted.topk(3).values
    assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
        "log_probs": (torch.float16, (2, 7, 4)),
        "tokens": (torch.int32, (2, 7, 3)),
    }
    others = torch.log1p(-values.exp().sum(-1, keepdim=True))
    torch.testing.assert_close(found["log_probs"].float(), torch.cat((values, others), -1), rtol=0, atol=4e-3)
    torch.testing.assert_close(wanted.gather(-1, found["tokens"].long()), values, rtol=0, atol=0)
