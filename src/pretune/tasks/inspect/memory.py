"""What models take in memory, for the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pretune.adapters.config import LoraConfig
from pretune.compute import hardware
from pretune.compute.device import pick_device
from pretune.compute.devices import named_or_sized
from pretune.core.config import validate
from pretune.memory.ways import Methods, Way, memory_by_way
from pretune.model.section import AnyModelConfig
from pretune.quantization.config import QloraConfig
from pretune.run.config import RunConfig
from pretune.run.planned import planned_precision
from pretune.tasks.inspect.candidates import Compose


@dataclass(frozen=True)
class Needs:
    """Bytes by way, for sequences of `context` tokens: fewer than asked where the model has no more positions."""

    context: int
    by_way: dict[Way, int | None]


@dataclass(frozen=True)
class Machine:
    """What memory is estimated for. usable: bytes that tensors can take."""

    name: str
    usable: int
    context: int
    needs: Callable[[AnyModelConfig], Needs]


def machine_of(config: RunConfig, compose: Compose) -> Machine:
    """The device that inspect.device names, or this machine's, with the settings of `config` and, for adapters, those
    of the options lora and qlora_nf4."""
    name = config.inspect.device
    device = None if name is None else named_or_sized(name)
    config = planned_precision(config, device)
    here = pick_device(config.device)
    kind = here.type if device is None else "cuda"
    total = hardware.total_memory(here) if device is None else device.memory
    context = config.inspect.context or config.data.sequence_length
    chosen = compose(None, ["adapter=lora", "quantization=qlora_nf4"])
    methods = Methods(validate(LoraConfig, chosen["adapter"]), validate(QloraConfig, chosen["quantization"]))

    def needs(model: AnyModelConfig) -> Needs:
        length = min(context, model.max_sequence_length)
        return Needs(length, memory_by_way(config, model, length, methods, kind))

    shown = hardware.device_name(here) if device is None else device.name
    return Machine(shown, hardware.usable(total, kind), context, needs)
