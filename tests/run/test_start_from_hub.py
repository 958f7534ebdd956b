"""stage.init_from names a model on the hub: in separate processes, because the libraries read HF_ENDPOINT on import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fake_hub import SHA, serve
from hub_models import reference
from start_runs import save_with_tokenizer, write_run

from pretune.data.tokenizer import train_byte_level

MAIN = Path(__file__).parents[2] / "src" / "main.py"
CLOSED = "http://127.0.0.1:9"
KEYS = """\
stage: {init_from: me/llama}
budget: {steps: 1}
batch: {tokens: 128, micro_batch: 2}
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("llama")
    backend = train_byte_level(iter(["the cat and the dog"] * 9), 300, True)
    save_with_tokenizer(reference("llama", vocab_size=320), folder, backend)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = {"README.md": b"# A model", "pytorch_model.bin": b"0" * 999, "consolidated.safetensors": b"0" * 999}
    pickled = {"config.json": files["config.json"], "pytorch_model.bin": b"0"}
    bare = {name: content for name, content in files.items() if name != "model.safetensors"}
    models = {"me/llama": files | others, "me/pickled": pickled, "me/bare": bare, "me/none": {"README.md": b"# None"}}
    with serve({f"models/{name}": content for name, content in models.items()}) as endpoint:
        yield endpoint


def pretune(endpoint: str, folder: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    write_run(folder / "run.yaml", "texts.jsonl", KEYS)
    texts = (f"the cat and the dog and the house number {number}" for number in range(40))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, str(MAIN), "--config", "run.yaml", *overrides],
        env=inherited | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf")} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def downloaded(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("hf/hub/models--*/snapshots/*/*")}


def test_it_is_downloaded_once_and_the_run_says_which_commit(hub: str, tmp_path: Path) -> None:
    done = pretune(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"from me/llama@{SHA}" in done.stdout
    saved = yaml.safe_load((tmp_path / "runs/tuned/config.yaml").read_text())
    assert (saved["stage"]["init_from"], saved["model"]["dim"]) == (f"me/llama@{SHA}", 32)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= downloaded(tmp_path)
    assert not {"README.md", "pytorch_model.bin", "consolidated.safetensors"} & downloaded(tmp_path)
    # The same start without a network.
    again = pretune(CLOSED, tmp_path, "name=again", "adapter=lora", "adapter.rank=2")
    assert again.returncode == 0, again.stderr
    assert "note: cannot reach the hub" in again.stderr
    assert f"taking me/llama as it is in the Hugging Face cache, {SHA[:7]}" in again.stderr


@pytest.mark.slow
def test_a_commit_is_taken_from_the_cache_and_named_in_an_adapter(hub: str, tmp_path: Path) -> None:
    assert pretune(hub, tmp_path, "adapter=lora", "adapter.rank=2").returncode == 0
    assert "is complete" in pretune(CLOSED, tmp_path, "adapter=lora", "adapter.rank=2").stdout
    pinned = pretune(CLOSED, tmp_path, "name=pinned", f"stage.init_from=me/llama@{SHA}", "task=prepare")
    assert (pinned.returncode, "hub" in pinned.stderr) == (0, False), pinned.stderr
    assert pretune(CLOSED, tmp_path, "name=offline", "task=prepare", HF_HUB_OFFLINE="1").returncode == 0
    # An adapter needs the weights below it, wherever it is measured and exported.
    config = "runs/tuned/config.yaml"
    exported = [sys.executable, str(MAIN), "--config", config, "task=export", "export.adapter=keep"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(exported, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (about,) = tmp_path.glob("runs/tuned/export/*/adapter_config.json")
    kept = json.loads(about.read_text())
    assert (kept["base_model_name_or_path"], kept["revision"]) == ("me/llama", SHA)


def test_a_plan_downloads_the_configuration_only(hub: str, tmp_path: Path) -> None:
    done = pretune(hub, tmp_path, "task=plan")
    assert done.returncode == 0, done.stderr
    assert downloaded(tmp_path) == {"config.json"}


@pytest.mark.parametrize(
    ("start", "offline", "expected"),
    [
        ("me/nothing", False, "the hub has no model 'me/nothing'"),
        ("me/pickled", False, "'me/pickled' has its weights only in pytorch_model.bin, a pickle"),
        ("me/bare", False, "has no weights: neither model.safetensors"),
        ("me/none", False, "'me/none' has no config.json"),
        ("me/llama", True, "HF_HUB_OFFLINE is set, and the Hugging Face cache has no me/llama"),
        ("runs/tuned", True, "no run 'runs/tuned'"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(
    start: str, offline: bool, expected: str, hub: str, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    done = pretune(hub, tmp_path, f"stage.init_from={start}", **({"HF_HUB_OFFLINE": "1"} if offline else {}))
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "runs").iterdir())


def test_without_a_network_and_without_a_copy(tmp_path: Path) -> None:
    done = pretune(CLOSED, tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith(f"error: cannot reach the hub at {CLOSED} for model 'me/llama'")
