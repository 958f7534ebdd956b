"""What the files of a model say about it, without loading its weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretune.checkpoint import store as checkpoint
from pretune.core.config import InputError
from pretune.data.model_tokenizer import SPECIAL
from pretune.data.tokenizer_files import ABOUT, TOKENIZER, read_keys, saved_template, token
from pretune.model.config import ModelConfig
from pretune.model.huggingface.families import FAMILIES
from pretune.model.huggingface.folder import INDEX, WEIGHTS, StoredTensors
from pretune.model.section import AnyModelConfig, model_of
from pretune.model.transformers_model.config import TransformersConfig
from pretune.run.folder import RunFolder, read_config
from pretune.run.hub_models import stored_tensors
from pretune.run.pretrained import PretrainedModel
from pretune.tasks.inspect.candidates import Candidate, repository
from pretune.tasks.inspect.shape import Shape, shape_in_file, shape_of
from pretune.tracker.files import read_rows
from pretune.tracker.metrics import is_task_share, metric

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8"}
"""Names of torch's for those in safetensors."""


@dataclass(frozen=True)
class RunFacts:
    """Where a run is. step: of its newest checkpoint or report. best: the lowest validation loss, and its step. age:
    seconds since it last wrote something. size: bytes on disk."""

    stage: str
    step: int | None
    complete: bool
    best: tuple[float, int] | None
    accuracy: tuple[str, float] | None
    """The newest accuracy on the run's task, if any, with its name."""
    age: float
    size: int


@dataclass(frozen=True)
class Facts:
    """A row of the table; None for what the files do not say."""

    name: str
    kind: str
    shape: Shape
    dtype: str | None
    licence: str | None
    chat_template: bool | None
    special_tokens: Mapping[str, str]
    model: AnyModelConfig | None
    """The model section, if anything here can build it."""
    misfit: str | None
    """Why Pretune's transformer cannot hold it."""
    nobody: str | None
    """Why transformers does not build it either."""
    run: RunFacts | None


def facts_of(candidate: Candidate) -> Facts:
    """What its files say; InputError if they cannot be read."""
    match candidate.source:
        case RunFolder():
            return _of_run(candidate.name, candidate.source)
        case PretrainedModel():
            return _of_model(candidate.name, candidate.kind, candidate.source)
        case _:
            model = candidate.source
            shape = shape_of(_unpadded(model))
            return Facts(candidate.name, candidate.kind, shape, None, None, None, {}, model, None, None, None)


def _of_model(name: str, kind: str, found: PretrainedModel) -> Facts:
    folder, nobody = found.path, None
    if kind == "folder" and any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
        StoredTensors(folder)  # raises for files that are damaged
    misfit = _misfit(found)
    try:
        model = found.config()
        shape = shape_of(_unpadded(model))
    except InputError as error:
        model, shape, nobody = None, shape_in_file(folder), _without_path(str(error), folder)
    counts = _stored(folder, *repository(found))
    if shape.parameters is None and counts:
        shape = replace(shape, parameters=sum(counts.values()))
    keys = read_keys(folder / "config.json")
    dtype = _most(counts) or keys.get("dtype") or keys.get("torch_dtype")
    template, special = _tokens(folder)
    return Facts(name, kind, shape, dtype, licence(folder), template, special, model, misfit, nobody, None)


def _stored(folder: Path, owner_and_name: str | None = None, commit: str | None = None) -> dict[str, int]:
    """The number of stored weights by type; empty where the weights are not there."""
    found = stored_tensors(folder, owner_and_name, commit)
    counts: dict[str, int] = {} if found is None else found.parameter_count
    return {_DTYPES.get(dtype, dtype): count for dtype, count in counts.items()}


def _most(counts: Mapping[str, int]) -> str | None:
    return max(counts, key=lambda dtype: counts[dtype], default=None)


def _misfit(found: PretrainedModel) -> str | None:
    """Why Pretune's transformer cannot hold a model, in short; None if it can."""
    why = found.obstacle()
    if why is None:
        return None
    kind = read_keys(found.path / "config.json").get("model_type")
    return _without_path(why, found.path) if kind in FAMILIES else f"model_type = {kind}"


def _without_path(message: str, folder: Path) -> str:
    return message.replace(f"{folder / 'config.json'}", "config.json").removeprefix("config.json: ")


def _unpadded(model: AnyModelConfig) -> AnyModelConfig:
    """The model with as many rows as its table has tokens: padding is Pretune's own."""
    return model.model_copy(update={"vocab_multiple_of": 1}) if isinstance(model, ModelConfig) else model


def _tokens(folder: Path) -> tuple[bool | None, dict[str, str]]:
    """Whether a tokenizer has a chat template (None without a tokenizer), and its special tokens by role."""
    about, more = read_keys(folder / ABOUT), read_keys(folder / SPECIAL)
    if not about and not (folder / TOKENIZER).is_file():
        return None, {}
    roles = ("bos", "eos", "pad", "unk")
    texts = {role: token(about, f"{role}_token") or token(more, f"{role}_token") for role in roles}
    named = {role: text for role, text in texts.items() if text is not None}
    return saved_template(folder, about) is not None, named


def licence(folder: Path) -> str | None:
    """The licence that the model card (README.md) names, or else the first line of a LICENSE file."""
    if (folder / "README.md").is_file():
        from huggingface_hub import ModelCard

        try:
            said = ModelCard.load(folder / "README.md").data
        except Exception:  # a card of others may hold any YAML
            said = None
        found = getattr(said, "license_name", None) or getattr(said, "license", None)
        if found:
            return ", ".join(found) if isinstance(found, list) else str(found)
    for path in sorted(folder.glob("LICENSE*")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if first := next((line.strip() for line in lines if line.strip()), None):
            return first[:60]
    return None


def _of_run(name: str, run: RunFolder) -> Facts:
    settings = read_config(run.config)
    model = model_of(settings.get("model", {}))
    newest = run.checkpoint or checkpoint.newest(run.checkpoints)
    template, special = _tokens(run.tokenizer)
    stage = str(settings.get("stage", {}).get("kind", "run"))
    dtype = None if newest is None else _most(_stored(newest))
    facts = _where_it_is(run, newest, stage)
    misfit = f"model_type = {model.model_type}" if isinstance(model, TransformersConfig) else None
    return Facts(name, "run", shape_of(model), dtype, None, template, special, model, misfit, None, facts)


def _where_it_is(run: RunFolder, newest: Path | None, stage: str) -> RunFacts:
    path = run.path / "metrics.jsonl"
    rows: list[dict[str, Any]] = read_rows(path) if path.is_file() else []
    losses = [(row["val/loss"], row["step"]) for row in rows if row.get("val/loss") is not None]
    accuracies = [(key, row[key]) for row in rows for key in row if is_task_share(key) and key.endswith("accuracy")]
    files = [file for file in run.path.rglob("*") if file.is_file()]
    written = max((file.stat().st_mtime for file in files), default=time.time())
    step = checkpoint.step_of(newest) if newest else max((row["step"] for row in rows), default=None)
    return RunFacts(
        stage=stage,
        step=step,
        complete=run.complete() is not None,
        best=min(losses, default=None),
        accuracy=accuracies[-1] if accuracies else None,
        age=max(time.time() - written, 0.0),
        size=sum(file.stat().st_size for file in files),
    )


def best_text(found: RunFacts) -> str:
    """`validation loss 3.55 at step 200, mathqa/accuracy 46.7%`."""
    parts = []
    if found.best is not None:
        parts.append(f"{metric('val/loss').text(found.best[0])} at step {found.best[1]:,}")
    if found.accuracy is not None:
        parts.append(f"{found.accuracy[0]} {metric(found.accuracy[0]).text(found.accuracy[1])}")
    return ", ".join(parts)
