"""A .pte as ExecuTorch's runtime runs it here, behind the interface that decoding asks of a model.

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
    """What decoding asks of a model's configuration."""

    max_sequence_length: int


class Position:
    """How far the one text has come that a program holds."""

    def __init__(self) -> None:
        self.start, self._next = 0, 0

    def advance(self, num_new: int, whole: bool = False) -> None:
        """The next call reads `num_new` tokens."""
        self.start, self._next = self._next, self._next + num_new

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows: there is one, or none."""
        assert rows.tolist() in ([0], []), "a program holds one text"


class Program(nn.Module):
    """A .pte of a transformer. It holds one text at a time; a new cache begins another."""

    def __init__(self, path: Path) -> None:
        """Raises InputError for a file that is not a .pte of a model, ConfigError where executorch is missing."""
        super().__init__()
        check_installed()
        try:
            with quiet(), _runtime_is_silent():
                self._methods = load_runtime().load_program(path)
                self._forward = self._methods.load_method("forward")
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} is no .pte that ExecuTorch can load ({reason}); export the run again") from None
        self.config = Limits(self.constant("get_max_context_len"))
        self.eval()

    def constant(self, name: str) -> Any:
        """What a method without inputs returns: a number, or a list of numbers."""
        found = self._methods.load_method(name).execute([])
        return list(found) if len(found) > 1 or name.endswith("ids") else found[0]

    def new_cache(self, starts: Tensor, capacity: int) -> Position:
        """The beginning of a text."""
        assert starts.tolist() == [0], "a program holds one text"
        return Position()

    def forward(self, tokens: Tensor, *, cache: Position) -> Tensor:
        """Logits [1, 1, V] after the last of tokens [1, T]."""
        # A copy: the runtime writes the next ones to the same place.
        return self._forward.execute([tokens, torch.tensor([cache.start])])[0].clone()[None]

    def unembed(self, hidden: Tensor) -> Tensor:
        """They are logits already."""
        return hidden


def load_runtime() -> Any:
    """ExecuTorch's runtime with all kernels that a .pte of ours needs."""
    import executorch.kernels.quantized  # noqa: F401  # registers the tables' kernels
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  # and those of attention
    from executorch.runtime import Runtime

    return Runtime.get()


@contextlib.contextmanager
def _runtime_is_silent() -> Iterator[None]:
    """Keep off the terminal what the runtime's C++ says about the processor when it is first loaded."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
