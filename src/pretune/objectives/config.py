"""Configuration of the training objective."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import pydantic
from pydantic import Field

from pretune.core.config import MAY_DIFFER, Count, FilePath, Section


class ObjectiveBase(Section):
    chunk_tokens: Annotated[Count, MAY_DIFFER]
    """Number of positions whose float32 logits are in memory at a time; fewer saves memory, too few costs speed. Of the
    results, it affects only the last bits."""
    compares_pairs: ClassVar[bool] = False
    """Whether an item is a pair of answers to one prompt, not a token."""

    needs_reference: ClassVar[bool] = False
    """Whether the loss compares the model with a frozen one."""
    has_teacher: ClassVar[bool] = False
    """Whether that is a model of its own, a teacher."""
    stages: ClassVar[tuple[str, ...]] = ("pretrain", "finetune")
    """The stages that have this objective."""


Reference = Literal["auto", "model", "adapter_off", "cached"]


class ReferenceBase(ObjectiveBase):
    """An objective that compares the model with a reference model: the model at the start."""

    reference: Reference
    """The reference model. model: a second, frozen copy of the initial model; adapter_off: the model with its adapter
    disabled, no copy; cached: log-probabilities computed once for all pairs and stored on disk, no copy and less
    computation; auto: adapter_off where that equals the initial model, else model."""

    needs_reference = True


class LanguageModelingConfig(ObjectiveBase):
    kind: Literal["language_modeling"]
    """Next-token cross-entropy."""


class DPOConfig(ReferenceBase):
    kind: Literal["dpo"]
    """Direct preference optimization (arXiv 2305.18290): learn to prefer the chosen side of a pair to the rejected one
    more strongly than the reference model (the model at the start) does."""
    beta: Annotated[float, Field(gt=0)]
    """Penalty for departing from the reference model: a reward is beta times the log-probability gained over it. With
    length_normalized, where rewards are per token, 2 to 10 is usual."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    """Assumed fraction of pairs whose labels are swapped (cDPO)."""
    length_normalized: bool
    """Divide the log-probability of a side by its number of scored tokens (arXiv 2411.15124, section 5)."""
    compares_pairs = True
    stages = ("dpo",)


class DistillationConfig(ObjectiveBase):
    kind: Literal["distillation"]
    """Knowledge distillation (arXiv 1503.02531): learn from the text and from a teacher's distribution over each of its
    tokens. The loss is (1 - alpha) * cross-entropy + alpha * temperature^2 * divergence."""
    teacher: Annotated[FilePath, MAY_DIFFER]
    """The teacher, a model with the same tokenizer: a run's name or folder, the folder of a model in Hugging Face's
    format, or `owner/name` or `owner/name@revision` on the hub. A resume may name another place of the same weights."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """Type in which the teacher's weights are kept and multiplied; auto: the one that the run computes in."""
    alpha: Annotated[float, Field(gt=0, le=1)]
    """Share of the divergence in the loss; the rest is the cross-entropy of the text."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"]
    """Divergence of the model's distribution q from the teacher's p. forward_kl: KL(p || q); reverse_kl: KL(q || p);
    jensen_shannon: the generalized one of GKD (arXiv 2306.13649), see beta."""
    beta: Annotated[float, Field(gt=0, lt=1)]
    """For jensen_shannon: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q."""
    temperature: Annotated[float, Field(gt=0)]
    """Both distributions are softened: logits are divided by this."""
    top_k: Count | None
    """Keep the probabilities of the teacher's likeliest tokens, as many as this, and that of all others as one sum:
    nothing is renormalized, and the model's distribution is summed up in the same way. null compares all tokens."""
    cached: bool
    """Compute the teacher's outputs once, for all of the data, and store them in the cache: then no step waits for the
    teacher, and it takes no memory. Needs top_k; 4 * top_k + 2 bytes per token (6 * top_k + 2 for vocabularies above
    65,536)."""
    needs_reference = True
    has_teacher = True
    stages = ("distill",)

    @pydantic.model_validator(mode="after")
    def _caches_the_likeliest(self) -> Self:
        if self.cached and self.top_k is None:
            raise ValueError(
                "cached = true stores the teacher's likeliest tokens: set top_k to how many (32, say), or cached=false"
            )
        return self


ObjectiveConfig = Annotated[LanguageModelingConfig | DPOConfig | DistillationConfig, Field(discriminator="kind")]
