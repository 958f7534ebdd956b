"""The processes of a run: what one of them decides, what all of them add up, and how they end together.

What the host must know goes through gloo and never waits for a GPU; sums of tensors on a GPU go through NCCL.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from pretune.core.config import ConfigError, UserError
from pretune.core.launched import Launched, launched
from pretune.core.terminal import warn_from_any
from pretune.parallel.config import ParallelConfig

T = TypeVar("T")

_FAILED = "failed"
_STOPPED = 75  # EX_TEMPFAIL
_GRACE = 1.0
"""Seconds in which the process with rank 0 says what all of them find, and a failed process what the others lack."""


@dataclass(frozen=True)
class Processes:
    """This process among those of a run; by itself, everything is as if there were no others.

    Every process must call the methods that exchange something, in the same order.
    """

    rank: int = 0
    count: int = 1
    store: Any = None
    """What all processes see under names."""

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def decided(self, value: T) -> T:
        """What the main process has as `value`."""
        if self.count == 1:
            return value
        box = [value if self.main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # pyright: ignore[reportReturnType]

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether any process has a true `flag`."""
        return bool(self.added(int(flag))[0])

    def added(self, *numbers: int) -> list[int]:
        """The sums of numbers on the host over all processes."""
        if self.count == 1:
            return [*numbers]
        found = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(found)
        return found.tolist()

    def sums(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of scalars over all processes, on their device; the host does not wait for it."""
        if self.count == 1:
            return {**named}
        found = torch.stack([*named.values()])
        dist.all_reduce(found)
        return dict(zip(named, found.unbind(), strict=True))

    def part(self, count: int) -> tuple[int, int]:
        """This process's part of `count` things, of which each has as many: where it begins, and how many."""
        assert count % self.count == 0, (count, self.count)
        share = count // self.count
        return self.rank * share, share

    @contextlib.contextmanager
    def main_first(self, what: str) -> Iterator[None]:
        """A block that the main process runs before the others do: it leaves files that these find. They wait for as
        long as it takes. `what`: a name for it."""
        if self.main:
            yield
            if self.count > 1:
                self.store.set(what, "done")
            return
        while not self.store.check([what]):
            if self.store.check([_FAILED]):
                raise PeerEnded
            time.sleep(0.1)  # not a collective, which has a time limit, and is not interrupted by signals
        yield

    @contextlib.contextmanager
    def main_alone(self) -> Iterator[bool]:
        """A block at whose end the others wait for the main process; whether this is the main process."""
        yield self.main
        self.decided(None)

    def check_same(self, what: str, value: object) -> None:
        """Raise ConfigError, naming the ranks, if the processes differ in `value`."""
        found = self.gathered(value)
        if others := [rank for rank, one in enumerate(found) if one != found[0]]:
            raise ConfigError(
                f"{what} of rank {others[0]} differs from that of rank 0: start all processes with the same command "
                "and the same version of Pretune"
            )

    def arrive(self, step: int) -> None:
        """Note how far this process is, for a message of others that have waited in vain."""
        if self.count > 1:
            self.store.set(f"at/{self.rank}", str(step))


ALONE = Processes()


class PeerEnded(Exception):
    """Another process has ended with an error."""


@contextlib.contextmanager
def joined(section: ParallelConfig, device: torch.device) -> Iterator[Processes]:
    """This process among those that were started with it, for the block.

    An error in any process ends all of them, at once and with one message: a process that waited for the others to
    leave in order would wait for those that wait for it.

    Raises ConfigError where `section` does not fit how the processes were started.
    """
    here = launched()
    if section.kind in ("ddp", "fsdp") and here.count == 1:
        raise ConfigError(
            f"parallel={section.kind} needs several processes: torchrun --standalone --nproc-per-node=2 src/main.py "
            "--config ... starts two of them; or set parallel=single"
        )
    if section.kind == "single" and here.count > 1:
        raise ConfigError(f"parallel=single, but {here.count} processes were started: set parallel=ddp, or start one")
    if here.count == 1:
        yield ALONE
        return
    processes = _join(here, section, device)
    try:
        yield processes
        processes.any(False)  # all are done: rank 0 may serve the store of the others
    except Exception as error:
        _end(processes, error)
    except BaseException:  # a signal ends this process in the usual way, and the others with its exit code
        with contextlib.suppress(RuntimeError):
            processes.store.compare_set(_FAILED, "", str(_STOPPED))
        raise


def _join(here: Launched, section: ParallelConfig, device: torch.device) -> Processes:
    limit = timedelta(seconds=section.timeout)
    if device.type == "cuda":
        if not dist.is_nccl_available():
            raise ConfigError("several processes on GPUs need NCCL, which this build of torch lacks; set device=cpu")
        if here.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"{here.local_count} processes were started on this machine, which has {torch.cuda.device_count()} "
                "GPUs: start one for each (--nproc-per-node=gpu)"
            )
        torch.cuda.set_device(here.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ or os.environ.get("TORCHELASTIC_RUN_ID"):
        # torchrun gives each process one thread, whatever the machine has.
        torch.set_num_threads(max((os.cpu_count() or 1) // here.local_count, 1))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        if not dist.is_initialized():  # jobs of a sweep follow each other in the same processes
            store, rank, count = next(rendezvous("env://", timeout=limit))
            # After a restart, torchrun's store still has the addresses of the processes before.
            attempt = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=attempt, rank=rank, world_size=count, timeout=limit)
            atexit.register(dist.destroy_process_group)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"rank {here.rank} cannot join the others at {address} ({reason}): another port is chosen by torchrun "
            "--standalone, or by --rdzv-endpoint=HOST:PORT"
        ) from None
    alike = Processes(here.rank, here.count)
    prefix = alike.decided(uuid.uuid4().hex)  # each job has keys of its own
    return replace(alike, store=PrefixStore(prefix, dist.distributed_c10d._get_default_store()))


def _end(processes: Processes, error: BaseException) -> NoReturn:
    """End this process for an error; the first that fails says why, and the others with its exit code."""
    code = 2 if isinstance(error, UserError) else 1
    if not processes.main:
        time.sleep(_GRACE / 2)
    try:
        processes.store.set(f"ended/{processes.rank}", "")
        said = processes.store.compare_set(_FAILED, "", f"{code}").decode()
        first = not _is_of_a_peer(error) and said == f"{code}" and _claims(processes)
    except RuntimeError:  # rank 0 served the store, and is gone
        said, first = f"{code}", not _is_of_a_peer(error)
    if first:
        prefix = "" if processes.main else f"rank {processes.rank}: "
        late = _late(processes, error)
        short = f"{prefix}error: {late or error}"
        warn_from_any(short if late or code == 2 else (prefix + "".join(traceback.format_exception(error))).rstrip())
    sys.stdout.flush()
    os._exit(int(said) if said.isdigit() else code)


def _late(processes: Processes, error: BaseException) -> str | None:
    """Who does not answer, if the error is that this process has waited in vain; else None."""
    if not re.search(r"[Tt]imed? ?out", str(error)):
        return None
    time.sleep(_GRACE)  # those that waited too come here
    silent = [rank for rank in range(processes.count) if not processes.store.check([f"ended/{rank}"])]
    if not silent:
        return f"the processes have waited for each other in vain ({' '.join(str(error).split())[:120]})"
    key = f"at/{silent[0]}"
    step = int(processes.store.get(key)) if processes.store.check([key]) else 0
    names = f"rank {silent[0]} has" if len(silent) == 1 else f"ranks {', '.join(map(str, silent))} have"
    return (
        f"{names} not answered within parallel.timeout, in step {step + 1:,}: look at what became of it there, or "
        "raise the limit; the same command goes on from the newest checkpoint"
    )


def _claims(processes: Processes) -> bool:
    """Whether this is the first process to say why all end."""
    return processes.store.add(f"{_FAILED}/said", 1) == 1


def _is_of_a_peer(error: BaseException) -> bool:
    """Whether the error only says that another process has ended."""
    return isinstance(error, PeerEnded) or "onnection closed by peer" in str(error) or "onnection reset" in str(error)
