"""The manifest of an exported file: its run, its tokenizer, and how closely it matches the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretune.core.config import InputError
from pretune.core.files import measure, read_sealed, write_sealed

MANIFEST = "pretune.json"
PROGRAM = "model.pte"


def write_manifest(folder: Path, file: str, tokenizer: str, about: dict[str, Any]) -> None:
    """Write the manifest of `file` in `folder`; `tokenizer` is the fingerprint of its tokenizer."""
    content = {"file": file, "tokenizer": tokenizer, **measure(folder / file), **about}
    write_sealed(folder / MANIFEST, content)


def newest_program(exports: Path) -> Path | None:
    """The folder with the most recently written .pte, among the folders in `exports`."""
    # A folder with a dot is an export under way, or what is left of one that was killed.
    found = [path for path in exports.glob(f"[!.]*/{MANIFEST}") if (path.parent / PROGRAM).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent if found else None


def checked_program(folder: Path, tokenizer: str) -> Path:
    """The .pte in an export folder; InputError if there is none, or if it is damaged or was exported with a tokenizer
    that has another fingerprint."""
    path = folder / PROGRAM
    if not path.is_file():
        raise InputError(f"{folder} holds no {PROGRAM}; name the folder of an export with export.format=executorch")
    try:
        manifest = read_sealed(folder / MANIFEST)
        whole = manifest["file"] == PROGRAM and measure(path).items() <= manifest.items()
        belongs = manifest["tokenizer"] == tokenizer
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder / MANIFEST} cannot be read ({error}); export the run again") from None
    if not whole:
        raise InputError(f"{path} is not the file that {MANIFEST} beside it describes; export the run again")
    if not belongs:
        raise InputError(
            f"{path} was exported with a different tokenizer than this run's, so it would misread the prompt; name an "
            "export of this run in generate.export, or generate with the configuration of the export's own run"
        )
    return path
