"""Memory of the frozen model beside the one in training, and stand-ins for what it says in a run on fake tensors.

The stand-ins have shapes; where a tensor would only repeat memory that is counted as the model's own, it has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretune.model.build import Model
from pretune.model.config import GATED, ModelConfig
from pretune.model.costs import parameters_by_part, skeleton
from pretune.model.section import AnyModelConfig
from pretune.objectives.config import DistillationConfig
from pretune.run.config import RunConfig
from pretune.run.teacher import teacher_dtype, teacher_shape


@dataclass(frozen=True)
class Frozen:
    """The frozen model of a run, if it has one."""

    config: RunConfig
    shape: AnyModelConfig | None
    """The model section of a teacher that is in memory."""
    teacher: Model | None
    """That teacher, without values."""
    rows: int
    """Rows of its output head."""
    width: int
    """Columns of its output head, and of its hidden states."""

    @classmethod
    def of(cls, config: RunConfig) -> Frozen:
        """The one of a run; a teacher's configuration is read, and on the hub downloaded."""
        section = config.stage.objective
        in_memory = isinstance(section, DistillationConfig) and not section.cached
        shape = teacher_shape(config) if in_memory else None
        if shape is None:
            return cls(config, None, None, 0, 0)
        teacher = skeleton(shape)
        return cls(config, shape, teacher, *teacher.head_weight.shape)

    def weights(self, own: int) -> int:
        """Bytes of its weights, where the model in training has `own`."""
        if self.teacher is not None:
            return sum(parameters_by_part(self.teacher).values()) * teacher_dtype(self.config).itemsize
        section = self.config.stage.objective
        same = section.needs_reference and not section.has_teacher
        return own if same and self.config.reference == "model" else 0

    def says(self, size: int) -> dict[str, Tensor]:
        """Zeros in place of what it says of a micro-batch of `size` sequences."""
        section, length = self.config.stage.objective, self.config.data.sequence_length
        if not isinstance(section, DistillationConfig):
            return {"log_probs": torch.zeros(size, 1, 2)} if section.needs_reference else {}
        if section.top_k is not None:
            log_probs = torch.zeros(size, length, section.top_k + 1, dtype=torch.float16)
            return {"log_probs": log_probs, "tokens": torch.zeros(size, length, section.top_k, dtype=torch.int32)}
        assert self.teacher is not None, "only likeliest tokens are stored"
        return {"hidden": torch.zeros(size, length, self.width, dtype=teacher_dtype(self.config))}

    def head(self) -> dict[str, Tensor]:
        """The output head of a teacher, whose memory is counted with its weights."""
        if self.teacher is None:
            return {}
        zero = torch.zeros(1, dtype=teacher_dtype(self.config))
        return {"head": zero.expand(self.rows, self.width)}

    def work(self, size: int) -> int:
        """Bytes of a teacher's forward pass over a micro-batch, of which nothing is kept for a backward pass."""
        if self.shape is None:
            return 0
        shape, itemsize = self.shape, teacher_dtype(self.config).itemsize
        tokens = size * self.config.data.sequence_length
        gated = not isinstance(shape, ModelConfig) or shape.activation in GATED
        widest = shape.mlp_dim * (2 if gated else 1)
        inside = tokens * itemsize * (2 * widest + 2 * shape.dim)
        return inside + self.in_loss(tokens)

    def in_loss(self, tokens: int) -> int:
        """Bytes that comparing it with the model takes, beside the model's logits, in a chunk of the loss."""
        section = self.config.stage.objective
        if not isinstance(section, DistillationConfig):
            return 0
        chunk = min(tokens, section.chunk_tokens)
        if self.teacher is None:
            model = self.config.model
            rows = model.padded_vocab_size if isinstance(model, ModelConfig) else model.vocab_size
            return 4 * chunk * rows  # the logits of all other tokens
        # Its logits, and log-probabilities in float32 of both
        each = teacher_dtype(self.config).itemsize + 8
        return each * chunk * self.rows
