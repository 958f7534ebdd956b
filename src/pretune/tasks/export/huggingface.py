"""Export a model for transformers, or its adapter for peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretune.adapters.huggingface import adapter_for_huggingface
from pretune.checkpoint import store as checkpoint
from pretune.core.config import ConfigError
from pretune.core.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_json
from pretune.model.adapter_names import names_in_transformers, stored_transposed
from pretune.model.config import ModelConfig
from pretune.model.huggingface import llama_cpp
from pretune.model.huggingface.config_json import huggingface_config
from pretune.model.huggingface.folding import portable_config, portable_weights
from pretune.model.huggingface.llama_cpp import is_known, llama_cpp_tensors, obstacle
from pretune.model.huggingface.weights import to_huggingface
from pretune.model.transformer import Transformer
from pretune.model.transformers_model.folder import save_folder
from pretune.model.transformers_model.model import TransformersModel
from pretune.run.config import RunConfig
from pretune.run.endings import run_endings
from pretune.run.folder import RunFolder
from pretune.run.model import evaluation_model
from pretune.run.pretrained import PretrainedModel
from pretune.run.tokenizer import assemble_tokenizer
from pretune.run.weights import Start, chosen_checkpoint, start_of
from pretune.tasks.export.beside import generation_config, write_tokenizer
from pretune.tasks.export.reload import check_model, check_tokenizer


def write_model(config: RunConfig, run: RunFolder, folder: Path) -> str:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer; an adapter is merged into the
    weights. If `quantization` stores weights as integers, the dequantized values are written.

    The folder is loaded again, as its users will; see reload.py. Returns instructions for use. Raises ConfigError for a
    model that no transformers architecture supports, and for a tokenizer that transformers reads differently.
    """
    tokenizer, dtype = assemble_tokenizer(config), config.export.dtype
    model = evaluation_model(config, run, torch.device("cpu"))
    if isinstance(model, TransformersModel):
        save_folder(model, folder, tokenizer.eos_id, dtype)
        llama = f"has not been tried with {model.section.model_type}"
    else:
        plain = Transformer(model.config)  # without the fake quantization of inputs
        plain.load_state_dict(model.state_dict())
        model, llama = plain, _write_own(plain, folder, tokenizer.eos_id, dtype)
    ends = run_endings(config, tokenizer)
    write_json(folder / "generation_config.json", generation_config(tokenizer, ends))
    write_tokenizer(config, tokenizer, folder)
    check_model(model, check_tokenizer(config, tokenizer, folder), folder, dtype)
    return (
        "Load it: transformers.AutoModelForCausalLM.from_pretrained('{output}')"
        + (f"; generate(..., tokenizer=tokenizer) ends a text before {ends.strings[0]!r}" if ends.strings else "")
        + f". llama.cpp {llama}"
    )


def _write_own(model: Transformer, folder: Path, eos_id: int, dtype: str) -> str:
    """Write config.json and the weights of our transformer; returns what llama.cpp does with them."""
    shape = portable_config(model.config)
    write_json(folder / "config.json", huggingface_config(shape, eos_id, dtype))
    weights = to_huggingface(portable_weights(model.state_dict(), model.config), shape)
    _save(weights, folder / "model.safetensors", dtype)
    if beside := llama_cpp_tensors(shape, weights):
        _save(beside, folder / llama_cpp.FILE, "float32")
    return _for_llama_cpp(shape)


def _for_llama_cpp(shape: ModelConfig) -> str:
    if not is_known(shape):
        return f"has not been tried with {shape.architecture}"
    found = obstacle(shape)
    if found is not None:
        return f"cannot run it: {found}"
    return "runs it: python convert_hf_to_gguf.py '{output}' (docs/how-to/export.md says for which tokenizers)"


def write_adapter(config: RunConfig, newest: Path, folder: Path) -> str:
    """Write adapter_model.safetensors, adapter_config.json, generation_config.json and the tokenizer; return
    instructions for use.

    The adapter names the folder that an export of its base run goes to by default, whether that is there yet or not.
    Raises ConfigError for an adapter or base model without a counterpart in transformers.
    """
    checkpoint.check(newest)
    tokenizer = assemble_tokenizer(config)
    trained = config.adapter.trained_embeddings(bool(tokenizer.added_ids)) != "none"
    if tokenizer.added_ids and not trained:
        raise ConfigError(
            "the rows of the tokens that this run added are neither in the adapter nor in the model below it: use "
            "export.adapter=merge, or train with adapter.train_embeddings=new_rows"
        )
    layers = names_in_transformers(config.model, config.adapter.adapts_vocabulary or trained)
    tensors, content = adapter_for_huggingface(newest, layers, stored_transposed(config.model))
    _save(tensors, folder / ADAPTER_WEIGHTS, config.export.dtype)
    base = start_of(config)
    assert base is not None  # RunConfig ensures it
    where, revision, advice = _base_of_adapter(base)
    write_json(folder / ADAPTER_CONFIG, content | {"base_model_name_or_path": where, "revision": revision})
    write_tokenizer(config, tokenizer, folder)
    ends = run_endings(config, tokenizer)
    write_json(folder / "generation_config.json", generation_config(tokenizer, ends))
    return (
        f"It belongs on the weights of {base.name}{advice}. Load both: "
        "peft.AutoPeftModelForCausalLM.from_pretrained('{output}')"
    )


def _base_of_adapter(base: Start) -> tuple[str, str | None, str]:
    """Where peft finds the weights that an adapter belongs on, their revision on the hub, and words on that place."""
    if isinstance(base, PretrainedModel):
        repository, _, commit = base.name.partition("@")
        return (repository, commit, "") if commit else (str(base.path.resolve()), None, "")
    folder = model_folder(base, checkpoint.step_of(chosen_checkpoint(base))).resolve()
    missing = f", which are not there yet: python src/main.py --config {base.config} task=export"
    return str(folder), None, f" in {folder}{'' if folder.is_dir() else missing}"


def model_folder(run: RunFolder, step: int) -> Path:
    """Where the weights of a run go at a step, unless export.output says otherwise."""
    return run.path / "export" / f"huggingface-step_{step:08d}"


def _save(tensors: dict[str, Tensor], path: Path, dtype: str) -> None:
    """Write tensors as `dtype`; ConfigError if they have values outside its range."""
    kind: Any = getattr(torch, dtype)
    converted = {name: tensor.to(kind).contiguous() for name, tensor in tensors.items()}
    lost = [
        name for name, tensor in converted.items() if tensors[name].isfinite().all() and not tensor.isfinite().all()
    ]
    if lost:
        raise ConfigError(f"{lost[0]} has values too large for export.dtype={dtype}; use bfloat16 or float32")
    save_file(converted, path, {"format": "pt"})
