"""What other people's libraries say beside their work, kept off the terminal while a block lasts."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def muted_logs() -> Iterator[None]:
    """Nothing up to a warning in any log: torchao tells of each kernel that is not for this machine."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """That, and no Python warnings either."""
    with muted_logs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
