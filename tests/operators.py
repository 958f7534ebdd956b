"""Record the torch operators that a piece of code calls on certain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operators(TorchDispatchMode):
    """While active, collects the names of operators that take or return a tensor for which `wanted` is true."""

    def __init__(self, wanted: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.wanted, self.found = wanted, set[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) and self.wanted(leaf) for leaf in tree_leaves((args, kwargs, result))):
            self.found.add(str(function))
        return result
