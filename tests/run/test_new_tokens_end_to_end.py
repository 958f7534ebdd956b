"""From a base model without ChatML's tokens to a chat model: resumed, evaluated, exported, started from, preferred."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from new_tokens import LORA, config_of, own_logits, resized, start, tokens, tune
from published import CHATML
from recorded import losses, series
from safetensors.torch import load_file
from stand_ins import PREFERENCES, RUNS, TINY, write_data

from pretune.dispatch import run
from pretune.launch.command_line import main
from pretune.run.folder import read_config
from pretune.run.tokenizer import assemble_tokenizer

LORA_ON_ALL = (*LORA, "adapter.targets=[attention.output,embedding,head]")
WAYS: dict[str, tuple[str, ...]] = {
    "full": ("optimizer.lr=1e-2",),
    "new rows": LORA,
    "all": (*LORA, "adapter.train_embeddings=all"),
    "lora": LORA_ON_ALL,
    "dora, new rows": (*LORA, "adapter=dora"),
    "loha, new rows": (*LORA, "adapter=loha"),
    "qlora, new rows": (*LORA, "quantization=qlora_nf4", "quantization.block_size=32"),
    "neftune": (*LORA, "neftune_alpha=5", "ema.decay=0.5"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)


def exported(name: str, *overrides: str) -> Path:
    folder = Path("out") / f"{name}{len(overrides)}"
    assert main(["--config", f"runs/{name}/config.yaml", "task=export", f"export.output={folder}", *overrides]) == 0
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("family", "way"),
    [
        ("llama", "full"),
        ("llama", "new rows"),
        ("llama tied", "all"),
        ("llama tied", "lora"),
        ("gpt2", "new rows"),
        *(
            pytest.param(family, way, marks=pytest.mark.slow)
            for family, way in (
                ("llama", "all"),
                ("llama", "loha, new rows"),
                ("llama", "qlora, new rows"),
                ("llama tied", "full"),
                ("llama tied", "new rows"),
                ("llama tied", "dora, new rows"),
                ("llama tied", "neftune"),
                ("gpt2", "all"),
                ("gpt2", "lora"),
            )
        ),
    ],
)
def test_what_is_exported_is_what_was_trained(family: str, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, size = start(family)
    assert tune(*WAYS[way]) == 0
    said = capsys.readouterr().out
    assert f"2 new tokens (<|im_start|>, <|im_end|>: {size:,} to {size + 1:,}), whose rows are " in said
    config, x = config_of("tuned"), tokens(size + 2)
    assert config.model.vocab_size == size + 2
    wanted = own_logits("tuned", x)
    assert main(["--config", "runs/tuned/config.yaml", "task=evaluate"]) == 0
    measured = json.loads(Path("runs/tuned/evaluation.json").read_text())["val/loss"]
    assert measured == pytest.approx(series(Path("runs/tuned"), "val/loss")[-1], abs=1e-5)
    merged = exported("tuned")
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
    assert theirs.config.vocab_size == size + 2
    assert theirs.config.tie_word_embeddings == config.model.tied_embeddings
    assert ("lm_head.weight" in load_file(merged / "model.safetensors")) != config.model.tied_embeddings
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, wanted, rtol=1e-5, atol=1e-5)
    own = transformers.AutoTokenizer.from_pretrained(merged)
    assert own.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [size, size + 1]
    assert size + 1 in theirs.generation_config.eos_token_id, "the end of a turn ends a text"
    # The rows of the new tokens were trained.
    table = theirs.get_input_embeddings().weight
    assert not torch.allclose(table[size:], resized(folder, size + 2).get_input_embeddings().weight[size:], atol=1e-4)
    if way in ("full", "lora", "loha, new rows", "qlora, new rows"):
        return
    kept = exported("tuned", "export.adapter=keep")
    adapted = peft.PeftModel.from_pretrained(resized(folder, size + 2), str(kept))
    with torch.no_grad():
        torch.testing.assert_close(adapted(x).logits, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(adapted.merge_and_unload()(x).logits, wanted, rtol=1e-5, atol=1e-5)
    both = peft.AutoPeftModelForCausalLM.from_pretrained(str(kept))
    with torch.no_grad():
        torch.testing.assert_close(both(x).logits, wanted, rtol=1e-5, atol=1e-5)


def test_new_rows_alone_are_kept() -> None:
    """Not two tables of the whole vocabulary."""
    _, size = start("llama")
    assert tune(*LORA) == 0
    stored = load_file("runs/tuned/checkpoints/step_00000002/adapter_model.safetensors")
    beside = {name: one.shape for name, one in stored.items() if "lora_" not in name}
    assert beside == {
        f"base_model.model.{name}.token_adapter.trainable_tokens_delta": (2, 32) for name in ("embedding", "head")
    }
    content = json.loads(Path("runs/tuned/checkpoints/step_00000002/adapter_config.json").read_text())
    assert content["trainable_token_indices"] == {"embedding": [size, size + 1], "head": [size, size + 1]}


@pytest.mark.parametrize(
    "way", [pytest.param("full", marks=pytest.mark.slow), "new rows", pytest.param("all", marks=pytest.mark.slow)]
)
def test_a_run_goes_on_after_a_power_cut(way: str, power_cut: Callable[..., None]) -> None:
    start("llama tied")
    settings = (*WAYS[way], "budget.steps=4", "checkpoint.every=2", "evaluation.every=2")
    assert tune("name=whole", *settings) == 0
    assert tune("name=cut", *settings, "budget.steps=4") == 0
    shutil.rmtree("runs/cut/checkpoints/step_00000004")
    for name in ("summary.json", "report.html"):
        Path("runs/cut", name).unlink(missing_ok=True)
    assert tune("name=cut", *settings) == 0, "by the run file"
    assert losses(Path("runs/cut")) == losses(Path("runs/whole"))


def test_a_stage_starts_from_a_run_that_has_added_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    _, size = start("llama tied")
    assert tune(*LORA) == 0
    first = own_logits("tuned", tokens(size + 2))
    # A template's tokens are there, so none is added; one more is.
    nothing = ("optimizer.lr=1e-12", "optimizer.weight_decay=0.0")
    assert tune("name=second", "stage.init_from=tuned", *nothing) == 0
    assert config_of("second").model.vocab_size == size + 2
    torch.testing.assert_close(own_logits("second", tokens(size + 2)), first, rtol=1e-5, atol=1e-5)
    assert tune("name=third", "stage.init_from=second", "data.tokenizer.add_tokens=[<call>]", *LORA) == 0
    config = config_of("third")
    assert (config.model.vocab_size, assemble_tokenizer(config).added_ids) == (size + 3, (size + 2,))
    assert main(["--config", "runs/third/config.yaml", "task=evaluate"]) == 0
    capsys.readouterr()
    assert tune("name=fourth", "stage.init_from=third", "data.tokenizer.add_tokens=[<call>]") == 2
    assert f"the tokenizer has '<call>' already, as token {size + 2}; leave it out" in capsys.readouterr().err
    assert tune("name=fourth", "stage.init_from=second", *LORA, "adapter.train_embeddings=new_rows") == 2
    assert "the tokenizer has all tokens of the chat template already, so that none is new" in capsys.readouterr().err
    others = "data.tokenizer.add_tokens=[<call>,<|im_start|>,<|im_end|>]"
    assert (
        tune("name=fourth", "stage.init_from=second", "data/tokenizer=file", "data.tokenizer.path=theirs", others) == 2
    )
    said = capsys.readouterr().err
    assert "second, which the run starts from, has '<|im_start|>' in the place of a new token" in said
    # The adapter of the first, on the same start, goes on where it was.
    assert tune("name=again", *LORA, *nothing, "adapter.init_from=runs/tuned") == 0
    torch.testing.assert_close(own_logits("again", tokens(size + 2)), first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "reference", ["adapter_off", *(pytest.param(one, marks=pytest.mark.slow) for one in ("model", "cached"))]
)
def test_the_reference_of_preferences_grows_too(reference: str) -> None:
    """The first loss is ln 2, which the run checks."""
    start("llama")
    given = (*LORA, *PREFERENCES, "data/format=preference_chat", "data.format.template.template=chatml")
    keys = {one.partition("=")[0] for one in given}
    small = [one for one in TINY if one.partition("=")[0] not in keys]
    more = (f"stage.objective.reference={reference}", "data.tokenizer.add_tokens=template", "name=preferred")
    file = str(RUNS / "smollm_135m_mathqa.yaml")
    begin = ("stage.init_from=theirs", "evaluation.option_accuracy=false")
    assert main(["--config", file, *small, *given, *more, *begin]) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.tokenizer.add_tokens=[<|endoftext|>]", "data.format.template=null"), "'<|endoftext|>' already"),
        (("data.tokenizer.add_tokens=[]",), "append them with data.tokenizer.add_tokens=template"),
        (("data.tokenizer.add_tokens=[]", "data/format=chat_plain", *LORA, "adapter.train_embeddings=new_rows"),
         "adapter.train_embeddings = new_rows, but data.tokenizer.add_tokens adds no tokens"),
        ((*LORA_ON_ALL, "adapter.train_embeddings=all"), "or set train_embeddings=none"),
        ((*LORA, "quantization=qat_int8_int4", "quantization.group_size=16"), "set adapter.train_embeddings=none"),
        (("model.vocab_size=1000", "data.tokenizer.add_tokens=[]", "data/format=chat_plain"),
         "model.vocab_size = 1000, but"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(
    overrides: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start("llama")
    capsys.readouterr()
    assert tune(*overrides) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists()


def test_frozen_rows_are_exported_merged_only(capsys: pytest.CaptureFixture[str]) -> None:
    start("llama")
    assert tune(*LORA, "adapter.train_embeddings=none") == 0
    assert "whose rows are frozen" in capsys.readouterr().out
    assert main(["--config", "runs/tuned/config.yaml", "task=export", "export.adapter=keep"]) == 2
    assert "neither in the adapter nor in the model below it: use export.adapter=merge" in capsys.readouterr().err
    assert main(["--config", "runs/tuned/config.yaml", "task=export"]) == 0


def test_a_plan_and_prepared_data_know_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = start("llama")
    assert tune("task=prepare", "prepare.show=1") == 0
    assert "<|im_start|>" in capsys.readouterr().out
    assert tune("task=plan", *LORA) == 0
    # config.json alone, as of a model on the hub.
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert tune("task=plan", *LORA) == 0
    assert not Path("runs").exists()


def test_a_template_whose_tokens_are_split_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    start("llama")
    Path("chat.jinja").write_text(CHATML)
    own = ("data.format.template=chat.jinja", "data.tokenizer.add_tokens=[]")
    for task in ("prepare", "train"):
        assert tune(*own, f"task={task}") == 0
        said = capsys.readouterr().out
        assert "writes <|im_start|>, <|im_end|>, which the tokenizer splits into several tokens: data.tok" in said


def test_a_model_from_random_weights_has_room_for_them(tiny: Callable[..., dict[str, Any]]) -> None:
    mapping = tiny("model.vocab_size=300", "data.tokenizer.add_tokens=['<a>','<b>']", "budget.steps=1")
    assert run(mapping) == 0
    assert run(mapping) == 0, "complete"
    found = read_config(Path(mapping["output_dir"]) / mapping["name"] / "config.yaml")
    assert (found["model"]["vocab_size"], found["data"]["tokenizer"]["vocab_size"]) == (302, 300)
