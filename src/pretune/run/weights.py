"""Find the weights to start from or to evaluate, of a run or of a model of others, and load them into a model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretune.checkpoint import store as checkpoint
from pretune.checkpoint.identity import identity, with_identity
from pretune.core.config import ConfigError, InputError, validate
from pretune.core.files import ADAPTER_WEIGHTS
from pretune.core.terminal import warn
from pretune.data.tokenizer_files import added_ids
from pretune.model.config import ModelConfig
from pretune.model.transformers_model.config import TransformersConfig
from pretune.quantization.config import QloraConfig
from pretune.run.config import RunConfig
from pretune.run.folder import RunFolder, find_run, read_config
from pretune.run.pretrained import PretrainedModel, find_pretrained, why_no_model

if TYPE_CHECKING:
    from pretune.model.build import Model

Start = RunFolder | PretrainedModel
"""Where weights to start from are."""


def own_folder(config: RunConfig) -> RunFolder:
    """The folder of the run that `config` describes, whether it exists yet or not."""
    return RunFolder(Path(config.output_dir) / config.name)


def start_of(config: RunConfig) -> Start | None:
    """The run, with its checkpoint, or the model whose weights this run starts from, if any; for a run that has saved
    something, those that it started from.

    Raises InputError if they are not there.
    """
    init_from = config.stage.init_from
    if init_from is None:
        return None
    own = own_folder(config)
    newest = checkpoint.newest(own.checkpoints)
    if newest is not None:
        return _start_of(own, newest, init_from)
    return find_start(init_from, own.path.parent)


def start_identity(config: RunConfig, newest: Path | None) -> str | None:
    """What identifies the weights that the run starts from, or started from before it saved `newest`; None for random
    ones.

    Raises ConfigError or InputError if stage.init_from now names other weights than then.
    """
    if newest is None:
        start = start_of(config)
        return None if start is None else start_identity_of(start)
    own, now = own_folder(config), config.stage.init_from
    then, recorded = read_config(own.config).get("stage", {}).get("init_from"), recorded_start(newest)
    if (now is None) != (then is None):
        raise ConfigError(f"stage.init_from: {then} -> {now}: {own.path} did not start there; restore the old value")
    if now != then:
        start_of(config)
    return recorded


def recorded_start(path: Path) -> str | None:
    """What identifies the weights that the run of the checkpoint `path` started from; None for random ones."""
    state = checkpoint.state_of(path)
    if "start" not in state:
        raise InputError(
            f"{path} was written by another version of Pretune, and does not say which weights it started from; use "
            "that version for it"
        )
    return state["start"]


def find_start(init_from: str, runs: Path, config_only: bool = False, key: str = "stage.init_from") -> Start:
    """What `init_from`, the value of `key`, names: a run (by its name, at its path, or moved together with the folder
    `runs`), with its checkpoint; or the folder of a model of others; or one on the hub, which is downloaded.

    config_only: a model's config.json is enough, and a run needs no checkpoint. Raises InputError if there is none.
    """
    try:
        run = _find_run(init_from, runs)
    except InputError as error:
        found = find_pretrained(init_from, "config" if config_only else "weights")
        if found is None:
            hint = f"{error} A model on the Hugging Face hub is written owner/name."
            raise InputError(f"{key}: {why_no_model(init_from) or hint}") from None
        return found
    return run if config_only else replace(run, checkpoint=chosen_checkpoint(run))


def model_section(start: Start, kind: Literal["own", "transformers"] | None = None) -> Mapping[str, Any]:
    """The model section of a start, as its config.yaml or config.json says it; `kind`: see PretrainedModel.config."""
    if isinstance(start, PretrainedModel):
        return start.config(kind).model_dump(mode="json")
    section = read_config(start.config).get("model")
    return section if isinstance(section, Mapping) else {}


FREE = (
    *("dropout", "init", "architecture", "max_sequence_length", "vocab_multiple_of"),
    *("window", "rope.theta", "rope.local_theta", "rope.scaling"),
)
"""Keys of the model section that may differ from the start's: the weights fit all the same, and can learn the rest. Of
learned positions there are as many as there are weights."""


def check_model(config: RunConfig, start: Start) -> list[str]:
    """Raise ConfigError, naming the keys, if the model section contradicts that of the weights that the run starts
    from. Returns a note for each other difference."""
    if isinstance(config.model, TransformersConfig):
        return _check_library_model(config.model, start, bool(config.data.tokenizer.add_tokens))
    theirs = model_section(start, "own")
    if theirs.get("kind") is not None:
        raise ConfigError(f"stage.init_from: {start.name} is a model that transformers computes: take it by model=auto")
    differing = dict(sorted(_differences(config.model.model_dump(mode="json"), theirs)))
    allowed = set(FREE) - ({"max_sequence_length"} if config.model.learned_positions else set())
    if config.data.tokenizer.add_tokens and config.model.vocab_size > theirs.get("vocab_size", 0):
        allowed.add("vocab_size")  # it grows
    free = {key for key in differing if any(key == one or key.startswith(f"{one}.") for one in allowed)}
    faults = [f"model.{key} = {both[0]}, but {both[1]} there" for key, both in differing.items() if key not in free]
    if faults:
        more = f", and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ConfigError(
            f"stage.init_from: {start.name} is another model than `model` says ({'; '.join(faults[:4])}{more}): take "
            "its own with model=auto, or leave these keys out"
        )
    shown = [key for key in differing if key in free and not key.startswith(("init.", "architecture", "vocab_"))]
    return [f"model.{key} is {differing[key][0]}, and was {differing[key][1]} in {start.name}" for key in shown]


def _check_library_model(ours: TransformersConfig, start: Start, grows: bool) -> list[str]:
    """The same of a model that transformers computes: it says itself, when it is loaded, whether weights fit."""
    theirs = model_section(start, "transformers")
    if theirs.get("kind") != "transformers":
        raise ConfigError(
            f"stage.init_from: {start.name} is a run of our own transformer, not of model=transformers: take its model "
            "with model=auto"
        )
    size = theirs["vocab_size"]
    if ours.vocab_size < size or (ours.vocab_size > size and not grows):
        raise ConfigError(
            f"stage.init_from: {start.name} is another model than `model` says (model.vocab_size = {ours.vocab_size}, "
            f"but {size} there): take its own with model=auto, or leave this key out"
        )
    differing = dict(sorted(_differences(ours.config, theirs["config"])))
    if "model_type" in differing:
        types = " and ".join(differing["model_type"])
        raise ConfigError(f"stage.init_from: {start.name} is another architecture than model.config says ({types})")
    return [f"model.config.{key} is {now}, and was {then} in {start.name}" for key, (now, then) in differing.items()]


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """The keys, with both values, that both sides have and that differ."""
    for key in ours.keys() & theirs.keys():
        if isinstance(ours[key], Mapping) and isinstance(theirs[key], Mapping):
            yield from ((f"{key}.{inner}", values) for inner, values in _differences(ours[key], theirs[key]))
        elif ours[key] != theirs[key]:
            yield key, (_written(ours[key]), _written(theirs[key]))


def _written(value: Any) -> str:
    """A value as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _find_run(init_from: str, runs: Path) -> RunFolder:
    try:
        return find_run(init_from, str(runs))
    except InputError:
        parts = Path(init_from).parts
        for moved in (parts[-1:], parts[-3:]):  # a run, a checkpoint of a run
            with contextlib.suppress(InputError):
                return find_run(str(runs.joinpath(*moved)), str(runs))
        raise


def _start_of(run: RunFolder, path: Path, init_from: str) -> Start:
    """The weights that the checkpoint `path` of `run` started from."""
    recorded, start = recorded_start(path), find_start(init_from, run.path.parent, config_only=True)
    if recorded is not None and isinstance(start, RunFolder):
        found = with_identity(start.checkpoints, recorded)
        if found is not None:
            return replace(start, checkpoint=found)
    elif isinstance(start, PretrainedModel):
        start = find_start(init_from, run.path.parent)
        if start_identity_of(start) == recorded:
            return start
    raise InputError(
        f"{run.path} started from other weights than {start.path} has now (it was trained again, or is another one of "
        "that name); restore them, or set stage.init_from to where its weights are"
    )


def start_identity_of(start: Start) -> str:
    """Sixteen hex digits that depend on all weights of a start."""
    return start.identity() if isinstance(start, PretrainedModel) else identity(chosen_checkpoint(start))


def evaluated_run(config: RunConfig) -> RunFolder:
    """The run that `config` names, with the checkpoint selected by checkpoint.use, for tasks that only read it.

    A line says so where the model has more positions than it was trained with, and they are not stretched.
    """
    run = find_run(config.name, config.output_dir)
    trained, now = read_config(run.config).get("model", {}), config.model
    positions = trained.get("max_sequence_length")
    theta = trained.get("rope", {}).get("theta")
    stretched = not isinstance(now, ModelConfig) or now.rope.scaling is not None or now.rope.theta != theta
    if isinstance(positions, int) and now.max_sequence_length > positions and not stretched:
        warn(
            f"note: {run.name} was trained with {positions} positions, and beyond them a model is seldom of use: "
            f"stretch them by model.rope.scaling, or a greater model.rope.theta, to model.max_sequence_length = "
            f"{now.max_sequence_length}, or fine-tune it on longer texts"
        )
    return replace(run, checkpoint=chosen_checkpoint(run, config.checkpoint.use))


def chosen_checkpoint(run: RunFolder, use: str | int | None = None) -> Path:
    """The checkpoint to take weights from: the one that `run` names, else selected by `use`, else by the run's own
    checkpoint.use. InputError for a run without checkpoints."""
    if run.checkpoint is not None:
        return run.checkpoint
    said = read_config(run.config).get("checkpoint", {}).get("use", "best") if use is None else use
    path = checkpoint.pick(run.checkpoints, said)
    if path is None:
        raise InputError(f"{run.path} has no checkpoint yet; train it until it saves one")
    return path


def load_start(model: Model, start: Start, init_from: str | None = None) -> str:
    """Load the weights of a run (see load_run) or of a model of others into `model`, whose vocabulary becomes as large
    as theirs. Returns what identifies them."""
    from pretune.model.vocabulary import resize

    resize(model, _vocab_size(start) or model.config.vocab_size)
    if isinstance(start, RunFolder):
        return load_run(model, start, init_from)
    start.load(model)
    return start.identity()


def _vocab_size(start: Start) -> int | None:
    # config.json says it as well as the tensors, which take longer to open.
    found = model_section(start if isinstance(start, RunFolder) else replace(start, whole=False)).get("vocab_size")
    return found if isinstance(found, int) else None


def load_run(model: Model, run: RunFolder, init_from: str | None = None) -> str:
    """Load a run's weights into `model`; for a run with an adapter, the weights it started from with the adapter
    merged. Returns what identifies them.

    For a QLoRA run, the adapter is merged into the dequantized 4-bit weights. `init_from`: where to look for the
    weights that it started from, if not where its own configuration says. Raises InputError if they are not there.
    """
    path = chosen_checkpoint(run)
    if not (path / ADAPTER_WEIGHTS).is_file():
        checkpoint.load_weights(path, model)
        return identity(path)
    from pretune.adapters.attach import merge
    from pretune.adapters.files import attach_saved_adapter
    from pretune.model.vocabulary import add_tokens

    checkpoint.check(path)
    settings = read_config(run.config)
    base = load_start(model, _start_of(run, path, init_from or settings["stage"]["init_from"]))
    added = added_ids(run.tokenizer)
    if added:
        add_tokens(model, settings["model"]["vocab_size"], added)
    attach_saved_adapter(path, model, base)
    if settings["quantization"]["kind"] == "qlora_nf4":
        from pretune.quantization.nf4 import dequantize, quantize

        # The adapter was trained on 4-bit weights: merging it into their dequantized values gives the trained model.
        quantize(model, validate(QloraConfig, settings["quantization"]))
        dequantize(model)
    merge(model)
    return identity(path)
