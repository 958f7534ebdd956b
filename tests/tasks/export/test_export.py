"""Exported runs: transformers and peft load them and compute what the run computes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from pretune.core.config import ConfigError, InputError, validate
from pretune.dispatch import run
from pretune.run.config import RunConfig
from pretune.run.folder import find_run
from pretune.run.model import merged_model
from pretune.run.tokenizer import assemble_tokenizer
from pretune.training.signals import EXIT_STOPPED

Compose = Callable[..., dict[str, Any]]
BASE = ("name=base", "budget.steps=4")
TUNE = ("stage=finetune", "stage.init_from=base", "budget.steps=4", "adapter.rank=2", "optimizer.lr=2e-2")
TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))


def own_logits(mapping: dict[str, Any]) -> torch.Tensor:
    """The output of a run's newest weights."""
    config = validate(RunConfig, mapping)
    model = merged_model(config, find_run(config.name, config.output_dir), torch.device("cpu")).eval()
    with torch.no_grad():
        return model.unembed(model(TOKENS))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_is_exported_with_its_tokenizer(
    tied: bool, tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*BASE, f"model.tied_embeddings={str(tied).lower()}")
    run(tiny(*settings))
    run(tiny(*settings, "task=export"))
    folder = tmp_path / "runs" / "base" / "export" / "huggingface-step_00000004"
    assert f"AutoModelForCausalLM.from_pretrained('{folder}')" in capsys.readouterr().out
    wanted = own_logits(tiny(*settings))
    torch.testing.assert_close(logits(load(folder)), wanted, rtol=1e-5, atol=1e-5)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    ours = assemble_tokenizer(validate(RunConfig, tiny(*settings)))
    text = "The cat sees 12 red houses.\n"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert tokenizer.eos_token_id == ours.eos_id
    with pytest.raises(InputError, match="exists already"):
        run(tiny(*settings, "task=export"))
    other = tmp_path / "elsewhere"
    run(tiny(*settings, "task=export", f"export.output={other}", "export.dtype=bfloat16"))
    assert load(other).dtype == torch.bfloat16
    torch.testing.assert_close(logits(load(other)).float(), wanted, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_an_adapter_is_merged_or_kept(
    kind: str, tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    run(tiny(*BASE))
    run(tiny(*BASE, "task=export", f"export.output={tmp_path / 'base'}"))
    # A Kronecker product is kept only if our layer is also one layer in transformers.
    targets = ["adapter.targets=[output,down]"] if kind == "lokr" else []
    settings = ("name=tuned", *TUNE, f"adapter={kind}", *targets, "task=export")
    run(tiny(*settings, "task=train"))
    run(tiny(*settings))
    capsys.readouterr()
    run(tiny(*settings, "export.adapter=keep"))
    said = capsys.readouterr().out
    wanted = own_logits(tiny(*settings))
    merged = load(runs / "tuned" / "export" / "huggingface-step_00000004")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)
    kept = runs / "tuned" / "export" / "huggingface-adapter-step_00000004"
    base = load(tmp_path / "base")
    assert not torch.allclose(logits(base), wanted, rtol=1e-4, atol=1e-4)
    adapted = peft.PeftModel.from_pretrained(base, str(kept))
    torch.testing.assert_close(logits(adapted), wanted, rtol=1e-5, atol=1e-5)
    # The adapter names its base where an export puts it by default; it says so, and works once it is there.
    assert f"not there yet: python src/main.py --config {runs / 'base'}/config.yaml task=export" in said
    run(tiny(*BASE, "task=export"))
    both = peft.AutoPeftModelForCausalLM.from_pretrained(str(kept))
    torch.testing.assert_close(logits(both), wanted, rtol=1e-5, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(kept).eos_token_id == 0
    assert transformers.GenerationConfig.from_pretrained(kept).eos_token_id == 0


GPT2 = (
    "model.learned_positions=true", "model.rope.fraction=0.0", "model.norm.kind=layernorm", "model.activation=gelu",
    "model.bias={qkv:true,attention_output:true,mlp:true}", "model.mlp_dim=128", "model.num_kv_heads=2",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["lora", "dora", "loha"])
def test_a_gpt2_is_trained_adapted_and_exported(kind: str, tiny: Compose, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run(tiny(*BASE, *GPT2))
    run(tiny(*BASE, *GPT2, "task=export"))
    base = load(runs / "base" / "export" / "huggingface-step_00000004")
    assert base.config.model_type == "gpt2"
    settings = ("name=tuned", *TUNE, *GPT2, f"adapter={kind}")
    run(tiny(*settings))
    wanted = own_logits(tiny(*settings))
    run(tiny(*settings, "task=export"))
    merged = load(runs / "tuned" / "export" / "huggingface-step_00000004")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(base), wanted, rtol=1e-4, atol=1e-4)
    keep = tiny(*settings, "task=export", "export.adapter=keep")
    if kind == "loha":
        with pytest.raises(ConfigError, match=r"no LOHA for GPT-2's layers, .* use export\.adapter=merge"):
            run(keep)
        return
    run(keep)
    kept = runs / "tuned" / "export" / "huggingface-adapter-step_00000004"
    both = peft.AutoPeftModelForCausalLM.from_pretrained(str(kept))
    torch.testing.assert_close(logits(both), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(both.merge_and_unload()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of what tied layers may come to without ensure_weight_tying
@pytest.mark.parametrize(
    ("targets", "tied"),
    [
        ("[embedding]", False),
        ("[head]", False),
        ("[embedding,head,attention]", False),
        ("[head,attention]", True),
        ("[embedding,head,attention]", True),
    ],
)
def test_an_adapter_on_the_vocabulary_is_trained_and_kept(
    targets: str, tied: bool, tiny: Compose, tmp_path: Path
) -> None:
    shape = (f"model.tied_embeddings={str(tied).lower()}", "model.vocab_size=301", "model.vocab_multiple_of=64")
    run(tiny(*BASE, *shape))
    run(tiny(*BASE, *shape, "task=export"))
    settings = ("name=tuned", *TUNE, *shape, "adapter=lora", f"adapter.targets={targets}")
    run(tiny(*settings))
    wanted = own_logits(tiny(*settings))
    run(tiny(*settings, "task=export"))
    runs = tmp_path / "runs"
    merged = load(runs / "tuned" / "export" / "huggingface-step_00000004")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)
    base = load(runs / "base" / "export" / "huggingface-step_00000004")
    assert not torch.allclose(logits(base), wanted, rtol=1e-3, atol=1e-3)
    run(tiny(*settings, "task=export", "export.adapter=keep"))
    kept = runs / "tuned" / "export" / "huggingface-adapter-step_00000004"
    both = peft.AutoPeftModelForCausalLM.from_pretrained(str(kept))
    torch.testing.assert_close(logits(both), wanted, rtol=1e-5, atol=1e-5)
    if not tied:  # peft 0.21 adds the update of a tied matrix twice when it merges
        torch.testing.assert_close(logits(both.merge_and_unload()), wanted, rtol=1e-5, atol=1e-5)
    assert merged.config.tie_word_embeddings == (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("model.tied_embeddings=false", "adapter=dora"), "need adapter=lora, not dora"),
        (("model.tied_embeddings=false", "adapter.dropout=0.1"), "need dropout = 0"),
        (("model.tied_embeddings=false", "adapter.init=pissa"), "need dropout = 0 and init"),
    ],
)
def test_which_adapters_fit_the_vocabulary(changes: tuple[str, ...], message: str, tiny: Compose) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(RunConfig, tiny("name=tuned", *TUNE, "adapter=lora", "adapter.targets=[head]", *changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("adapter=lokr",), r"in place of layers\.0\.\S+, and a Kronecker product cannot be split"),
        (("adapter=lora", "adapter.init=pissa"), "use export.adapter=merge"),
        (("adapter=none", "~adapter.rank"), "has no adapter to keep"),
    ],
)
def test_what_cannot_be_kept(changes: tuple[str, ...], message: str, tiny: Compose, tmp_path: Path) -> None:
    run(tiny(*BASE))
    settings = ("name=tuned", *(one for one in TUNE if not (one.startswith("adapter") and "~adapter.rank" in changes)))
    settings = (*settings, *(one for one in changes if one != "~adapter.rank"))
    run(tiny(*settings))
    with pytest.raises(ConfigError, match=message):
        run(tiny(*settings, "task=export", "export.adapter=keep"))
    assert not list((tmp_path / "runs" / "tuned").glob("export/*"))


def test_what_is_refused(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run 'base'"):
        run(tiny(*BASE, "task=export"))
    capped = ("name=capped", "budget.steps=1", "model.softcap=15.0")
    run(tiny(*capped))
    with pytest.raises(ConfigError, match=r"model\.softcap = 15"):
        run(tiny(*capped, "task=export"))
    assert not list((tmp_path / "runs" / "capped").glob("export/*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        run(tiny(*capped, "model.softcap=null", "task=export", f"export.output={tmp_path / 'file' / 'x'}"))


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    from pretune.tasks.export.huggingface import _save

    with pytest.raises(ConfigError, match=r"export\.dtype=float16; use bfloat16"):
        _save({"weight": torch.tensor([1e6])}, tmp_path / "x.safetensors", "float16")


KILLED = """
import sys
from pathlib import Path
import json
from pretune.dispatch import run
print("started", flush=True)
sys.exit(run(json.loads(Path(sys.argv[1]).read_text())))
"""


def test_a_full_disk_leaves_nothing(tiny: Compose, tmp_path: Path) -> None:
    run(tiny(*BASE))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limit[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write to .*choose another export\.output"):
            run(tiny(*BASE, "task=export"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert not any((tmp_path / "runs" / "base" / "export").iterdir())


def test_a_stopped_export_leaves_nothing(tiny: Compose, tmp_path: Path) -> None:
    run(tiny(*BASE))
    (tmp_path / "export.json").write_text(json.dumps(tiny(*BASE, "task=export")))
    script = [sys.executable, "-c", KILLED, str(tmp_path / "export.json")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    exports = tmp_path / "runs" / "base" / "export"
    while process.poll() is None and not list(exports.glob(".*")):
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == EXIT_STOPPED
    assert "nothing was exported" in said
    assert not any(exports.iterdir())
