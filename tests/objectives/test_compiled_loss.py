"""The chunked cross-entropy inside a compiled step: one operator, which equals the eager loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from pretune.core.batch import IGNORE
from pretune.objectives.cross_entropy import linear_cross_entropy, linear_token_losses

Loss = Callable[[Tensor, Tensor], Tensor]
torchs_own = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its compiler does what it deprecates

POSITIONS, DIM, VOCAB, PADDED, CHUNK = 22, 8, 29, 32, 8


def tensors(head_learns: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head and targets, some of which are not scored: three chunks, the last of them shorter."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, DIM, generator=generator).requires_grad_()
    head = torch.randn(PADDED, DIM, generator=generator).requires_grad_(head_learns)
    targets = torch.randint(0, VOCAB, (POSITIONS,), generator=generator)
    return hidden, head, targets.masked_fill(torch.rand(POSITIONS, generator=generator) < 0.3, IGNORE)


def losses(targets: Tensor, softcap: float | None) -> dict[str, Loss]:
    """The summed loss, and a weighted sum of the losses of each position."""
    weights = torch.linspace(-1, 2, POSITIONS)

    def summed(hidden: Tensor, head: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, head, targets, VOCAB, softcap, CHUNK)

    def weighted(hidden: Tensor, head: Tensor) -> Tensor:
        return linear_token_losses(hidden, head, targets, VOCAB, softcap, CHUNK) @ weights

    return {"summed": summed, "weighted": weighted}


@torchs_own
@pytest.mark.parametrize(
    ("kind", "head_learns", "softcap", "bfloat16"),
    [
        ("summed", True, None, False),
        ("summed", False, 4.0, True),
        ("weighted", True, 4.0, True),
        ("weighted", False, None, False),
    ],
)
def test_equals_the_eager_loss(kind: str, head_learns: bool, softcap: float | None, bfloat16: bool) -> None:
    hidden, head, targets = tensors(head_learns)
    loss = losses(targets, softcap)[kind]
    learning = [tensor for tensor in (hidden, head) if tensor.requires_grad]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = function(hidden, head)
        results.append([value, *torch.autograd.grad(value, learning)])
    for eager, compiled in zip(*results, strict=True):
        # In bfloat16 the compiler leaves out roundings between operations.
        tolerance = 0.02 if bfloat16 else 1e-5
        torch.testing.assert_close(compiled, eager, rtol=tolerance, atol=tolerance)


@torchs_own
@pytest.mark.parametrize("kind", ["summed", "weighted"])
def test_no_graph_holds_the_logits_of_more_than_a_chunk(kind: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    hidden, head, targets = tensors()
    torch.compiler.reset()
    step = torch.compile(losses(targets, None)[kind], backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    step(hidden, head).backward()
    assert len(graphs) == 2
    results = [node.meta["val"] for graph in graphs for node in graph.graph.nodes if "val" in node.meta]
    sizes = [result.numel() for result in results if isinstance(result, Tensor)]
    assert max(sizes) == PADDED * DIM, "the largest tensor is the head or its gradient"
    assert PADDED * DIM < POSITIONS * PADDED


def test_what_the_compiler_is_told_about_the_operator_is_true() -> None:
    hidden, head, targets = (tensor.detach() for tensor in tensors())
    for scale in (None, torch.rand(POSITIONS)):
        for needs in ((True, True), (True, False), (False, True), (False, False)):
            torch.library.opcheck(
                torch.ops.pretune.chunked_cross_entropy.default,
                (hidden, head, targets, scale, VOCAB, None, CHUNK, *needs, False),
                test_utils=("test_schema", "test_faketensor"),
            )
