"""A limit on the time of what data and templates can make long."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once it has taken so many seconds.

    Between two operations of Python's, so that a single long one is not interrupted. Only the main thread of a process,
    on a system with timers, has a limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    late = TimeoutError(f"it takes longer than {seconds:g} s")

    def expire(number: int, frame: FrameType | None) -> None:
        raise late

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as error:
        # Whoever handles it on its way may fail over it: Jinja does, where it was raised between two lines.
        if error is not late and _follows(error, late):
            raise TimeoutError(*late.args) from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _follows(error: BaseException, first: BaseException) -> bool:
    """Whether `error` was raised while `first` was handled, or because of it."""
    cause = error.__cause__ or error.__context__
    return cause is first or (cause is not None and _follows(cause, first))
