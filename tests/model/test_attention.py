"""Block masks, for kernels that skip masked blocks, against the same masks written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import document_ids, tiny_model
from torch import Tensor
from torch.nn.attention import flex_attention as torchs_flex
from torch.nn.attention.flex_attention import BlockMask

from pretune.compute.compilation import checkpoint_activations
from pretune.core.batch import Batch
from pretune.model.attention import Logits, attend, mask_of, skips_blocks
from pretune.model.transformer import Transformer
from pretune.objectives.language_modeling import language_modeling

LENGTH = 300  # two blocks of 128 and part of a third
# Uncompiled flex attention warns that it is slow; torch's compiler uses what torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip torch's check: CPUs have no flex attention kernel for the backward pass, but uncompiled it works."""
    monkeypatch.setattr(torchs_flex, "_validate_device", lambda *tensors: None)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("window", [None, 1, 70])
def test_blocks_allow_what_the_mask_allows(isolated: bool, window: int | None) -> None:
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    ids = document_ids(2, LENGTH) if isolated else None
    if ids is None and window is None:
        assert mask_of(tokens, ids, window, True) is mask_of(tokens, ids, window, False) is None
        return
    blocks, mask = mask_of(tokens, ids, window, True), mask_of(tokens, ids, window, False)
    assert isinstance(blocks, BlockMask)
    assert isinstance(mask, Tensor)
    rows, columns = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    for row in range(len(mask)):
        assert torch.equal(blocks.mask_mod(torch.tensor(row), torch.tensor(0), rows, columns), mask[row, 0])
    # Blocks above the diagonal are skipped, and so are those far below it if there is a window.
    dense = blocks.to_dense()[0, 0]
    assert dense.triu(1).sum() == 0
    if window is not None:
        assert dense[2, 0] == 0


@pytest.mark.usefixtures("with_gradients")
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_outputs_and_gradients_are_the_same(softcap: float | None, num_kv_heads: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, LENGTH, 16, generator=generator).requires_grad_()
        for heads in (4, num_kv_heads, num_kv_heads)
    )
    tokens, ids = torch.zeros(2, LENGTH, dtype=torch.int64), document_ids(2, LENGTH)
    results = []
    for skipping in (False, True):
        y = attend(q, k, v, mask_of(tokens, ids, window, skipping), Logits(0.3, softcap), 0.0)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_blocks_are_for_compiled_code_on_newer_gpus_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda")

    tokens: Any = OnGpu()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not skips_blocks(tokens, 0.0), "not compiled"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert skips_blocks(tokens, 0.0)
    assert not skips_blocks(tokens, 0.1)
    assert not skips_blocks(torch.zeros(1, 1), 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not skips_blocks(tokens, 0.0), "a T4's shared memory is too small"


@pytest.mark.usefixtures("with_gradients")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_with_windows_and_documents_is_one_graph_with_blocks(checkpointed: bool) -> None:
    class WithBlocks(Transformer):
        """Computes here as it does in code that is compiled for CUDA."""

        def _skips_blocks(self, tokens: Tensor) -> bool:
            return True

    def gradients(model: Transformer, seed: int) -> list[Tensor]:
        tokens = torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(seed))
        data = Batch(tokens[:, :-1], tokens[:, 1:], document_ids(2, 32))
        loss = loss_of(model, data, 64)
        return list(torch.autograd.grad(loss, [one for one in model.parameters() if one.requires_grad]))

    model = tiny_model(
        num_layers=3, window={"size": 5, "pattern": "SL", "full_last_layer": True}, qk_norm=True, num_kv_heads=2
    ).train()
    loss_of: Any = language_modeling
    expected = gradients(model, 0)
    model.__class__ = WithBlocks
    if checkpointed:
        checkpoint_activations(model.layers)
    torch.compiler.reset()
    loss_of = torch.compile(language_modeling, fullgraph=True, dynamic=False, backend="aot_eager")
    for found, reference in zip(gradients(model, 0), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        gradients(model, 1)


@pytest.mark.slow
def test_torchs_own_kernel_agrees() -> None:
    """The generated kernel for CPUs, forward only; the one for CUDA is generated from the same mask."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 256, 16, generator=generator) for _ in range(3))
    tokens, ids = torch.zeros(1, 256, dtype=torch.int64), document_ids(1, 256)

    def attention(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return attend(q, k, v, mask_of(tokens, ids, 70, True), 0.3, 0.0)

    expected = attend(q, k, v, mask_of(tokens, ids, 70, False), 0.3, 0.0)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(attention, fullgraph=True)(q, k, v, ids), expected, rtol=1e-4, atol=1e-4)
