"""A run's folder: where its files are, whose it is, and finding one by name or by path."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretune.config import ConfigError, InputError, nearest
from pretune.files import write_atomic

# Keys that say what to do with a run, or where it shows, and not what the run is: they may change on a resume.
FREE = ("task", "resume", "output_dir", "name", "device", "tracker", "generate", "export", "report", "plan",
        "report_every", "samples", "show")  # fmt: skip
FREE_PATHS = ("checkpoint.every", "checkpoint.keep", "evaluation.every", "evaluation.micro_batch", "data.num_workers")


@dataclass(frozen=True)
class RunFolder:
    """`runs/<name>/`, whether it exists yet or not."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved configuration; itself a valid `--config`."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def micro_batch(self) -> Path:
        """What `batch.micro_batch: auto` came to, and on which device."""
        return self.path / "micro_batch.json"

    @property
    def summary(self) -> Path:
        """Final figures; its presence says that the run is complete."""
        return self.path / "summary.json"

    def started(self) -> bool:
        """Whether anything has been trained or measured here."""
        metrics = self.path / "metrics.jsonl"
        return self.checkpoints.is_dir() or (metrics.is_file() and metrics.stat().st_size > 0)

    def complete(self) -> dict[str, Any] | None:
        """The final figures of a run that is complete, else None."""
        return json.loads(self.summary.read_text()) if self.summary.is_file() else None

    def check(self, mapping: Mapping[str, Any], resume: str) -> None:
        """See, before anything is computed or written, that the run may go on or start here.

        Raises ConfigError, with the keys that differ, where a started run in the folder has another configuration or
        where `resume` forbids it, and InputError where the folder cannot be written.
        """
        if self.started():
            if resume == "never":
                raise ConfigError(f"{self.path} holds a run already and resume=never; choose another name=...")
            differing = list(differences(read_config(self.config), mapping))
            if differing:
                raise ConfigError(
                    f"{self.path} belongs to a run with another configuration:\n"
                    + "\n".join(f"  {line}" for line in differing)
                    + "\nset the old values back to resume it, or choose another name=..."
                )
        elif resume == "must":
            raise ConfigError(f"resume=must, but {self.path} holds no run to go on with; correct name or output_dir")
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(
                f"cannot write to {self.path}: {existing} is not a folder that you may write to; choose "
                "another output_dir=... or mend its permissions"
            )

    def claim(self, mapping: Mapping[str, Any]) -> None:
        """Write the configuration into the folder; InputError where that fails."""
        try:
            write_config(self.config, mapping)
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}; choose another output_dir=...") from None


def write_config(path: Path, mapping: Mapping[str, Any]) -> None:
    """Write a resolved configuration as YAML that `--config` takes."""
    import yaml

    text = yaml.safe_dump(dict(mapping), sort_keys=False, allow_unicode=True)
    write_atomic(path, "# The resolved configuration of this run; `python src/main.py --config` takes it.\n" + text)


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a run's config.yaml; InputError where it is unreadable."""
    from omegaconf import OmegaConf

    try:
        # OmegaConf's reader, as for every other YAML file: to plain YAML 1.1 `1e-3` is a string.
        mapping = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise InputError(f"{path} is not readable YAML ({error}); restore it or choose another name=...") from None
    if not isinstance(mapping, dict):
        raise InputError(f"{path} holds no configuration; restore it or choose another name=...")
    return {str(key): value for key, value in mapping.items()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """A line for each key whose value makes it another run: `key: old -> new`."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    for key in sorted(before.keys() | after.keys()):
        if key.split(".")[0] in FREE or key in FREE_PATHS:
            continue
        if before.get(key) != after.get(key):
            yield f"{key}: {before.get(key)} -> {after.get(key)}"


def find_run(name_or_path: str, output_dir: str) -> RunFolder:
    """The run of that name in output_dir, or at that path; InputError that names the nearest where there is none."""
    for path in (Path(output_dir) / name_or_path, Path(name_or_path)):
        if (path / "config.yaml").is_file():
            return RunFolder(path)
    there = sorted(p.parent.name for p in Path(output_dir).glob("*/config.yaml"))
    listing = f" Runs in {output_dir}: {', '.join(there)}" if there else f" There are no runs in {output_dir} yet."
    raise InputError(f"no run '{name_or_path}'{nearest(name_or_path, there) or '.'}{listing}")


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
