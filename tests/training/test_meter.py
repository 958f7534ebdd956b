"""The clock that measures training time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pretune.training.meter import Stopwatch


class Device:
    """A device that takes three seconds per step; steps are queued at once, the host is busy only while waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.idle_at = 0.0
        monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=lambda: Event(self)))
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda: self.wait(self.idle_at))

    def step(self) -> None:
        self.idle_at = max(self.idle_at, self.now) + 3

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = self.device.idle_at

    def synchronize(self) -> None:
        self.device.wait(self.at)


def test_a_device_is_timed_one_step_late_and_never_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    device, laps = Device(monkeypatch), []
    watch = Stopwatch(torch.device("cuda"), lambda: device.now)
    watch.start()
    for _ in range(5):
        device.step()
        laps.append(watch.lap())
        watch.start()  # under way already: nothing is lost
        assert watch.steps_behind == 1
        assert device.idle_at > device.now, "the next step is given to it before it is done"
    assert laps == [0, 3, 3, 3, 3]
    assert watch.stop() == 3
    assert watch.steps_behind == 0
    device.now += 100  # evaluation
    assert watch.stop() == 0
    watch.start()
    device.step()
    assert watch.lap() == 0
    assert watch.stop() == 3


def test_a_cpu_is_never_behind() -> None:
    times = iter([0.0, 2.0, 5.0, 9.0])
    watch = Stopwatch(torch.device("cpu"), lambda: next(times))
    watch.start()
    assert (watch.lap(), watch.lap(), watch.steps_behind, watch.stop()) == (2, 3, 0, 4)
