"""Memory predicted on fake tensors, against the memory that real tensors take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._functorch.config as partitioner
from functorch.compile import (
    make_boxed_func,  # pyright: ignore[reportPrivateImportUsage]
    min_cut_rematerialization_partition,
)
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from pretune.adapters.attach import attach
from pretune.compute.compilation import RECOMPUTATION
from pretune.compute.precision import autocast
from pretune.core.batch import Batch
from pretune.core.config import validate
from pretune.memory.estimate import CPU, Footprint
from pretune.model.transformer import Transformer
from pretune.objectives.objective import objective_of
from pretune.optim.optimizers import build_optimizer
from pretune.quantization.nf4 import NF4Linear
from pretune.run.config import RunConfig
from pretune.run.model import apply_precision, quantize

Compose = Callable[..., dict[str, Any]]
SMALL = ("precision=bf16", "model.vocab_size=2000", "model.dim=64", "model.mlp_dim=176", "batch.tokens=1024",
         "stage.objective.chunk_tokens=128")  # fmt: skip


class Measured:
    """The parts of a real run, for one micro-batch."""

    def __init__(self, config: RunConfig, rows: int) -> None:
        self.config, self.model = config, Transformer(config.model)
        self.model.reset_parameters(torch.Generator().manual_seed(0))
        added = config.data.tokenizer.add_tokens
        attach(
            self.model,
            config.adapter,
            0,
            new_tokens=range(config.model.vocab_size - len(added), config.model.vocab_size),
        )
        quantize(config.quantization, self.model)
        apply_precision(config.precision, self.model)
        tokens = torch.zeros(rows, config.data.sequence_length, dtype=torch.int64)
        documents = torch.zeros_like(tokens, dtype=torch.int32) if config.data.packing.isolate else None
        reference = {"log_probs": torch.zeros(rows, 1, 2)} if config.stage.objective.needs_reference else None
        self.batch = Batch(tokens, tokens, documents, reference)

    def loss(self) -> torch.Tensor:
        with autocast(self.config.precision, CPU):
            return objective_of(self.config.stage.objective).sums(self.model, self.batch)["loss"]

    def saved(self, loss: Callable[[], torch.Tensor] | None = None) -> int:
        """Bytes of the tensors that autograd keeps for `loss`, by default the uncompiled one, without parameters."""
        own = {parameter.data_ptr() for parameter in self.model.parameters() if type(parameter) is torch.nn.Parameter}
        layers = [layer for layer in self.model.modules() if isinstance(layer, NF4Linear)]
        own |= {tensor.data_ptr() for layer in layers for tensor in layer.stored()}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = (loss or self.loss)()
        assert result.requires_grad
        return sum(storage.nbytes() for storage in kept.values())

    def peak(self) -> int:
        """Peak bytes that torch's allocator hands out over a second forward and backward pass: of the same step or, if
        one is a whole step, of the next."""
        self.loss().backward()
        if self.batch.inputs.numel() == self.config.batch.tokens:
            self.model.zero_grad(set_to_none=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.loss().backward()
        assert profile.profiler is not None
        assert profile.profiler.kineto_results is not None
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            highest = max(highest, now)
        return highest


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("model.num_kv_heads=1", "model.activation=relu_squared", "model.tied_embeddings=false"),
        ("model.num_layers=3", "model.qk_norm=true", "data.packing.isolate=true", "model.dropout=0.1"),
        ("model.norm.kind=layernorm", "model.activation=gelu", "model.softcap=15.0"),
        ("model.num_layers=3", "model.dropout=0.1", "precision.activation_checkpointing=true"),
    ],
)
def test_activations_are_the_bytes_that_autograd_saves(tiny: Compose, changes: tuple[str, ...], compute: str) -> None:
    config = validate(RunConfig, tiny(*SMALL, f"precision.compute={compute}", "precision.compile=false", *changes))
    footprint = Footprint(config)
    for rows in (1, 4):
        assert footprint.saved(rows) == pytest.approx(Measured(config, rows).saved(), rel=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("precision.compute=float32", "data.packing.isolate=true"),
        ("model.num_layers=4", "precision.activation_checkpointing=true"),
        ("model.num_layers=30",),  # of which some are counted and not run
    ],
)
def test_the_peak_is_the_allocators(tiny: Compose, changes: tuple[str, ...]) -> None:
    config = validate(RunConfig, tiny(*SMALL, "precision.compile=false", *changes))
    footprint, rows = Footprint(config), 8
    real = footprint.constant + Measured(config, rows).peak()
    assert footprint.peak(rows) == pytest.approx(real, rel=0.03)
    assert sum(footprint.parts(rows).values()) == footprint.peak(rows)


def test_a_step_of_one_micro_batch_has_no_gradients_to_add_to(tiny: Compose) -> None:
    settings, rows = (*SMALL, "model.vocab_size=8000"), 16
    eager = validate(RunConfig, tiny(*settings, "batch.tokens=512", "precision.compile=false"))
    one = Footprint(eager)
    real = one.constant - one.gradients + Measured(eager, rows).peak()
    assert one.peak(rows) == pytest.approx(real, rel=0.03)
    assert sum(one.parts(rows).values()) == one.peak(rows)
    one, two = (
        Footprint(validate(RunConfig, tiny(*settings, f"batch.tokens={tokens}", "precision.compile=true")))
        for tokens in (512, 1024)
    )
    assert one.peak(rows) == two.peak(rows) - two.gradients
    assert one.parts(rows) == {**two.parts(rows), "gradients": 0}


def test_on_a_gpu_uncompiled_code_keeps_a_mask_of_length_squared(tiny: Compose) -> None:
    """A byte for each pair of positions of each row, once for all layers; on a CPU long rows do without."""
    long = ("data.sequence_length=1024", "model.max_sequence_length=1024", "batch.tokens=4096", "batch.micro_batch=2")
    config = validate(RunConfig, tiny(*SMALL, "precision.compile=false", "data.packing.isolate=true", *long))
    here, there = Footprint(config), Footprint(config, "cuda")
    extra = [there.peak(size) - here.peak(size) for size in (1, 2)]
    assert extra == [1024**2, 2 * 1024**2]


def test_compiled_keeps_less_and_more_rows_take_more(tiny: Compose) -> None:
    eager = Footprint(validate(RunConfig, tiny(*SMALL, "precision.compile=false")))
    compiled = Footprint(validate(RunConfig, tiny(*SMALL, "precision.compile=true")))
    assert 0.4 * eager.saved(8) < compiled.saved(8) < eager.saved(8)
    assert compiled.peak(8) < eager.peak(8)
    assert compiled.peak(8) < compiled.peak(16)
    assert compiled.constant == eager.constant


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_a_layer_costs_what_goes_into_it(tiny: Compose, compiled: bool) -> None:
    settings = (*SMALL, f"precision.compile={compiled}", "precision.activation_checkpointing=true")
    shallow, deep = (
        Footprint(validate(RunConfig, tiny(*settings, f"model.num_layers={layers}"))) for layers in (2, 12)
    )
    assert deep.saved(8) - shallow.saved(8) == pytest.approx(10 * 8 * 32 * 64 * 4, rel=0.05)
    kept = Footprint(validate(RunConfig, tiny(*settings[:-1], "model.num_layers=12")))
    assert deep.peak(8) - deep.constant < 0.6 * (kept.peak(8) - kept.constant)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler does what it deprecates
@pytest.mark.parametrize("changes", [(), ("data=ultrafeedback", "stage=dpo", "stage.init_from=base")])
def test_compiled_activations_are_the_bytes_that_a_compiled_step_saves(
    composed: Compose, changes: tuple[str, ...]
) -> None:
    """The losses of pairs keep no logits: in a compiled step, they are one operator."""
    config = validate(RunConfig, composed("smoke", *changes, *SMALL, "precision.compile=true", "batch.micro_batch=1"))
    footprint, measured = Footprint(config), Measured(config, 8)

    def as_is(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(
        fw_compiler=as_is,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    loss = torch.compile(measured.loss, backend=backend, dynamic=False)
    with partitioner.patch(RECOMPUTATION):
        loss()
        assert footprint.saved(8) == pytest.approx(measured.saved(loss), rel=0.02)


ADAPTED = ("stage=finetune", "stage.init_from=base", "data.tokenizer.kind=trained", "adapter.rank=4")


@pytest.mark.parametrize("quantization", ["none", "qlora_nf4"])
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_with_an_adapter(tiny: Compose, kind: str, quantization: str) -> None:
    settings = (*SMALL, "precision.compile=false", *ADAPTED, f"adapter={kind}", f"quantization={quantization}")
    config = validate(RunConfig, tiny(*settings))
    footprint, measured = Footprint(config), Measured(config, 8)
    trained = sum(one.numel() for one in measured.model.parameters() if one.requires_grad)
    assert footprint.gradients == 4 * trained
    assert footprint.optimizer == pytest.approx(8 * trained, rel=0.05)
    held = sum(one.nbytes for one in measured.model.parameters() if type(one) is torch.nn.Parameter)
    held += sum(buffer.nbytes for buffer in measured.model.buffers())
    layers = [layer for layer in measured.model.modules() if isinstance(layer, NF4Linear)]
    held += sum(tensor.nbytes for layer in layers for tensor in layer.stored())
    assert footprint.weights == held
    assert footprint.saved(8) == pytest.approx(measured.saved(), rel=0.03)
    assert footprint.peak(8) == pytest.approx(footprint.constant + measured.peak(), rel=0.1)


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("more", ["new_rows", "all", "adapter.targets=[all,embedding,head]"])
def test_with_an_embedding_that_is_trained_or_adapted(tiny: Compose, more: str, tied: str) -> None:
    more = more if "=" in more else f"adapter.train_embeddings={more}"
    own = (
        more,
        f"model.tied_embeddings={tied}",
        *(["data.tokenizer.add_tokens=['<a>','<b>']"] if "rows" in more else []),
    )
    config = validate(RunConfig, tiny(*SMALL, "precision.compile=false", *ADAPTED, "adapter=lora", *own))
    footprint, measured = Footprint(config), Measured(config, 8)
    trained = sum(one.numel() for one in measured.model.parameters() if one.requires_grad)
    assert footprint.gradients == 4 * trained
    assert footprint.peak(8) == pytest.approx(footprint.constant + measured.peak(), rel=0.1)
    compiled = Footprint(validate(RunConfig, tiny(*SMALL, *ADAPTED, "adapter=lora", "precision.compile=true", *own)))
    assert footprint.peak(8) * 0.4 < compiled.peak(8) < footprint.peak(8) * 1.5


def test_an_adapter_takes_less_and_four_bits_less_again(tiny: Compose) -> None:
    whole = Footprint(validate(RunConfig, tiny(*SMALL)))
    adapted = Footprint(validate(RunConfig, tiny(*SMALL, *ADAPTED, "adapter=lora")))
    quantized = Footprint(validate(RunConfig, tiny(*SMALL, *ADAPTED, "adapter=lora", "quantization=qlora_nf4")))
    assert quantized.peak(8) < adapted.peak(8) < whole.peak(8)
    assert quantized.constant < 0.8 * adapted.constant < whole.constant


@pytest.mark.parametrize("more", [(), ("model.tied_embeddings=false", *ADAPTED, "adapter=lora")])
def test_rounding_keeps_rounded_weights_and_inputs(tiny: Compose, more: tuple[str, ...]) -> None:
    rounding = ("quantization=qat_int8_int4", "quantization.group_size=16", "quantization.start=0.0")
    settings = (*SMALL, *rounding, *more)
    config = validate(RunConfig, tiny(*settings, "precision.compile=false"))
    footprint, measured = Footprint(config), Measured(config, 8)
    assert footprint.saved(8) == pytest.approx(measured.saved(), rel=0.03)
    assert footprint.peak(8) == pytest.approx(footprint.constant + measured.peak(), rel=0.1)
    plain = Footprint(validate(RunConfig, tiny(*settings[: len(SMALL)], *more, "precision.compile=false")))
    assert footprint.constant == plain.constant
    assert footprint.saved(8) > plain.saved(8)
    compiled = Footprint(validate(RunConfig, tiny(*settings, "precision.compile=true")))
    assert plain.saved(8) * 0.4 < compiled.saved(8) < footprint.saved(8)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_optimizer_state_is_what_a_step_leaves(tiny: Compose, optimizer: str) -> None:
    config = validate(RunConfig, tiny(f"optimizer={optimizer}"))
    model = Transformer(config.model)
    model.reset_parameters(torch.Generator().manual_seed(0))
    real = build_optimizer(config.optimizer, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    real.step()
    held = sum(value.nbytes for slots in real.state.values() for value in slots.values() if torch.is_tensor(value))
    assert Footprint(config).optimizer == held


def test_eight_bits_take_a_quarter_of_adamws_state(tiny: Compose) -> None:
    from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

    for tables in (get_qmap_signed, get_qmap_unsigned):
        tables.cache_clear()  # as in a new process
    wide = ("model.vocab_size=2048", "model.dim=256", "model.mlp_dim=704")
    exact, eight = (
        Footprint(validate(RunConfig, tiny(*wide, f"optimizer={kind}"))) for kind in ("adamw", "adamw_8bit")
    )
    assert 0.25 < eight.optimizer / exact.optimizer < 0.3


def test_the_largest_micro_batch_divides_the_step_and_is_the_largest(tiny: Compose) -> None:
    footprint = Footprint(validate(RunConfig, tiny(*SMALL, "precision.compile=false")))
    for rows in (1, 4, 6, 12):
        assert footprint.largest(footprint.peak(rows), 12) == rows
        assert footprint.largest(footprint.peak(rows) + 1000, 12) == rows
    assert footprint.largest(footprint.peak(1) - 1, 12) is None
    assert footprint.largest(2**50, 7) == 7
    assert footprint.largest(footprint.peak(5), 7) == 1


def test_what_does_not_grow_with_the_micro_batch_does_not_make_it_smaller(
    tiny: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a small model with a large vocabulary: one chunk of the loss takes as much as hundreds of sequences."""
    footprint, asked = Footprint(validate(RunConfig, tiny("stage.objective.chunk_tokens=256"))), []

    def peak(size: int) -> int:
        asked.append(size)
        return 1_000_000 + 2_000 * size

    monkeypatch.setattr(footprint, "peak", peak)
    monkeypatch.setattr(footprint, "saved", lambda size: 1_500 * size)
    for size in (1, 8, 32, 256, 1024):
        assert footprint.largest(1_000_000 + 2_000 * size, 1024) == size
    asked.clear()
    assert footprint.largest(2**40, 1024) == 1024
    assert max(asked) == 16, "sizes far from the limit need no estimate of their own, which takes seconds"


def test_a_peak_in_the_update_hides_what_sequences_take(tiny: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    footprint = Footprint(validate(RunConfig, tiny("stage.objective.chunk_tokens=256")))
    monkeypatch.setattr(footprint, "peak", lambda size: max(1_000_000, 200_000 + 2_000 * size))
    monkeypatch.setattr(footprint, "saved", lambda size: 1_900 * size)
    for size in (512, 1024):
        assert footprint.largest(200_000 + 2_000 * size, 1024) == size
        assert footprint.largest(200_000 + 2_000 * size - 1, 1024) == size // 2


def test_on_a_gpu_dropout_keeps_no_attention_weights(composed: Compose) -> None:
    settings = ["precision=bf16", "data.sequence_length=256", "batch.micro_batch=2", "batch.tokens=2048"]
    plain, dropped = (validate(RunConfig, composed("smoke", *settings, f"model.dropout={rate}")) for rate in (0.0, 0.1))
    weights = 2 * 256 * 256 * plain.model.num_heads * plain.model.num_layers  # numbers in a micro-batch
    more_on_a_cpu = Footprint(dropped, "cpu").saved(2) - Footprint(plain, "cpu").saved(2)
    more_on_a_gpu = Footprint(dropped, "cuda").saved(2) - Footprint(plain, "cuda").saved(2)
    assert more_on_a_cpu - more_on_a_gpu > weights
