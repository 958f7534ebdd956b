"""Fixtures shared by all tests."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from pretune.launch import compose
from pretune.launch.groups import CONFIGS, is_group
from pretune.launch.model_of_start import filled, nano

ROOT = Path(__file__).parent.parent

# No test asserts a time: on a busy machine an example may take seconds.
hypothesis.settings.register_profile("pretune", deadline=None)
hypothesis.settings.load_profile("pretune")

# Set before any test imports wandb or a Hugging Face library: the suite never touches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# Tests run in parallel, one thread each: several threads that wait for each other's cores are slower than one.
os.environ["OMP_NUM_THREADS"] = "1"
# Compiled code is kept between test sessions, although each test has its own data cache. torch 2.13's cache keys do not
# include the instruction set that code was compiled for, so code for a restricted CPU (ATEN_CPU_CAPABILITY=avx2) needs
# a separate folder.
kept = f"pretune-tests-compiled-{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / kept))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a GPU where there is none, or an older one."""
    wanted = [marker.kwargs.get("capability", (0, 0)) for marker in item.iter_markers("gpu")]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    found = torch.cuda.get_device_capability()
    if found < max(wanted):
        needs = "needs compute capability {}.{}, this GPU has {}.{}"
        pytest.skip(needs.format(*max(wanted), *found))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data that is not part of the repository; tests that need it are skipped if it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; the other tests do not need it")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own data cache, so that none passes because of what another one left."""
    monkeypatch.setenv("PRETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def composed() -> Callable[..., dict[str, Any]]:
    """`composed(name, *overrides)`: the plain mapping that the command line passes on for a run file, or any other;
    nano is what `model=auto` stands for, because a start need not be there."""

    def compose_run(name: str | Path, *overrides: str) -> dict[str, Any]:
        file = name if isinstance(name, Path) else CONFIGS / "run" / f"{name}.yaml"
        groups = tuple(override for override in overrides if is_group(override.partition("=")[0]))
        values = OverridesParser.create().parse_overrides([one for one in overrides if one not in groups])
        config = copy.deepcopy(_chosen(file, groups))
        try:
            ConfigLoaderImpl._apply_overrides_to_config(values, config)
        except Exception:  # Hydra's own way explains it
            with compose.composed(file, overrides) as config:
                pass
        return compose.plain(filled(config, nano()), file)

    return compose_run


@functools.cache
def _chosen(file: Path, groups: tuple[str, ...]) -> DictConfig:
    """A run file with these options of groups. Hydra takes half a second to compose it, and so many tests share it."""
    with compose.composed(file, groups) as config:
        return config


@pytest.fixture
def power_cut() -> Callable[..., None]:
    """`power_cut(mapping, 14)`: trains until the power goes in the fourteenth step. Nothing that the run does catches
    it, and it is an error if it does not come. A third argument is called as `Instruments.on_begin` is."""
    from pretune.dispatch import run
    from pretune.optim.budget import Step
    from pretune.tasks.train.running import Instruments, Run

    class Killed(Exception):
        """Simulates a power cut."""

    def train_until(mapping: dict[str, Any], step: int, on_begin: Any = lambda training, what: None) -> None:
        steps = 0

        def cut(training: Run, what: object) -> None:
            nonlocal steps
            on_begin(training, what)
            steps += isinstance(what, Step)
            if steps == step:
                raise Killed

        with pytest.raises(Killed):
            run(mapping, Instruments(on_begin=cut))

    return train_until


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`benchmark(name)`: the module of a benchmark."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def determinism_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After the test, what the key `deterministic` sets for a whole process is as it was."""
    import torch

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A file of 60 short documents, one line of JSON each."""
    rng = random.Random(5)
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "house",
        "red",
        "blue",
        "runs",
        "sees",
        "eats",
        "under",
        "over",
        "quickly",
        "and",
        "then",
        "it",
        "was",
        "there",
    ]
    path = tmp_path / "texts.jsonl"
    documents = (" ".join(rng.choices(words, k=rng.randint(20, 80))) for _ in range(60))
    path.write_text("".join(json.dumps({"text": text.capitalize() + "."}) + "\n" for text in documents))
    return path


@pytest.fixture
def tiny(composed: Callable[..., dict[str, Any]], texts: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`tiny(*overrides)`: a run that trains in a second or two, on `texts`, into its own folder.

    It computes in float32, whose results agree to 1e-6 on any CPU. bfloat16 rounds differently on different CPUs, and
    without instructions for it takes many times as long. A test about bfloat16 sets `precision=bf16`. It writes no
    report at its end, which takes as long as the training.
    """

    def compose_tiny(*overrides: str) -> dict[str, Any]:
        return composed(
            "smoke",
            "precision=fp32",
            "data=files",
            f"data.source.files=[{texts}]",
            "data.validation.fraction=0.2",
            "data.sequence_length=32",
            "data.num_workers=1",
            "model.vocab_size=320",
            "data.tokenizer.vocab_size=300",
            "batch.tokens=256",
            "model.dim=32",
            "model.mlp_dim=48",
            "model.head_dim=16",
            f"output_dir={tmp_path / 'runs'}",
            "report.after_training=false",
            *overrides,
        )

    return compose_tiny
