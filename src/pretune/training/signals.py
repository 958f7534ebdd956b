"""Signals: a run is stopped at once wherever it is, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

EXIT_STOPPED = 75
"""Exit code of a run that a signal stopped and that the same command continues (EX_TEMPFAIL)."""


class Stop(BaseException):
    """A signal asked the run to end. Not an Exception, so that nobody's `except Exception` swallows it."""


class Interrupts:
    """Turns SIGINT and SIGTERM into `Stop`, raised wherever the main thread is: no polling, so it works in evaluation,
    compilation and data preparation too.

    Inside `shielded()` it waits for the end of the block. Once a Stop is on its way (until it has been handled), a
    second signal only says that the run is stopping; the third kills the process. Leaving the block restores the
    handlers from before. Outside the main thread, where Python allows no handlers, it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()
        self._received = 0
        self._shields = 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """Put the handlers from before back, if that is still to be done."""
        for number, handler in self._previous.items():
            # None: it was installed by something that is not Python, and cannot be put back.
            if handler is not None:
                signal.signal(number, handler)
        self._previous.clear()

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """A block that signals do not interrupt; Stop is raised at its end instead.

        A Stop that something in between has swallowed (Python ignores what is raised in a `__del__`) is raised again
        here. An `except Stop:` block may use a shield to save: it is not raised anew while it is being handled.
        """
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if self._received and not self._shields and not _stopping():
            raise Stop

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A worker that was forked from us has our handlers, but is not the one to save anything.
            _die(number)
        self._received += 1
        if self._received >= 3:
            _die(number)
        if self._shields or _stopping():
            if self._received == 2:
                # Not print: the signal may have come in the middle of one, and its lock is not reentrant.
                os.write(2, b"\nsaving; a third signal ends the run without it\n")
            return
        raise Stop


def stoppable(work: Callable[[Interrupts], int], stopped: str) -> int:
    """The exit code of `work`; where a signal ended it, print the line `stopped` and return EXIT_STOPPED."""
    interrupts = Interrupts()
    try:
        with interrupts:
            return work(interrupts)
    except Stop:
        interrupts.restore()  # it may have come in the very moment in which the block was being left
        print(stopped)
        return EXIT_STOPPED


def _stopping() -> bool:
    """Whether a Stop is being handled, or an error that came up while one was."""
    error = sys.exception()
    while error is not None and not isinstance(error, Stop):
        error = error.__context__
    return error is not None


def _die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
