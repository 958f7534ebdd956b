"""Access to the Hugging Face hub: rows of a dataset, files of a model; with one clear error if it is unreachable."""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretune.core.config import InputError
from pretune.data.sources.config import HubSource
from pretune.data.sources.hub_json import json_rows
from pretune.data.sources.tables import as_json

PROBE_SECONDS = 10.0
"""Timeout for the hub's answer before it is reported as unreachable."""


def rows(config: HubSource) -> Iterator[dict[str, Any]]:
    """Rows of a hub dataset, read while downloading or afterwards.

    Raises InputError if the hub cannot be reached, or if the dataset, its configuration or its split does not exist.
    """
    with quiet_libraries():
        check_reachable(config.path, config.revision, "dataset")
        import datasets

        number = 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = json_rows(config)
                if found is None:
                    table: Any = datasets.load_dataset(
                        config.path,
                        config.name,
                        split=config.split,
                        revision=config.revision,
                        streaming=config.streaming,
                    )
                    found = ({name: as_json(value) for name, value in row.items()} for row in table)
            for number, row in enumerate(itertools.islice(found, config.max_rows), start=1):  # noqa: B007
                yield row
        except (GeneratorExit, InputError):
            raise
        except Exception as error:
            when = f"after {number} rows" if number else "before the first row"
            raise InputError(
                f"hub dataset '{config.path}', split '{config.split}' failed {when}: {error_summary(error)}"
            ) from error


def download_file(repository: str, filename: str) -> Path:
    """A file from a model's repository, downloaded or from the Hugging Face cache; InputError if that fails."""
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import huggingface_hub
        from huggingface_hub import errors

        # A file in the cache needs no network.
        try:
            known = huggingface_hub.try_to_load_from_cache(repository, filename)
        except errors.HFValidationError:
            raise InputError(f"'{repository}' is not a name on the hub; write owner/name") from None
        if isinstance(known, str):
            return Path(known)
        check_reachable(repository, None, "model")
        try:
            return Path(huggingface_hub.hf_hub_download(repository, filename))
        except Exception as error:
            raise InputError(f"cannot get {filename} of '{repository}' from the hub: {error_summary(error)}") from error


class Unreachable(InputError):
    """There is no connection to the hub."""


def check_reachable(repository: str, revision: str | None, kind: str) -> Any:
    """Check once, without retries, that the hub is reachable and has the repository; raise InputError if not. Returns
    what the hub says of it.

    The libraries' own calls retry for half a minute before failing, with a message that hides the cause. With
    HF_HUB_OFFLINE set, the check is skipped and None returned: the Hugging Face cache is used.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None
    ask = huggingface_hub.HfApi().dataset_info if kind == "dataset" else huggingface_hub.HfApi().model_info
    try:
        return ask(repository, revision=revision, timeout=PROBE_SECONDS)
    except errors.GatedRepoError:
        raise InputError(
            f"{kind} '{repository}' is gated: open its page on the hub, accept its terms, and log in with "
            "`hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"the hub has no {kind} '{repository}' (or it is private: log in with `hf auth login`); check "
            "the spelling of owner/name"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{kind} '{repository}' has no revision '{revision}'") from None
    except errors.HFValidationError:
        raise InputError(f"'{repository}' is not a name on the hub; write owner/name") from None
    except errors.HfHubHTTPError as error:
        raise InputError(f"the hub refuses {kind} '{repository}': {error_summary(error)}") from None
    except Exception as error:  # the type of connection errors depends on the library's version
        raise Unreachable(
            f"cannot reach the hub at {huggingface_hub.constants.ENDPOINT} for {kind} '{repository}' "
            f"({error_summary(error)}); check the network, or set HF_HUB_OFFLINE=1 to use the Hugging Face cache"
        ) from None


def error_summary(error: BaseException) -> str:
    """The first line of a library's error, truncated to 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0][:200] if lines else type(error).__name__).rstrip(".")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Turn off the libraries' progress bars and logs; we report their errors ourselves."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", "httpx", "httpx2", "fsspec")]
    import datasets
    import huggingface_hub.utils as hub_utils

    levels = [logger.level for logger in loggers]
    bars = datasets.is_progress_bar_enabled(), not hub_utils.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hub_utils.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            hub_utils.enable_progress_bars()
