"""Context managers that silence logs and warnings of third-party libraries."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def muted_logs() -> Iterator[None]:
    """Mute all logging up to level WARNING: torchao logs every kernel that this machine does not support."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Mute logging up to level WARNING, and Python warnings as well."""
    with muted_logs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Turn transformers' progress bars off for the duration of the block."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
