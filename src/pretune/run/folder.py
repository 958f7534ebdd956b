"""A run's folder: its files, its lock, checks before training, and finding it by name or path."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretune.checkpoint import store as checkpoint
from pretune.core.config import MAY_DIFFER, ConfigError, InputError, field_paths, nearest
from pretune.core.files import exclusive, read_sealed, write_atomic
from pretune.core.system_errors import explained
from pretune.core.terminal import warn
from pretune.core.yaml_file import read_yaml
from pretune.run.config import RunConfig

_BREAKS = {"\x85", "\u2028", "\u2029", "\ufeff"}


@dataclass(frozen=True)
class RunFolder:
    """`runs/<name>/`, whether it exists yet or not."""

    path: Path
    checkpoint: Path | None = None
    """The checkpoint whose weights to use; None leaves the choice to the run's own configuration."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved configuration; it is also a valid `--config`."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def micro_batch(self) -> Path:
        """The micro-batch size chosen for `batch.micro_batch: auto`, and the device it was chosen on."""
        return self.path / "micro_batch.json"

    @property
    def progress(self) -> Path:
        """The progress of each step; see optim/trace.py."""
        return self.path / "progress.txt"

    @property
    def summary(self) -> Path:
        """Final metrics; the file exists if and only if the run is complete."""
        return self.path / "summary.json"

    def started(self) -> bool:
        """Whether anything has been trained or evaluated here."""
        metrics = self.path / "metrics.jsonl"
        return self.checkpoints.is_dir() or (metrics.is_file() and metrics.stat().st_size > 0)

    def complete(self) -> dict[str, Any] | None:
        """The final metrics of a complete run, else None; InputError if they are damaged."""
        if not self.summary.is_file():
            return None
        try:
            metrics = json.loads(self.summary.read_text(encoding="utf-8"))
            if "fingerprint" in metrics:  # which earlier versions did not write
                metrics = read_sealed(self.summary)
            return {"step": metrics["step"], **metrics}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.summary} is damaged ({error}); delete it and run the training again to rewrite it"
            ) from None

    def check(self, mapping: Mapping[str, Any], resume: str) -> None:
        """Check, before anything is computed or written, that the run may start or resume here.

        Raises ConfigError, listing the keys that differ, if a started run in the folder has another configuration, or
        if `resume` forbids it; InputError if the folder cannot be written.
        """
        if self.started():
            if resume == "never":
                raise ConfigError(f"{self.path} already holds a run and resume=never; choose another name=...")
            before = read_config(self.config)
            differing = list(differences(before, mapping))
            if differing:
                raise ConfigError(
                    f"{self.path} belongs to a run with another configuration:\n"
                    + "\n".join(f"  {line}" for line in differing)
                    + "\nrestore the old values to resume it, or choose another name=..."
                )
            if newer := [f"{key}={value}" for key, value in _flatten(mapping) if _is_newer(key, before)]:
                warn(f"note: {self.config} said nothing of {', '.join(newer)}: from here on it does")
        elif resume == "must":
            raise ConfigError(f"resume=must, but {self.path} holds no run to resume; correct name or output_dir")
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(
                f"cannot write to {self.path}: {existing} is not a folder that you may write to; choose "
                "another output_dir=... or fix its permissions"
            )

        if self._lock.exists():
            with self._locked():
                pass  # raises if another process has the lock

    @contextlib.contextmanager
    def claimed(self, mapping: Mapping[str, Any], newest: Path | None) -> Iterator[None]:
        """Write the configuration and lock the folder for the duration of the block: no other process trains in it.

        `newest`: the checkpoint that this process resumes from. Raises InputError if writing fails, if another process
        has the lock, or if another process has trained in the folder since `newest` was read.
        """
        with self._locked():
            if self.complete() is not None or checkpoint.newest(self.checkpoints) != newest:
                raise InputError(f"another process has trained {self.path} in the meantime; run the same command again")
            try:
                write_config(self.config, mapping)
            except OSError as error:
                raise self._unwritable(error) from None
            yield

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(exclusive(self._lock))
            except BlockingIOError:
                raise InputError(
                    f"another process is training {self.path} right now; wait for it, or choose another name=..."
                ) from None
            except OSError as error:
                raise self._unwritable(error) from None
            yield

    def _unwritable(self, error: OSError) -> InputError:
        told = explained(error, str(self.path))
        return told or InputError(f"cannot write to {self.path} ({error}); choose another output_dir=...")


def write_config(path: Path, mapping: Mapping[str, Any]) -> None:
    """Write a resolved configuration as YAML for `--config`."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes text with line breaks of Unicode, which YAML would fold into spaces."""

        def represent_str(self, data: str) -> yaml.ScalarNode:
            return self.represent_scalar("tag:yaml.org,2002:str", data, '"' if _BREAKS & set(data) else None)

    Dumper.add_representer(str, Dumper.represent_str)
    text = yaml.dump(escaped(mapping), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    write_atomic(path, "# The resolved configuration of this run; `python src/main.py --config` takes it.\n" + text)


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a run's config.yaml; InputError if it is unreadable."""
    try:
        mapping = read_yaml(path)
    except Exception as error:
        fault = " ".join(str(error).split())
        raise InputError(f"{path} is not readable YAML ({fault}); restore it or choose another name=...") from None
    if not isinstance(mapping, dict) or not path.stat().st_size:
        raise InputError(f"{path} holds no run's configuration; restore it or choose another name=...")
    return {str(key): value for key, value in mapping.items()}


def escaped(value: Any) -> Any:
    """The value with `${` escaped wherever it is text: the configuration is resolved, and stays so when it is read."""
    if isinstance(value, Mapping):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\${", value) if isinstance(value, str) else value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """A line for each changed key that may not change on resume: `key: old -> new`."""
    before, after, free = dict(_flatten(old)), dict(_flatten(new)), free_keys()
    if after.get("early_stopping.patience") is not None:  # the evaluation interval affects when the run ends
        free.discard("evaluation.every")
    for key in sorted(before.keys() | after.keys()):
        words = key.split(".")
        if words[:2] == ["data", "mix"]:  # a mixed-in set has the same keys as data
            words = ["data", *words[3:]]
        if any(".".join(words[:n]) in free for n in range(1, len(words) + 1)):
            continue
        if before.get(key) != after.get(key) and not _is_newer(key, old):
            yield f"{key}: {before.get(key)} -> {after.get(key)}"


def _is_newer(key: str, old: Mapping[str, Any]) -> bool:
    """Whether a key of this version of Pretune is lacking in `old`, which a version wrote that did not have it."""
    words, section = key.split("."), old
    for n, word in enumerate(words, start=1):
        if word not in section:
            return ".".join(words[:n]) in _known_keys()
        section = section[word]
        if not isinstance(section, Mapping):
            return False
    return False


@functools.cache
def _known_keys() -> frozenset[str]:
    return frozenset(path for path, _ in field_paths(RunConfig))


def free_keys() -> set[str]:
    """Keys, and whole sections, that may change when a run is resumed."""
    return {path for path, field in field_paths(RunConfig) if MAY_DIFFER in field.metadata}


def find_run(name_or_path: str, output_dir: str) -> RunFolder:
    """The run with that name in output_dir, or at that path; the path of a checkpoint selects that checkpoint.

    Raises InputError, suggesting the nearest run, if there is none.
    """
    for path in (Path(output_dir) / name_or_path, Path(name_or_path)):
        if (path / "config.yaml").is_file():
            return RunFolder(path)
        if (path / checkpoint.STATE).is_file() and (path.parents[1] / "config.yaml").is_file():
            return RunFolder(path.parents[1], path)
    there = sorted(p.parent.name for p in Path(output_dir).glob("*/config.yaml"))
    listing = f" Runs in {output_dir}: {', '.join(there)}" if there else f" There are no runs in {output_dir} yet."
    raise InputError(f"no run '{name_or_path}'{nearest(name_or_path, there) or '.'}{listing}")


def find_trace(name_or_path: str, output_dir: str) -> Path:
    """The progress.txt of a run given by name or folder, or given directly; InputError if there is none."""
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    path = find_run(name_or_path, output_dir).progress
    if not path.is_file():
        raise InputError(f"{path.parent} has no {path.name}: nothing has been trained there yet")
    return path


def cache_folder() -> Path:
    """The folder for prepared data: $PRETUNE_CACHE, or `cache` in the working directory."""
    return Path(os.environ.get("PRETUNE_CACHE", "cache"))


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
