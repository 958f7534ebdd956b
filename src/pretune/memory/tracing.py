"""Measure the memory of a computation without running it, on fake tensors, which have shapes but no values.

Sizes are those of torch's CPU kernels. CUDA kernels may need additional workspace.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all live tensors while it is active: `now`, and the `peak` since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def restart(self) -> None:
        """Reset the peak to the current memory."""
        self.peak = self.now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # Count the tensors inside a subclass, not the wrapper: 8-bit state pretends to be float32.
            if isinstance(leaf, Tensor) and not is_traceable_wrapper_subclass(leaf):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def saved_eagerly(loss: Callable[[], Tensor], model: torch.nn.Module) -> int:
    """Bytes that autograd saves for the backward pass of `loss`, without parameters; shared memory counts once."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = loss()
    total = sum(storage.nbytes() for storage in saved.values())
    del graph
    return total


def saved_compiled(
    loss: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor],
    own: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    recomputation: Mapping[str, bool],
) -> int:
    """The same for a compiled loss, a function of the model's own parameters and buffers and of inputs: the bytes that
    torch.compile's partitioner keeps instead of recomputing, with these options of it. No code is generated or run."""
    import torch._functorch.config as partitioner
    from functorch.compile import (
        aot_function,
        make_boxed_func,  # pyright: ignore[reportPrivateImportUsage]
        min_cut_rematerialization_partition,
    )
    from torch._inductor.decomposition import select_decomp_table

    kept: list[int] = []

    def partition(joint: GraphModule, examples: Any, **options: Any) -> tuple[GraphModule, GraphModule]:
        # Parameters are there in any case, so that the backward pass casts them again instead of keeping the casts.
        options["static_lifetime_input_indices"] = list(range(len(own)))
        with partitioner.patch(dict(recomputation)):
            forward, backward = min_cut_rematerialization_partition(joint, examples, **options)
        outputs = forward.graph.output_node().args[0]
        assert isinstance(outputs, tuple | list)
        kept.append(_bytes_of(outputs[options["num_fwd_outputs"] :]))
        return forward, backward

    def as_is(gm: GraphModule, example_inputs: Any) -> Any:
        return make_boxed_func(gm.forward)

    compiled = aot_function(
        loss, fw_compiler=as_is, bw_compiler=as_is, partition_fn=partition, decompositions=select_decomp_table()
    )
    # As torch.compile does, so that code that asks whether it is being compiled takes the same branch here.
    with torch.compiler._compile_session_context():
        compiled(dict(own), dict(inputs))
    return kept[0]


def _bytes_of(nodes: Any) -> int:
    sizes: dict[Node, int] = {}
    for node in nodes:
        base = _base(node)
        value = base.meta.get("val") if isinstance(base, Node) else None
        if isinstance(value, Tensor) and base.op != "placeholder":
            sizes[base] = value.untyped_storage().nbytes()
    return sum(sizes.values())


def _base(node: Any) -> Any:
    """The base of a chain of views, which shares its memory with them."""
    while isinstance(node, Node):
        source = node.args[0] if node.target is operator.getitem else node  # an operator may return several views
        if not (isinstance(source, Node) and getattr(source.target, "is_view", False)):
            break
        node = source.args[0]
    return node
