"""Handle SIGINT and SIGTERM: stop a run immediately, wherever it is, without losing work."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

from pretune.core.terminal import say

EXIT_STOPPED = 75
"""Exit code of a run that was stopped by a signal and that the same command resumes (EX_TEMPFAIL)."""


class Stop(BaseException):
    """Raised when a signal asks the run to end. Not an Exception, so that no `except Exception` swallows it."""


class Interrupts:
    """Turns SIGINT and SIGTERM into `Stop`, raised wherever the main thread is. There is no polling, so it also works
    in evaluation, compilation and data preparation.

    Inside `shielded()`, Stop is raised at the end of the block instead. While a Stop is pending or being handled, a
    second signal only prints that the run is being saved; a third one kills the process. Leaving the context restores
    the previous handlers. Outside the main thread, where Python allows no handlers, it does nothing.
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

    @property
    def pending(self) -> bool:
        """Whether a signal has arrived."""
        return self._received > 0

    def ignore(self) -> None:
        """Ignore signals from here on, until the context is left: all is saved, and the run is about to end."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Restore the previous handlers, if that has not been done yet."""
        for number, handler in self._previous.items():
            # None: the handler was not installed from Python, so it cannot be restored.
            if handler is not None:
                signal.signal(number, handler)
        self._previous.clear()

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """A block that signals do not interrupt; Stop is raised at its end instead.

        A Stop that was swallowed earlier (Python ignores exceptions raised in a `__del__`) is raised again here. An
        `except Stop:` block may use a shield while saving: Stop is not raised again while it is being handled.
        """
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if self._received and not self._shields and not _stopping():
            raise Stop

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A block in which signals only become `pending`: whoever runs it asks for them, and ends it."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked worker inherits our handlers, but must not save anything.
            _die(number)
        self._received += 1
        if self._received >= 3:
            _die(number)
        if self._shields or _stopping():
            if self._received == 2:
                # Not print: the signal may have interrupted a print, whose lock is not reentrant.
                os.write(2, b"\nsaving; a third signal ends the run without it\n")
            return
        raise Stop


def stoppable(work: Callable[[Interrupts], int], stopped: str) -> int:
    """The exit code of `work`; if a signal stopped it, print the line `stopped` and return EXIT_STOPPED."""
    interrupts = Interrupts()
    try:
        with interrupts:
            try:
                return work(interrupts)
            except Stop:
                interrupts.ignore()
                say(stopped)
                return EXIT_STOPPED
    except Stop:
        interrupts.restore()  # Stop may have been raised inside __exit__, before it restored the handlers
        say(stopped)
        return EXIT_STOPPED


def _stopping() -> bool:
    """Whether a Stop, or an error raised while handling one, is being handled."""
    error = sys.exception()
    while error is not None and not isinstance(error, Stop):
        error = error.__context__
    return error is not None


def _die(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
