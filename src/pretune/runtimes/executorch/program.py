"""Run a .pte with ExecuTorch's runtime, behind the model interface that decoding needs.

T tokens, V token ids.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretune.core.config import InputError
from pretune.core.quiet import quiet
from pretune.runtimes.executorch.lowering import check_installed


class Limits(NamedTuple):
    """The part of a model's configuration that decoding needs."""

    max_sequence_length: int


class Position:
    """The position in the single text that a program holds; stands in for a cache."""

    def __init__(self) -> None:
        self.start, self._next = 0, 0

    def to_read(self, tokens: Tensor) -> Tensor:
        """The tokens themselves: no rotation in a .pte changes with the length of a text."""
        return tokens

    def advance(self, num_new: int, whole: bool = False) -> None:
        """Announce that the next call reads `num_new` tokens."""
        self.start, self._next = self._next, self._next + num_new

    def keep(self, rows: Tensor) -> None:
        """Keep these rows: one, or none."""
        assert rows.tolist() in ([0], []), "a program holds one text"


class Program(nn.Module):
    """A transformer in a .pte. It holds one text at a time; a new cache starts another text."""

    def __init__(self, path: Path) -> None:
        """Load a .pte. Raises InputError if the file is not a model's .pte, ConfigError if executorch is missing."""
        super().__init__()
        check_installed()
        try:
            with quiet(), _runtime_is_silent():
                self._methods = load_runtime().load_program(path)
                self._forward = self._methods.load_method("forward")
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} is not a .pte that ExecuTorch can load ({reason}); export it again") from None
        self.config = Limits(self.constant("get_max_context_len"))
        self.eval()

    def constant(self, name: str) -> Any:
        """The result of a method without inputs: a number or a list of numbers."""
        found = self._methods.load_method(name).execute([])
        return list(found) if len(found) > 1 or name.endswith("ids") else found[0]

    def new_cache(self, starts: Tensor, capacity: int) -> Position:
        """Start a new text."""
        assert starts.tolist() == [0], "a program holds one text"
        return Position()

    def forward(self, tokens: Tensor, *, cache: Position) -> Tensor:
        """Logits [1, 1, V] after the last of tokens [1, T]."""
        # Cloned, because the runtime reuses the output buffer.
        return self._forward.execute([tokens, torch.tensor([cache.start])])[0].clone()[None]

    def unembed(self, hidden: Tensor) -> Tensor:
        """Return `hidden`, which already holds logits."""
        return hidden


def load_runtime() -> Any:
    """ExecuTorch's runtime with all kernels that our .pte files need."""
    import executorch.kernels.quantized  # noqa: F401  # registers the tables' kernels
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  # and those of attention
    from executorch.runtime import Runtime

    return Runtime.get()


@contextlib.contextmanager
def _runtime_is_silent() -> Iterator[None]:
    """Discard what the runtime's C++ code prints to stderr about the processor when it is first loaded."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
