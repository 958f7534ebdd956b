"""Real signals, sent to a separate process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pretune.training.signals import EXIT_STOPPED, Interrupts, Stop

SOURCE = Path(__file__).parents[2] / "src"

START = """
import os, signal, subprocess, sys, threading, time
from pretune.training.signals import EXIT_STOPPED, Interrupts, Stop
def say(text): os.write(1, (text + "\\n").encode())
def wait():
    for _ in range(300): time.sleep(0.1)
def signal_self(number=signal.SIGTERM): os.kill(os.getpid(), number)
"""


class Child:
    """A Python process that runs `code` and prints lines."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START + code],
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == line

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


def run(code: str) -> tuple[int, str, str]:
    return Child(code).end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "work",
    [
        "time.sleep(30)",
        # Like an evaluation, with an error handler around each part.
        "for _ in range(10**9):\n            try: sum(range(1000))\n            except Exception: pass",
        "import torch; x = torch.rand(300, 300)\n        while True: x = (x @ x).softmax(-1)",
        "threading.Event().wait(30)",
        # Not with our pipes, which its own end would close, if the signal comes while it starts.
        "subprocess.run(['sleep', '30'], stdout=-3, stderr=-3)",
    ],
    ids=["sleep", "loop", "torch", "lock", "subprocess"],
)
def test_a_signal_stops_whatever_is_running(number: signal.Signals, work: str):
    child = Child(f"""
with Interrupts():
    try:
        say("ready")
        {work}
    except Stop:
        say("stopped")
        sys.exit(EXIT_STOPPED)
""")
    child.wait_for("ready")
    child.signal(number)
    assert child.end() == (EXIT_STOPPED, "stopped\n", "")


def test_a_shield_holds_until_its_end():
    child = Child("""
with Interrupts() as interrupts:
    try:
        with interrupts.shielded():
            with interrupts.shielded():
                say("ready")
                while not interrupts._received: time.sleep(0.01)
                say("inner")
            say("outer")
        say("never")
    except Stop:
        say("stopped")
        sys.exit(EXIT_STOPPED)
""")
    child.wait_for("ready")
    child.signal(signal.SIGTERM)
    assert child.end() == (EXIT_STOPPED, "inner\nouter\nstopped\n", "")


def test_a_second_signal_only_reminds_and_a_third_kills():
    code = """
with Interrupts() as interrupts:
    with interrupts.shielded():
        for number in range(1, 4):
            signal_self()
            say(f"after {number}")
"""
    status, out, err = run(code)
    assert status == -signal.SIGTERM
    assert out == "after 1\nafter 2\n"
    assert err.count("\n") == 2
    assert "saving; a third signal ends the run without it" in err


def test_signals_that_come_twice_do_not_lose_the_save():
    """Schedulers and terminals signal a whole process group, and parents forward signals."""
    code = """
with Interrupts() as interrupts:
    try:
        signal_self()
    except Stop:
        try:
            try: 1 / 0
            except ZeroDivisionError: signal_self()
        finally:
            with interrupts.shielded():
                say("saved")
        say("told")
"""
    assert run(code)[:2] == (0, "saved\ntold\n")


def test_a_stop_that_something_swallowed_comes_again():
    code = """
class Bad:
    def __del__(self): signal_self()
with Interrupts() as interrupts:
    try:
        for step in range(3):
            with interrupts.shielded(): say(f"step {step}")
            if step == 1: Bad()
    except Stop:
        say("stopped")
"""
    status, out, _ = run(code)
    assert (status, out) == (0, "step 0\nstep 1\nstep 2\nstopped\n")


def test_an_error_in_a_shield_is_not_hidden_by_the_stop():
    code = """
with Interrupts() as interrupts:
    with interrupts.shielded():
        signal_self()
        raise ValueError("disk full")
"""
    status, _, err = run(code)
    assert status == 1
    assert "ValueError: disk full" in err


def test_nobodys_except_exception_eats_it():
    assert not issubclass(Stop, Exception)
    code = """
with Interrupts():
    try:
        try: signal_self()
        except Exception: say("swallowed")
    except Stop: say("stopped")
"""
    assert run(code) == (0, "stopped\n", "")


def test_handlers_from_before_come_back():
    before = [signal.getsignal(number) for number in Interrupts.SIGNALS]
    for _ in range(2):  # one run after another in the same process
        with Interrupts():
            assert [signal.getsignal(number) for number in Interrupts.SIGNALS] != before
        assert [signal.getsignal(number) for number in Interrupts.SIGNALS] == before
    with pytest.raises(KeyError), Interrupts():
        raise KeyError
    assert [signal.getsignal(number) for number in Interrupts.SIGNALS] == before


def test_outside_the_main_thread_it_does_nothing():
    passed = []

    def work() -> None:
        with Interrupts() as interrupts, interrupts.shielded():
            passed.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert passed


def test_forked_workers_die_quietly_and_leave_the_stopping_to_their_parent():
    code = """
with Interrupts():
    child = os.fork()
    if not child:
        try: wait()
        finally: say("never")
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) == (0, f"{-signal.SIGTERM}\n", "")
