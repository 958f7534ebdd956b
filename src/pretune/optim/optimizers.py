"""Build optimizers, apply the schedule to them, clip gradients and update.

Every group has `role`, `param_names`, `peak_lr` and `peak_weight_decay`. Checkpoints need none of these: they store
state by the names of the model's parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import AdamW, Optimizer

from pretune.core.config import ConfigError
from pretune.core.named_tensors import whole_tensors
from pretune.core.quiet import quiet
from pretune.optim.config import AdamW8bitConfig, AdamWConfig, LionConfig, MuonConfig, OptimizerConfig, ScheduleConfig
from pretune.optim.groups import Role, Trained, trained_parameters
from pretune.optim.muon import BatchedMuon
from pretune.optim.schedules import schedule_factor


def build_optimizer(
    config: OptimizerConfig,
    model: nn.Module,
    lr_factors: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
    shared: bool = False,
) -> Optimizer:
    """An optimizer for every trainable parameter of `model`; build it last, when the model is in its final form.

    lr_factors: learning-rate factors by parameter name; 1 for parameters that are not listed.
    dtype: dtype of the matrix products in an update (only Muon has any).
    shared: several processes have the same model, or shares of it; Muon's matrix products are shared out among them.
    Raises ConfigError if nothing is trainable, or nothing that the optimizer is meant for.
    """
    trained = trained_parameters(model)
    match config:
        case AdamWConfig():
            groups = _scaled(_decayed_and_not(trained, config.lr, config.weight_decay), lr_factors or {})
            return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        case AdamW8bitConfig():
            with quiet():
                from torchao.optim import AdamW8bit
                from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

            with unset_fake_temporarily():  # made once in a process, by reading tensors: fake ones hold nothing
                get_qmap_signed()
                get_qmap_unsigned()
            groups = _scaled(_decayed_and_not(trained, config.lr, config.weight_decay), lr_factors or {})
            # Its update is compiled: scheduled values must be tensors, or each new value would trigger a recompilation.
            tensors = [
                {**one, "lr": torch.tensor(one["lr"]), "weight_decay": torch.tensor(one["weight_decay"])}
                for one in groups
            ]
            return AdamW8bit(tensors, lr=config.lr, betas=config.betas, eps=config.eps)
        case LionConfig():
            from lion_pytorch import Lion

            groups = _scaled(_decayed_and_not(trained, config.lr, config.weight_decay), lr_factors or {})
            return Lion(groups, lr=config.lr, betas=config.betas)
        case MuonConfig():
            if lr_factors:
                raise ConfigError("optimizer=muon does not support adapter.lr_ratio; set it to 1, or use adamw")
            return _muon(config, trained, dtype, shared)
        case _:
            assert_never(config)


def set_progress(optimizer: Optimizer, config: OptimizerConfig, schedule: ScheduleConfig, progress: float) -> float:
    """Set learning rates, weight decays and momentum for `progress` in [0, 1].

    Returns the first group's learning rate, which belongs to the section's `lr`.
    """
    lr, decay = schedule_factor(schedule, progress), 1 - progress * (1 - config.weight_decay_final)
    for group in optimizer.param_groups:
        _set(group, "lr", group["peak_lr"] * lr)
        _set(group, "weight_decay", group["peak_weight_decay"] * decay)
        if isinstance(config, MuonConfig) and "momentum" in group:
            warm = min(progress / config.momentum_warmup, 1.0) if config.momentum_warmup > 0 else 1.0
            group["momentum"] = config.momentum_initial * (1 - warm) + config.momentum * warm
    return float(optimizer.param_groups[0]["lr"])


def compiles_update(optimizer: Optimizer) -> bool:
    """Whether the optimizer compiles its own update (adamw_8bit)."""
    return isinstance(optimizer.param_groups[0]["lr"], Tensor)


def compile_update(optimizer: Optimizer) -> None:
    """Make an optimizer that compiles its update do so now, without changing weights or state."""
    state, optimizer.state = optimizer.state, defaultdict(dict)
    for group in optimizer.param_groups:
        group["lr"].zero_()
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    with quiet():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    optimizer.state = state


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float | None, scale: float = 1.0) -> Tensor:
    """Divide gradients by `scale` (the loss scale), clip them to a global norm of `max_norm` (None: no clipping) and
    return the norm before clipping, a scalar on their device: the caller reads it only when it reports.

    Gradients with a non-finite norm are not clipped, because `update` skips them.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if scale != 1:
        torch._foreach_mul_(gradients, 1 / scale)  # pyright: ignore[reportPrivateImportUsage]
    norm = whole_tensors({"norm": nn.utils.get_total_norm(gradients)})["norm"]
    # On the CPU, reading the norm does not synchronize a device, and can save a pass over all gradients.
    if max_norm is not None and (norm.device.type != "cpu" or max_norm < norm < torch.inf):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def update(optimizer: Optimizer, norm: Tensor) -> Tensor:
    """Step the optimizer, unless the gradient norm `norm` is not finite: then weights and all optimizer state stay
    unchanged. Returns 1 if the step was skipped, else 0: a scalar on the device of `norm`.

    On CUDA the host does not synchronize if the optimizer can skip a step on the device (Lion and 8-bit AdamW cannot).
    """
    skipped = (~torch.isfinite(norm)).float()
    if norm.device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False):
        _zero_where(skipped, optimizer)
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
    elif not skipped:
        optimizer.step()
    return skipped


def _zero_where(skipped: Tensor, optimizer: Optimizer) -> None:
    """Zero the gradients if the step is skipped: a NaN multiplied by 0 would still be NaN."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(skipped.bool(), 0)


class MuonAdamW(Optimizer):
    """Two optimizers behind one interface, sharing its parameter groups and its state.

    Both can skip a step on the device, so this one can too.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict calls this with new groups and a new state.
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state

    def step(self, closure: Any = None) -> Any:
        """Step each optimizer."""
        assert closure is None, "closures are not supported"
        for optimizer in self.optimizers:
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
            optimizer.step()


def _decayed_and_not(trained: Sequence[Trained], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [one for one in trained if one.decays]
    vectors = [one for one in trained if not one.decays]
    return _groups(_group("matrices", matrices, lr, weight_decay), _group("vectors", vectors, lr, 0.0))


def _muon(config: MuonConfig, trained: Sequence[Trained], dtype: torch.dtype, shared: bool) -> Optimizer:
    def of(role: Role) -> list[Trained]:
        return [one for one in trained if one.role == role]

    if not of("hidden"):
        raise ConfigError("optimizer=muon trains matrices inside the layers, but none of them is trainable; use adamw")
    rest, hidden = config.adamw, _groups(_group("hidden", of("hidden"), config.lr, config.weight_decay))
    settings: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "nesterov": config.nesterov}
    settings |= {"ns_steps": config.ns_steps, "adjust_lr_fn": config.scale}
    settings |= {"neuron_beta": config.neuron_beta, "cautious_decay": config.cautious_decay}
    muon = BatchedMuon(hidden, of("hidden"), dtype=dtype, shared=shared, **settings)
    groups = _groups(
        _group("embedding", of("embedding"), rest.embedding_lr, rest.weight_decay),
        _group("head", of("head"), rest.head_lr, rest.weight_decay),
        _group("vectors", of("vector"), rest.scalar_lr, 0.0),
    )
    if not groups:
        return muon
    return MuonAdamW(muon, AdamW(groups, lr=config.lr, betas=rest.betas, eps=rest.eps, fused=True))


def _groups(*groups: dict[str, Any]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]


def _scaled(groups: Sequence[dict[str, Any]], factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Split groups so that each has a single learning rate, smallest factor first."""

    def split() -> Iterator[dict[str, Any]]:
        for group in groups:
            for factor in sorted({factors.get(name, 1.0) for name, _ in group["params"]}):
                params = [(name, one) for name, one in group["params"] if factors.get(name, 1.0) == factor]
                yield {**group, "params": params, "lr": group["lr"] * factor, "peak_lr": group["peak_lr"] * factor}

    return list(split())


def _group(role: str, trained: Sequence[Trained], lr: float, weight_decay: float) -> dict[str, Any]:
    params = [(one.name, one.parameter) for one in trained]
    peaks = {"peak_lr": lr, "peak_weight_decay": weight_decay}
    return {"params": params, "role": role, "lr": lr, "weight_decay": weight_decay, **peaks}


def _set(group: dict[str, Any], name: str, value: float) -> None:
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value
