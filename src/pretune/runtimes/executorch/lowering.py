"""Lower a model to a .pte: torch.export captures it, XNNPACK runs its layers, ExecuTorch's kernels the rest."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pretune.core.config import ConfigError
from pretune.core.quiet import quiet
from pretune.runtimes.executorch.static import PhoneModel, pack_tables

XNNPACK_GROUP = 32
"""Group sizes of XNNPACK's 4-bit matrices must be multiples of this."""


class Interface(NamedTuple):
    """Metadata for ExecuTorch's runner in a .pte: the cache size (`context` tokens for prompt and answer), the size of
    the tokenizer's vocabulary, and the ids that end a text."""

    context: int
    vocab_size: int
    eos_ids: tuple[int, ...]

    @property
    def longest_prompt(self) -> int:
        """Maximum number of tokens per call."""
        return self.context - 1

    def methods(self, num_layers: int) -> dict[str, Any]:
        """The metadata under the runner's names (extension/llm/runner/constants.h)."""
        return {
            "get_max_seq_len": self.longest_prompt,
            "get_max_context_len": self.context,
            "get_vocab_size": self.vocab_size,
            "get_eos_ids": list(self.eos_ids),
            "get_n_layers": num_layers,
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": True,
            "enable_dynamic_shape": True,
        }


def check_installed() -> None:
    """Raise ConfigError if executorch is missing."""
    if importlib.util.find_spec("executorch") is None:
        raise ConfigError(".pte files need executorch, which is not installed here: pip install -r req-phone.txt")


def check_lowerable(model: nn.Module) -> None:
    """Raise ConfigError, naming the key or the layer, for positions and attention that a .pte does not have and for
    layers that XNNPACK has no kernel for."""
    config: Any = model.config
    if config.attention_softcap is not None:
        raise ConfigError(
            "ExecuTorch's attention for language models has no softcap, which this model needs "
            f"(model.attention_softcap = {config.attention_softcap:g}, as in Gemma 2); use export.format=huggingface "
            "or onnx"
        )
    if config.rope.follows_length:
        raise ConfigError(
            f"a .pte cannot read a text anew or rotate by its length, which model.rope.scaling.kind = "
            f"{config.rope.scaling.kind} needs; use export.format=huggingface or onnx, or another rule (yarn, ntk, "
            "linear)"
        )
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not hasattr(weight, "qdata"):
            continue
        group = weight.block_size[-1]
        if isinstance(module, nn.Linear) and weight.activation_quantization is None:
            raise ConfigError(
                f"XNNPACK multiplies integers by integers: it has no kernel for {name}, whose weights are quantized "
                "but not its activations; use quantization=int8_int4 (or qat_int8_int4, or none)"
            )
        if isinstance(module, nn.Linear) and group < weight.shape[-1] and group % XNNPACK_GROUP:
            raise ConfigError(
                f"XNNPACK needs group sizes that are multiples of {XNNPACK_GROUP}, but {name} has groups of {group}; "
                f"set quantization.group_size={XNNPACK_GROUP}"
            )


STAGES = 3
"""Number of stages of lowering, for a progress display."""


def lower(model: nn.Module, interface: Interface, path: Path) -> Iterator[None]:
    """Write the .pte of a transformer in evaluation mode on the CPU, in float32 or with torchao's integer layers; yield
    after each of the STAGES.

    Its method `forward` takes (tokens [1, T] int64, position of the first token [1] int64) and returns logits [1, V]
    after the last token; T is at most `interface.longest_prompt`. Integer tables are packed in place, so the model
    cannot be used afterwards. Raises ConfigError for layers that XNNPACK does not support.
    """
    check_installed()
    check_lowerable(model)
    config: Any = model.config
    with quiet():
        import executorch.kernels.quantized  # noqa: F401  # registers torch.ops.quantized_decomposed
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  # registers torch.ops.llama

        captured = _capture(model, interface)
    yield
    with quiet():
        edge = to_edge_transform_and_lower(
            captured,
            partitioner=_partitioners(),
            constant_methods=interface.methods(config.num_layers),
            # As in ExecuTorch's own export of language models: the cache operators are not in core ATen.
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
    _check_nothing_left(edge.exported_program())
    yield
    with quiet(), path.open("wb") as file:
        edge.to_executorch(_backend_config()).write_to_file(file)
    yield


def _capture(model: nn.Module, interface: Interface) -> torch.export.ExportedProgram:
    pack_tables(model)
    phone = PhoneModel(model, interface.context, interface.vocab_size)
    example = torch.ones(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    length = torch.export.Dim("length", min=1, max=interface.longest_prompt)
    with torch.no_grad():
        captured = torch.export.export(phone, example, dynamic_shapes=({1: length}, None), strict=False)
        return captured.run_decompositions({})  # decomposes torchao's tensor subclasses


def _partitioners() -> list[Any]:
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )

    # Leave gelu to ExecuTorch: XNNPACK always computes the exact one, and ours is the tanh approximation.
    others = [one for one in ALL_PARTITIONER_CONFIGS if getattr(one, "target_name", None) != "gelu.default"]
    # Dynamically quantized layers first: the other partitioner would split them.
    return [XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner(configs=others)]


def _backend_config() -> Any:
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    return ExecutorchBackendConfig(
        extract_delegate_segments=True,
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
    )


def _check_nothing_left(program: Any) -> None:
    """Raise ConfigError if XNNPACK did not take all integer layers: the file would store the others in float32."""
    left = {str(node.target) for node in program.graph.nodes if "quantize_affine" in str(node.target)}
    if left:
        raise ConfigError(
            "XNNPACK does not support all layers that are stored as integers; use quantization=int8_int4 with "
            f"quantization.group_size={XNNPACK_GROUP}, or quantization=none ({', '.join(sorted(left))} would remain)"
        )
