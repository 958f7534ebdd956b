"""What an adapter does to a model, what it refuses, and its files."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted import adapter_section, perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import tiny_model
from torch import Tensor, nn

from pretune.adapters import files
from pretune.adapters.attach import (
    adapted_layers,
    attach,
    check_gradients,
    learning_rate_factors,
    merge,
    switched_off,
    target_names,
)
from pretune.adapters.config import NoAdapterConfig
from pretune.core.config import ConfigError, InputError
from pretune.core.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pretune.model.counts import count_parameters

SOURCES = Path(__file__).parents[2] / "src"
KINDS = ["lora", "dora", "loha", "lokr"]
TOKENS = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(1))


def adapted(kind: str, seed: int = 0, model_seed: int = 0, **changes: Any) -> Any:
    """A tiny model with an adapter moved away from its initial values."""
    model = tiny_model(model_seed)
    attach(model, adapter_section(kind, **changes), seed, f"weights of seed {model_seed}")
    perturb(model)
    return model


def test_what_libraries_say_of_other_machines_is_not_heard() -> None:
    command = [sys.executable, "-c", "import pretune.adapters.attach, pretune.adapters.files"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SOURCES)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def save(model: nn.Module, folder: Path) -> Path:
    """The part of an adapter that a checkpoint writes."""
    folder.mkdir()
    save_file(
        {name: tensor.detach() for name, tensor in files.adapter_tensors(model).items()}, folder / ADAPTER_WEIGHTS
    )
    (folder / ADAPTER_CONFIG).write_text(json.dumps(files.adapter_config(model)))
    return folder


def hidden(model: nn.Module) -> Tensor:
    return model(TOKENS).detach()


def backward(model: Any) -> None:
    model(TOKENS).float().square().sum().backward()


@pytest.mark.parametrize("init", ["zero", "gaussian", "orthogonal", "pissa"])
def test_a_new_adapter_changes_nothing_and_the_same_seed_gives_the_same_one(init: str) -> None:
    plain, model, other = tiny_model(), tiny_model(), tiny_model()
    before = torch.get_rng_state()
    for one in (model, other):
        attach(one, adapter_section("lora", init=init), seed=5)
    torch.testing.assert_close(hidden(model), hidden(plain), rtol=1e-4, atol=1e-5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert torch.equal(before, torch.get_rng_state())


def test_none_leaves_the_model_alone() -> None:
    model = tiny_model()
    attach(model, NoAdapterConfig(kind="none"), seed=0)
    assert not adapted_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    check_gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_is_trained(kind: str) -> None:
    model = tiny_model()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attach(model, adapter_section(kind, targets=["attention"]), seed=0)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    backward(model)
    optimizer.step()
    for name, tensor in base.items():
        now = model.state_dict().get(name, model.state_dict().get(name.replace(".weight", ".base_layer.weight")))
        assert now is not None
        assert torch.equal(tensor, now), name
    counts = count_parameters(model)
    assert 0 < counts.trainable < counts.total
    assert counts.trainable == sum(tensor.numel() for tensor in files.adapter_tensors(model).values())


def test_lora_counts() -> None:
    model = tiny_model()
    total = count_parameters(model).total
    attach(model, adapter_section("lora", rank=4, targets=["attention.output"]), seed=0)
    assert count_parameters(model) == (2 * 4 * (32 + 32), total + 2 * 4 * (32 + 32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["zero", "pissa"])
def test_merged_equals_unmerged(kind: str, init: str) -> None:
    if init == "pissa" and kind != "lora":
        pytest.skip("only LoRA has it")
    model = adapted(kind, **({"init": init} if init == "pissa" else {}))
    names, before = set(tiny_model().state_dict()), hidden(model)
    with torch.no_grad():  # peft's own way through its layers
        without_gradients = hidden(model)
    merge(model)
    assert set(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    for unmerged in (before, without_gradients):
        torch.testing.assert_close(hidden(model), unmerged, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_is_not_finite_is_not_merged() -> None:
    model = adapted("lora")
    next(iter(files.adapter_tensors(model).values())).detach().fill_(float("nan"))
    with pytest.raises(InputError, match=r"layers\.0\.attention\.output|layers\.0\.attention\.qkv"):
        merge(model)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_on_in_training_and_off_in_evaluation(kind: str) -> None:
    model, plain = adapted(kind, dropout=0.5), adapted(kind)
    assert not torch.equal(hidden(model), hidden(model))
    model.eval()
    torch.testing.assert_close(hidden(model), hidden(plain), rtol=1e-5, atol=1e-5)
    model.train()
    backward(model)
    check_gradients(model)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_dropped_rows_are_made_up_for_on_average(kind: str) -> None:
    model = adapted(kind, dropout=0.3, targets=["layers.0.mlp.down"])
    layer: Any = adapted_layers(model)["layers.0.mlp.down"]
    x = torch.randn(2, 48)
    torch.manual_seed(0)
    mean = torch.stack([layer(x).detach() for _ in range(4000)]).mean(0)
    layer.eval()
    torch.testing.assert_close(mean, layer(x).detach(), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_is_the_model_before(kind: str) -> None:
    plain, model = tiny_model(), adapted(kind)
    with_adapter = hidden(model)
    with switched_off(model):
        torch.testing.assert_close(hidden(model), hidden(plain), rtol=1e-6, atol=1e-6)
    assert torch.equal(hidden(model), with_adapter)
    backward(model)
    check_gradients(model)


# ---- targets, learning rates, gradients


def test_targets_by_role_and_by_name() -> None:
    model = tiny_model(num_layers=12)
    assert target_names(model, ("attention",)) == ["attention.output", "attention.qkv"]
    assert target_names(model, ("mlp", "attention.output")) == ["attention.output", "mlp.down", "mlp.gate_up"]
    assert target_names(model, ("all",)) == ["attention.output", "attention.qkv", "mlp.down", "mlp.gate_up"]
    attach(model, adapter_section("lora", targets=["layers.1.mlp.down", "qkv"]), seed=0)
    expected = {"layers.1.mlp.down", *(f"layers.{index}.attention.qkv" for index in range(12))}
    assert set(adapted_layers(model)) == expected


@pytest.mark.parametrize("target", ["attention.outptu", "q_proj", "heads", "embed", "norm", "layers", ""])
def test_a_target_that_matches_nothing_lists_what_there_is(target: str) -> None:
    with pytest.raises(ConfigError, match=r"attention\.output, attention\.qkv, mlp\.down, mlp\.gate_up"):
        attach(tiny_model(tied_embeddings=False), adapter_section("lora", targets=["mlp", target]), seed=0)


@settings(max_examples=50)
@given(st.text(max_size=20))
def test_any_other_target_is_refused(target: str) -> None:
    model = tiny_model(num_layers=1)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    try:
        found = target_names(model, (target,))
    except ConfigError:
        return
    assert found
    assert all(any(f".{name}".endswith(f".{one}") for name in names) for one in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "adapter.rank"),
        ({"rank": 10**22}, "adapter.rank"),
        ({"alpha": 0.0}, "adapter.alpha"),
        ({"dropout": 1.0}, "adapter.dropout"),
        ({"targets": []}, "adapter.targets"),
        ({"init": "pisa"}, "adapter.init"),
        ({"init": "orthogonal", "rank": 3}, "3 is odd"),
        ({"lr_ratio": 0.5}, "adapter.lr_ratio"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter_section("lora", **changes)


def test_lora_plus_speeds_up_the_second_factor() -> None:
    model, config = tiny_model(), adapter_section("lora", lr_ratio=16.0)
    attach(model, config, seed=0)
    factors = learning_rate_factors(model, config)
    assert set(factors.values()) == {16.0}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.replace("lora_B", "lora_A") for name in factors} == trained - set(factors)
    assert learning_rate_factors(model, adapter_section("lora")) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_every_new_adapter_gets_a_gradient_and_one_that_does_not_is_an_error(kind: str) -> None:
    model = tiny_model()
    attach(model, adapter_section(kind), seed=0)
    with pytest.raises(ConfigError, match="8 of 8 adapters got no gradient"):
        check_gradients(model)
    backward(model)
    check_gradients(model)
    for parameter in adapted_layers(model)["layers.1.mlp.down"].parameters():
        parameter.grad = None
    with pytest.raises(ConfigError, match=r"1 of 8 .* layers\.1\.mlp\.down"):
        check_gradients(model)


# ---- files


@pytest.mark.parametrize("kind", KINDS)
def test_peft_itself_loads_what_is_saved(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    folder = save(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_model(), str(folder))
    torch.testing.assert_close(loaded.eval()(TOKENS), hidden(model), rtol=1e-5, atol=1e-5)


def test_peft_itself_loads_pissa(tmp_path: Path) -> None:
    model = adapted("lora", init="pissa")
    folder = save(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(tiny_model(), str(folder))
    torch.testing.assert_close(loaded.eval()(TOKENS), hidden(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_loaded_and_merged(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    theirs = peft.get_peft_model(tiny_model(), copy.deepcopy(model.peft_config["default"]))
    perturb(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    files.load_adapter(tmp_path / "theirs", model)
    expected = theirs(TOKENS).detach()
    torch.testing.assert_close(hidden(model), expected, rtol=1e-5, atol=1e-5)
    plain = tiny_model()
    files.attach_saved_adapter(tmp_path / "theirs", plain, "weights of seed 0")
    merge(plain)
    torch.testing.assert_close(hidden(plain), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "init"), [*((kind, None) for kind in KINDS), ("lora", "pissa")])
def test_going_on_from_an_adapter(kind: str, init: str | None, tmp_path: Path) -> None:
    changes = {"init": init} if init else {}
    model = adapted(kind, **changes)
    folder = save(model, tmp_path / "adapter")
    other = tiny_model()
    attach(other, adapter_section(kind, **changes), seed=99, base="weights of seed 0")
    files.load_adapter(folder, other)
    assert torch.equal(hidden(other), hidden(model))


def test_an_adapter_for_another_model_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    folder = save(adapted("lora"), tmp_path / "adapter")
    wider = tiny_model(mlp_dim=64)
    attach(wider, adapter_section("lora"), seed=0)
    before = {name: tensor.clone() for name, tensor in wider.state_dict().items()}
    with pytest.raises(InputError, match="other weights"):
        files.load_adapter(folder, wider)
    _forget_base(folder)
    with pytest.raises(InputError, match="made for another model"):
        files.load_adapter(folder, wider)
    for name, tensor in wider.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(InputError, match="made for another model"):
        files.attach_saved_adapter(folder, tiny_model(mlp_dim=64))
    with pytest.raises(InputError, match="made for another model"):
        files.attach_saved_adapter(folder, nn.Sequential(nn.Linear(3, 3)))


def test_an_adapter_for_other_weights_of_the_same_shape_is_refused(tmp_path: Path) -> None:
    folder = save(adapted("lora"), tmp_path / "adapter")
    with pytest.raises(InputError, match="trained on other weights"):
        files.load_adapter(folder, adapted("lora", model_seed=1))
    with pytest.raises(InputError, match="trained on other weights"):
        files.attach_saved_adapter(folder, tiny_model(1), "weights of seed 1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, "has r = 4"),
        ({"alpha": 12.0}, "has lora_alpha = 6"),
        ({"rslora": True}, "has use_rslora = False"),
        ({"init": "pissa"}, "has init_lora_weights = True"),
        ({"kind": "dora"}, "has use_dora = False"),
        ({"kind": "loha"}, "has peft_type = LORA"),
        ({"targets": ["mlp"]}, "other targets"),
    ],
)
def test_an_adapter_of_another_form_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save(adapted("lora"), tmp_path / "adapter")
    model = adapted(**{"kind": "lora", **changes})
    with pytest.raises(InputError, match=message):
        files.load_adapter(folder, model)


def test_folders_without_a_whole_adapter_are_refused(tmp_path: Path) -> None:
    model = adapted("lora")
    folder = save(model, tmp_path / "adapter")
    base = "weights of seed 0"
    for load in (
        lambda one: files.load_adapter(one, model),
        lambda one: files.attach_saved_adapter(one, tiny_model(), base),
    ):
        with pytest.raises(InputError, match="holds no adapter"):
            load(tmp_path / "nowhere")
        for name, content in ((ADAPTER_WEIGHTS, b"\x00" * 20), (ADAPTER_CONFIG, b"{"), (ADAPTER_CONFIG, b"[]")):
            broken = tmp_path / "broken"
            shutil.copytree(folder, broken)
            (broken / name).write_bytes(content)
            with pytest.raises(InputError, match=name.replace(".", r"\.")):
                load(broken)
            shutil.rmtree(broken)


def _forget_base(folder: Path) -> None:
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "revision": None}))
