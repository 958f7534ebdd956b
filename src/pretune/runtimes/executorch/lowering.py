"""A model as a .pte: captured by torch.export, its layers handed to XNNPACK, the rest to ExecuTorch's own kernels."""

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
"""XNNPACK's 4-bit matrices have a scale for a multiple of this many numbers."""


class Interface(NamedTuple):
    """What ExecuTorch's runner reads from a .pte beside the model: `context` tokens of memory for prompt and answer,
    the ids that the tokenizer knows, and which of them end a text."""

    context: int
    vocab_size: int
    eos_ids: tuple[int, ...]

    @property
    def longest_prompt(self) -> int:
        """Tokens that one call may read."""
        return self.context - 1

    def methods(self, num_layers: int) -> dict[str, Any]:
        """Under the names of its constants (extension/llm/runner/constants.h)."""
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
    """ConfigError where executorch is missing."""
    if importlib.util.find_spec("executorch") is None:
        raise ConfigError("executorch is not installed here, and .pte files need it: pip install -r req-phone.txt")


def check_lowerable(model: nn.Module) -> None:
    """ConfigError, which names the layer, for what XNNPACK has no kernel for."""
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not hasattr(weight, "qdata"):
            continue
        group = weight.block_size[-1]
        if isinstance(module, nn.Linear) and weight.activation_quantization is None:
            raise ConfigError(
                f"XNNPACK multiplies integers by integers: it has no kernel for {name}, whose weights alone are "
                "rounded; take quantization=int8_int4 (or qat_int8_int4, or none)"
            )
        if isinstance(module, nn.Linear) and group < weight.shape[-1] and group % XNNPACK_GROUP:
            raise ConfigError(
                f"XNNPACK's matrices have a scale for each {XNNPACK_GROUP} numbers or a multiple of that: {name} has "
                f"one for each {group}; take quantization.group_size={XNNPACK_GROUP}"
            )


STAGES = 3
"""Stages of lowering."""


def lower(model: nn.Module, interface: Interface, path: Path) -> Iterator[None]:
    """Write the .pte of a transformer in evaluation mode, on the CPU, in float32 or with torchao's integers in its
    layers; yields after each of its STAGES.

    Its method `forward` takes (tokens [1, T] int64, position of the first of them [1] int64) and returns logits [1, V]
    after the last; T is at most `interface.longest_prompt`. Tables stored as integers are packed in place: use the
    model before, not afterwards. Raises ConfigError for what XNNPACK lacks.
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
            # Their own export of language models sets both: the operators of the cache are not in core ATen.
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
        return captured.run_decompositions({})  # takes torchao's tensors apart


def _partitioners() -> list[Any]:
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )

    # XNNPACK's gelu is the exact one, whatever it is asked for; ours is the tanh approximation.
    others = [one for one in ALL_PARTITIONER_CONFIGS if getattr(one, "target_name", None) != "gelu.default"]
    # Layers that round what goes into them first: the other partitioner would tear them apart.
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
    """ConfigError where integers were not taken over by XNNPACK: the file would hold them in float32."""
    left = {str(node.target) for node in program.graph.nodes if "quantize_affine" in str(node.target)}
    if left:
        raise ConfigError(
            "XNNPACK took not all layers that are stored as integers; take quantization=int8_int4 with "
            f"quantization.group_size={XNNPACK_GROUP}, or quantization=none ({', '.join(sorted(left))} would remain)"
        )
