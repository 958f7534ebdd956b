"""Checkpoints: resuming bit for bit, and every way in which a checkpoint can be invalid."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged import cut, flip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optimizer_sections import EVERY_OPTIMIZER, NAMES, adamw, lion, muon
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pretune.checkpoint import store as checkpoint
from pretune.checkpoint.generators import generator_states, set_generator_states
from pretune.core.config import InputError
from pretune.optim.config import OptimizerConfig
from pretune.optim.optimizers import build_optimizer

ADAMW, LION, MUON = adamw(), lion(), muon()
every_optimizer = pytest.mark.parametrize("config", EVERY_OPTIMIZER, ids=NAMES)


class Model(nn.Module):
    """Dropout, a tied head, a buffer, and a parameter that never gets a gradient."""

    def __init__(self, seed: int = 1, dim: int = 8, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(16, dim)
        self.layers = nn.ModuleList([nn.Linear(dim, dim) for _ in range(2)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 16, bias=False)
        self.unused = nn.Parameter(torch.zeros(3))
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64))
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        self.counter += 1
        x = nn.functional.dropout(self.embedding(tokens), 0.3, self.training)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(self.norm(x))


def train(model: nn.Module, optimizer: Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        tokens = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            parts = getattr(value, "tensor_attrs", [])  # of 8-bit state
            tensors |= {f"{index}.{slot}.{part}": getattr(value, part).clone() for part in parts}
            tensors |= {} if parts else {f"{index}.{slot}": value.clone()}
    return tensors | {"random": torch.get_rng_state()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def saved(folder: Path, step: int = 3, config: OptimizerConfig = ADAMW, **settings: Any) -> Path:
    model = Model()
    optimizer = build_optimizer(config, model)
    train(model, optimizer, 0, 1)
    return checkpoint.save(folder, step, model, optimizer, {"step": step}, **{"keep": None, **settings})


def fresh(config: OptimizerConfig = ADAMW) -> tuple[Model, Optimizer]:
    model = Model(seed=2)
    return model, build_optimizer(config, model)


@every_optimizer
def test_ten_steps_and_ten_resumed_are_twenty(config: OptimizerConfig, tmp_path: Path):
    dim = 64 if config.kind == "adamw_8bit" else 8  # the smallest parameter that it keeps in 8 bits has 4,096 weights
    model = Model(dim=dim)
    optimizer = build_optimizer(config, model)
    torch.manual_seed(7)
    train(model, optimizer, 0, 10)
    state = {"seconds": 0.1 + 0.2, "best": float("inf"), "trace": [1e-300, 1 / 3]}
    path = checkpoint.save(tmp_path, 10, model, optimizer, state, keep=2)
    train(model, optimizer, 10, 20)
    uninterrupted = everything(model, optimizer)

    torch.manual_seed(99)
    model = Model(seed=2, dim=dim)
    optimizer = build_optimizer(config, model)
    assert checkpoint.load(path, model, optimizer) == state
    assert ("layers.0.weight.exp_avg:codes" in load_file(path / "optimizer.safetensors")) == (dim == 64)
    train(model, optimizer, 10, 20)
    assert equal(everything(model, optimizer), uninterrupted)
    assert model.head.weight is model.embedding.weight


def test_the_generators_of_an_earlier_moment_can_be_saved(tmp_path: Path):
    """A run stopped in the middle of a step returns to the beginning of the step."""
    model, optimizer = fresh()
    random = generator_states(model)
    expected = torch.rand(3)
    path = checkpoint.save(tmp_path, 1, model, optimizer, {}, keep=None, random=random)
    checkpoint.load(path, model, optimizer)
    assert torch.equal(torch.rand(3), expected)
    set_generator_states(model, random)
    assert torch.equal(torch.rand(3), expected)


def test_loading_for_evaluation_leaves_the_generators_alone(tmp_path: Path):
    path = saved(tmp_path)
    model, _ = fresh()
    before = torch.get_rng_state()
    assert checkpoint.load(path, model, None) == {"step": 3}
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.embedding.weight, load_file(path / "model.safetensors")["embedding.weight"])


def test_files_hold_plain_names_once_and_no_pickle(tmp_path: Path):
    model = torch.compile(Model(), backend="eager")
    assert isinstance(model, nn.Module)
    optimizer = build_optimizer(ADAMW, model)
    train(model, optimizer, 0, 1)
    path = checkpoint.save(tmp_path, 1234, model, optimizer, {}, keep=None)
    assert path.name == "step_00001234"
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    weights = load_file(path / "model.safetensors")
    assert "embedding.weight" in weights
    assert "head.weight" not in weights
    slots = load_file(path / "optimizer.safetensors")
    assert {"layers.0.bias.step", "layers.0.bias.exp_avg", "layers.0.bias.exp_avg_sq", "random:cpu"} <= slots.keys()
    assert not any("_orig_mod" in name for name in [*weights, *slots])
    plain, plain_optimizer = fresh()
    checkpoint.load(path, plain, plain_optimizer)
    train(model, optimizer, 1, 2)
    checkpoint.load(path, plain, plain_optimizer)
    train(plain, plain_optimizer, 1, 2)
    assert torch.equal(plain.embedding.weight, model.get_parameter("_orig_mod.embedding.weight"))


def test_newest_is_by_number_and_only_of_what_is_complete(tmp_path: Path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None
    for step in (9500, 10000, 200):
        saved(tmp_path, step)
    assert checkpoint.newest(tmp_path) == tmp_path / "step_00010000"
    (tmp_path / "step_00020000").mkdir()  # nothing in it
    shutil.copytree(tmp_path / "step_00010000", tmp_path / ".step_00030000.x.tmp")
    shutil.copytree(tmp_path / "step_00010000", tmp_path / "step_00040000_copy")
    (tmp_path / "step_00050000").write_text("a file")
    assert checkpoint.newest(tmp_path) == tmp_path / "step_00010000"
    saved(tmp_path, 123_456_789)  # wider than its padding
    assert checkpoint.newest(tmp_path) == tmp_path / "step_123456789"
    assert checkpoint.step_of(tmp_path / "step_123456789") == 123_456_789


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in folder.iterdir())


def test_keep_deletes_the_oldest_and_neither_the_newest_nor_the_best(tmp_path: Path):
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.0), (4, float("nan")), (5, None)):
        saved(tmp_path, step, keep=2, loss=loss)
    assert steps(tmp_path) == [2, 4, 5]
    saved(tmp_path, 6, keep=1, loss=0.5)
    assert steps(tmp_path) == [6]
    saved(tmp_path, 7, keep=1, loss=0.6)
    assert steps(tmp_path) == [6, 7]
    saved(tmp_path, 2, keep=1)  # a run started from scratch beside an old run's checkpoints
    assert steps(tmp_path) == [2, 6]


def test_which_one_is_used(tmp_path: Path):
    assert checkpoint.pick(tmp_path, "best") is None
    for step, loss in ((1, None), (2, None)):
        saved(tmp_path, step, loss=loss)
    assert checkpoint.pick(tmp_path, "best") == tmp_path / "step_00000002"
    for step, loss in ((3, 1.5), (4, 1.0), (5, 1.0), (6, 1.2)):
        saved(tmp_path, step, loss=loss)
    for use, step in (("best", 4), ("newest", 6), (3, 3)):
        assert checkpoint.pick(tmp_path, use) == tmp_path / f"step_{step:08d}"
    with pytest.raises(InputError, match=r"no checkpoint of step 7; set checkpoint.use to best, newest or 6, 5, 4"):
        checkpoint.pick(tmp_path, 7)


def test_a_damaged_checkpoint_is_not_passed_over_in_silence_but_does_not_hinder_saving(tmp_path: Path):
    saved(tmp_path, 1, loss=0.1)
    cut(tmp_path / "step_00000001" / "state.json", 3)
    saved(tmp_path, 2, loss=0.2, keep=2)
    with pytest.raises(InputError, match=r"step_00000001/state.json is damaged"):
        checkpoint.pick(tmp_path, "best")
    assert checkpoint.pick(tmp_path, "newest") == tmp_path / "step_00000002"


def test_averages_are_what_is_used_and_the_raw_weights_are_what_goes_on(tmp_path: Path):
    model, optimizer = fresh()
    twin = Model(seed=7)
    train(model, optimizer, 0, 3)
    path = checkpoint.save(tmp_path, 3, model, optimizer, {}, keep=None, averaged=twin)
    used = Model(seed=8)
    checkpoint.load_weights(path, used)
    assert equal(dict(used.state_dict()), dict(twin.state_dict()))
    resumed, its_twin = Model(seed=9), Model(seed=10)
    its_optimizer = build_optimizer(ADAMW, resumed)
    checkpoint.load(path, resumed, its_optimizer, averaged=its_twin)
    assert equal(dict(its_twin.state_dict()), dict(twin.state_dict()))
    for name, buffer in model.named_buffers():  # shared by the two models of one run
        resumed.get_buffer(name).copy_(buffer)
    assert equal(everything(resumed, its_optimizer), everything(model, optimizer))


def test_what_a_killed_save_left_is_cleared_away(tmp_path: Path):
    (tmp_path / ".step_00000001.abc.tmp").mkdir(parents=True)
    (tmp_path / ".step_00000001.abc.tmp" / "model.safetensors").write_text("half")
    saved(tmp_path)
    assert os.listdir(tmp_path) == ["step_00000003"]


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    saved(tmp_path)
    model, optimizer = fresh()
    path = checkpoint.save(tmp_path, 3, model, optimizer, {"anew": True}, keep=None)
    other, _ = fresh()
    assert checkpoint.load(path, other, None) == {"anew": True}
    assert os.listdir(tmp_path) == ["step_00000003"]


def test_a_replacement_that_fails_at_the_last_moment_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = saved(tmp_path)

    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if target == path and "replaced" not in source.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    model, optimizer = fresh()
    with pytest.raises(InputError, match="No space left on device; free some space"):
        checkpoint.save(tmp_path, 3, model, optimizer, {"anew": True}, keep=None)
    assert checkpoint.load(path, model, optimizer) == {"step": 3}
    assert os.listdir(tmp_path) == ["step_00000003"]


# --- bad input


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize(
    "damage", [partial(cut, count=3), partial(flip, at=-2), empty, Path.unlink], ids=["cut", "flip", "empty", "gone"]
)
def test_damage_is_named_and_loads_nothing(name: str, damage: Callable[[Path], None], tmp_path: Path):
    path = saved(tmp_path)
    damage(path / name)
    model, optimizer = fresh()
    before = everything(model, optimizer)
    with pytest.raises(InputError, match=str(path)) as error:
        checkpoint.load(path, model, optimizer)
    assert "\n" not in str(error.value)
    assert equal(everything(model, optimizer), before)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_byte_is_noticed(tmp_path: Path, data: st.DataObject):
    path = tmp_path / "step_00000003"
    if not path.exists():
        saved(tmp_path)
    file = path / data.draw(st.sampled_from(["model.safetensors", "optimizer.safetensors", "state.json"]))
    whole = file.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.integers(1, 255))
    file.write_bytes(whole[:position] + bytes([whole[position] ^ change]) + whole[position + 1 :])
    model, optimizer = fresh()
    try:
        # Only white space in the JSON file may change.
        assert checkpoint.load(path, model, optimizer) == {"step": 3}
        assert json.loads(file.read_text()) == json.loads(whole)
    except InputError:
        pass
    finally:
        file.write_bytes(whole)


def test_a_model_of_another_shape_is_refused_with_the_tensors_that_differ(tmp_path: Path):
    path = saved(tmp_path)
    model = Model(dim=12)
    message = r"embedding.weight is \[16, 8\], in the model \[16, 12\]; .*\(and 4 more\)"
    for load in (lambda: checkpoint.load(path, model, None), lambda: checkpoint.load_weights(path, model)):
        with pytest.raises(InputError, match=message):
            load()


def test_tied_and_untied_do_not_fit_each_other(tmp_path: Path):
    path = saved(tmp_path)
    with pytest.raises(InputError, match=r"head.weight is missing"):
        checkpoint.load_weights(path, Model(tied=False))
    untied = Model(tied=False)
    path = checkpoint.save(tmp_path, 9, untied, build_optimizer(ADAMW, untied), {}, keep=None)
    with pytest.raises(InputError, match=r"head.weight is in the file but not in the model"):
        checkpoint.load_weights(path, Model())


def test_optimizer_state_of_another_kind_or_of_other_parameters_is_refused(tmp_path: Path):
    path = saved(tmp_path)
    model, optimizer = fresh(LION)
    before = everything(model, optimizer)
    with pytest.raises(InputError, match="holds the state of AdamW, but this run's optimizer is Lion"):
        checkpoint.load(path, model, optimizer)
    model.embedding.requires_grad_(False)
    with pytest.raises(InputError, match=r"embedding.weight was trained then but is not now"):
        checkpoint.load(path, model, build_optimizer(ADAMW, model))
    assert equal(everything(model, optimizer), before)


def test_weights_alone_come_from_a_checkpoint_a_folder_of_them_or_a_file(tmp_path: Path):
    path = saved(tmp_path / "checkpoints")
    saved(tmp_path / "checkpoints", 1)
    expected = load_file(path / "model.safetensors")["embedding.weight"]
    for source in (path, tmp_path / "checkpoints", path / "model.safetensors"):
        model = Model(seed=5)
        checkpoint.load_weights(source, model)
        assert torch.equal(model.embedding.weight, expected)


def test_weights_of_another_precision_are_converted(tmp_path: Path):
    weights = load_file(saved(tmp_path) / "model.safetensors")
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}, tmp_path / "half.safetensors")
    model = Model(seed=5)
    checkpoint.load_weights(tmp_path / "half.safetensors", model)
    assert model.embedding.weight.dtype == torch.float32
    torch.testing.assert_close(model.embedding.weight, weights["embedding.weight"], rtol=1e-2, atol=0)


def test_weights_that_are_not_there_or_unreadable(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("not weights")
    for name, message in [
        ("empty", "holds no checkpoint"),
        ("absent", "cannot read"),
        ("text.safetensors", "cannot read"),
    ]:
        with pytest.raises(InputError, match=message):
            checkpoint.load_weights(tmp_path / name, Model())


def test_a_checkpoint_without_its_weights_says_so_and_what_to_delete(tmp_path: Path):
    path = saved(tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot read .*model\.safetensors .*; choose another with"):
        checkpoint.load_weights(path, Model())


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot save a checkpoint in .*: Not a directory; free some space or fix"):
        saved(tmp_path / "file" / "checkpoints")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_says_so(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied; free some space or fix its permissions"):
        saved(tmp_path)


def save_with_little_room(folder: str) -> None:
    """Run in a separate process: files may grow to 64 bytes less than the optimizer needs."""
    path = saved(Path(folder), 1)
    room = (path / "optimizer.safetensors").stat().st_size - 64
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    for step in (1, 2):
        try:
            saved(Path(folder), step, keep=1)
        except InputError as error:
            print(error)


def test_a_full_disk_says_so_and_leaves_the_older_ones(tmp_path: Path):
    code = f"import test_store as t; t.save_with_little_room({str(tmp_path)!r})"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.stdout.count("File too large; free some space") == 2, done
    assert os.listdir(tmp_path) == ["step_00000001"]
    model, optimizer = fresh()
    assert checkpoint.load(tmp_path / "step_00000001", model, optimizer) == {"step": 1}
