"""8-bit products, float16 and bfloat16 on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from card import CARD, ON_THE_CARD
from recorded import series
from tiny import tiny_model
from torch import Tensor

from pretune.compute.precision import use_float8
from pretune.core.batch import Batch
from pretune.dispatch import run
from pretune.objectives.language_modeling import language_modeling

pytestmark = ON_THE_CARD
Compose = Callable[..., dict[str, Any]]
has_8_bit_products = pytest.mark.gpu(capability=(8, 9))


def in_8_bits(emulate: bool) -> tuple[float, Tensor]:
    """The loss of a tiny model on the card, and all its gradients in one vector."""
    model = tiny_model().to(CARD)
    use_float8(model, emulate=emulate)
    tokens = torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(1)).to(CARD)
    with torch.autocast(CARD.type, torch.bfloat16):
        loss = language_modeling(model, Batch(tokens[:, :-1], tokens[:, 1:], None), 64)
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat(gradients)


@has_8_bit_products
def test_8_bit_products_are_what_their_emulation_says() -> None:
    (loss, gradient), (emulated, gradient_emulated) = in_8_bits(False), in_8_bits(True)
    assert loss == pytest.approx(emulated, rel=0.01)
    assert torch.cosine_similarity(gradient, gradient_emulated, dim=0) > 0.99


@has_8_bit_products
def test_a_run_in_8_bits_trains_evaluates_and_writes(tiny: Compose, tmp_path: Path) -> None:
    settings = ["name=eight", f"device={CARD.type}", "precision=fp8", "precision.compile=true"]
    assert run(tiny(*settings)) == 0
    folder = tmp_path / "runs" / "eight"
    losses = series(folder, "train/loss")
    assert losses[-1] < losses[0]
    assert len(series(folder, "val/loss")) == 3
    assert (folder / "samples.jsonl").read_text()
    assert run(tiny(*settings, "task=evaluate")) == 0
    assert run(tiny(*settings, "task=generate", "generate.prompt=The")) == 0


def test_float16_trains_with_loss_scaling(tiny: Compose, tmp_path: Path) -> None:
    assert run(tiny("name=half", f"device={CARD.type}", "precision=fp16")) == 0
    folder = tmp_path / "runs" / "half"
    losses = series(folder, "train/loss")
    assert losses[-1] < losses[0]
    scales, skipped = series(folder, "train/loss_scale"), series(folder, "train/skipped_steps")
    assert scales[-1] > 1
    assert skipped[-1] == 0


def test_bfloat16_is_close_to_float32(tiny: Compose, tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        assert run(tiny(f"name={precision}", f"device={CARD.type}", f"precision={precision}")) == 0
        losses[precision] = series(tmp_path / "runs" / precision, "val/loss")
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)
