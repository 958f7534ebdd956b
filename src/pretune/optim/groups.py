"""Which parameters are trained, and the role of each: the only place that decides it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from pretune.core.config import ConfigError
from pretune.core.named_tensors import is_in_block

_ROWS = ".trainable_tokens_delta."
"""peft's name for rows of a table, in the names of parameters."""

Role = Literal["hidden", "embedding", "head", "vector"]


@dataclass(frozen=True)
class Trained:
    """A parameter that is trained.

    name: without the prefix that torch.compile adds. role: `hidden` (a 2-D weight inside a block), `embedding` (a
    table of vectors, anywhere), `head` (any other matrix), `vector` (norms, biases, scalars: no weight decay).
    Rows of a table that are trained beside an adapter have the role of the table.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    rows: tuple[int, ...]
    """Rows of each matrix that it holds, if its module has fused several and lists them in `rows`; else all rows."""

    @property
    def decays(self) -> bool:
        return self.role != "vector"


def trained_parameters(model: nn.Module) -> list[Trained]:
    """Every parameter with requires_grad, once each (tied ones under their first name), in the model's order.

    Raises ConfigError if there is none.
    """
    trained: dict[nn.Parameter, Trained] = {}
    for name, module, parameter in _parameters(model):
        if parameter.requires_grad and parameter not in trained:
            trained[parameter] = Trained(name, parameter, _role(name, module, parameter), _rows(module, parameter))
    if not trained:
        raise ConfigError("nothing to train: every parameter of the model is frozen")
    return list(trained.values())


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            yield name.replace("_orig_mod.", ""), module, parameter


def _rows(module: nn.Module, parameter: nn.Parameter) -> tuple[int, ...]:
    rows = tuple(getattr(module, "rows", ()))
    return rows if rows and parameter.ndim == 2 and sum(rows) == len(parameter) else tuple(parameter.shape[:1])


def _role(name: str, module: nn.Module, parameter: nn.Parameter) -> Role:
    if parameter.ndim < 2 or "norm" in type(module).__name__.lower():
        return "vector"
    if isinstance(module, nn.Embedding) or (_ROWS in name and not name.startswith("head.")):
        return "embedding"
    return "hidden" if parameter.ndim == 2 and is_in_block(name) else "head"
