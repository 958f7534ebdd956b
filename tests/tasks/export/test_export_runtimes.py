"""A run exported for another runtime, from the command to the text it generates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretune.core.config import ConfigError, InputError, validate
from pretune.dispatch import run
from pretune.run.config import RunConfig
from pretune.run.folder import find_run
from pretune.run.model import merged_model
from pretune.run.tokenizer import assemble_tokenizer

Compose = Callable[..., dict[str, Any]]
RUN = ("name=one", "budget.steps=12", "optimizer.lr=1e-2", "precision=fp32", "model.num_layers=1")
SHAPE = ("model.dim=64", "model.mlp_dim=64", "model.head_dim=16", "model.max_sequence_length=128")
ROUNDED = ("quantization=int8_int4", "quantization.group_size=32")
GREEDY = ("task=generate", "generate.temperature=0", "generate.max_new_tokens=64")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run is kept that the first test trains."""
    return tmp_path_factory.mktemp("trained") / "one"


@pytest.fixture
def settings(tiny: Compose, trained: Path, tmp_path: Path) -> Compose:
    """`settings(*overrides)` of a trained run."""

    def compose(*overrides: str) -> dict[str, Any]:
        return tiny(*RUN, *SHAPE, *overrides)

    folder = tmp_path / "runs" / "one"
    if trained.exists():
        shutil.copytree(trained, folder)
    else:
        assert run(compose()) == 0
        shutil.copytree(folder, trained)
    return compose


def printed(mapping: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(mapping) == 0
    return capsys.readouterr().out


def test_a_run_goes_to_the_phone(settings: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("executorch", reason="executorch is not installed (req-phone.txt)")
    said = printed(settings(*ROUNDED, "task=export", "export.format=executorch"), capsys)
    exports = tmp_path / "runs" / "one" / "export"
    folder = exports / "executorch-int8_int4-step_00000012"
    assert f"generate.runtime=executorch 'generate.export={folder}'" in said
    assert {path.name for path in folder.iterdir()} >= {"model.pte", "pretune.json", "tokenizer.json"}
    manifest = json.loads((folder / "pretune.json").read_text())
    assert manifest["quantization"] == "int8_int4"
    assert manifest["context"] == 128
    assert 0 <= manifest["largest_difference"] < 0.05

    ours = printed(settings(*ROUNDED, *GREEDY, "generate.prompt=The cat"), capsys)
    phone = (*GREEDY, "generate.runtime=executorch")
    assert printed(settings(*phone, "generate.prompt=The cat"), capsys) == ours
    plain = printed(settings(*GREEDY, "generate.prompt=The cat"), capsys)
    assert len(plain) > len("The cat\n")
    sampled = [*phone, "generate.temperature=1.0", "generate.prompt=The cat", "generate.seed=3"]
    assert printed(settings(*sampled), capsys) == printed(settings(*sampled), capsys)
    (tmp_path / "prompts.txt").write_text("The cat\nA dog and a house\n")
    printed(settings(*phone, f"generate.file={tmp_path}/prompts.txt", f"generate.output={tmp_path}/out.jsonl"), capsys)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "The cat" + rows[0]["text"] + "\n" == ours
    with pytest.raises(InputError, match="but the model has room for 128"):
        run(settings(*phone, f"generate.prompt={'The cat ' * 100}"))

    copy = exports / "copied"
    shutil.copytree(folder, copy)
    (copy / "model.pte").write_bytes((copy / "model.pte").read_bytes()[:-100])
    with pytest.raises(InputError, match=r"is not the file that pretune\.json beside it describes"):
        run(settings(*phone, f"generate.export={copy}", "generate.prompt=x"))
    other = settings("name=two", "data.tokenizer.vocab_size=290", "budget.steps=1")
    run(other)
    with pytest.raises(InputError, match="was exported with a different tokenizer"):
        run(other | {"task": "generate", "generate": settings(*phone, "generate.prompt=x")["generate"] | {
            "export": str(folder)}})  # fmt: skip
    _the_runner_of_the_apps_reads_it(folder, ours)


def _the_runner_of_the_apps_reads_it(folder: Path, text: str) -> None:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    pieces: list[str] = []
    runner.generate("The cat", GenerationConfig(max_new_tokens=20, temperature=0.0, echo=False), pieces.append)
    written = "".join(pieces)
    assert len(written) > 10
    assert text.removeprefix("The cat").startswith(written)


def test_onnx(settings: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (req-phone.txt)")
    said = printed(settings("task=export", "export.format=onnx"), capsys)
    folder = tmp_path / "runs" / "one" / "export" / "onnx-step_00000012"
    assert f"onnxruntime.InferenceSession('{folder}/model.onnx')" in said
    config = validate(RunConfig, settings())
    size = assemble_tokenizer(config).vocab_size
    model = merged_model(config, find_run("one", config.output_dir), torch.device("cpu")).eval()
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for shape in ((1, 1), (3, 17), (1, 128)):
        tokens = torch.randint(0, size, shape, generator=torch.Generator().manual_seed(shape[1]))
        with torch.no_grad():
            expected = model.unembed(model(tokens))[..., :size]
        (found,) = session.run(None, {"tokens": tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("export.adapter=keep",), "holds a whole model: set adapter to merge"),
        (("export.dtype=bfloat16",), "computes in float32: set dtype to float32"),
        (("export.context=200",), r"export\.context \(200\) exceeds the model"),
        (("export.format=onnx", "quantization=int8_int4", "quantization.group_size=32"), "quantization=none for ONNX"),
        (("quantization=int8_weight_only",), "no kernel for"),
    ],
)
def test_what_is_refused(changes: tuple[str, ...], message: str, settings: Compose, tmp_path: Path) -> None:
    for package in ("executorch", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (req-phone.txt)")
    with pytest.raises(ConfigError, match=message):
        run(settings("task=export", "export.format=executorch", *changes))
    assert not list((tmp_path / "runs" / "one").glob("export/*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("generate.num_beams=2", "generate.temperature=0"), "set num_beams to 1"),
        (("generate.compile=true",), "set compile to false"),
        (("generate.runtime=pretune", "generate.export=x"), "set runtime to executorch"),
        (("generate.export=nowhere",), r"nowhere holds no model\.pte"),
        ((), r"has no \.pte yet; export one: python src/main\.py"),
    ],
)
def test_what_cannot_be_run(changes: tuple[str, ...], message: str, settings: Compose) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        run(settings("task=generate", "generate.runtime=executorch", "generate.prompt=x", *changes))


def test_what_is_not_installed_is_named(settings: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for form in ("executorch", "onnx"):
        with pytest.raises(ConfigError, match=r"pip install -r req-phone\.txt"):
            run(settings("task=export", f"export.format={form}"))
