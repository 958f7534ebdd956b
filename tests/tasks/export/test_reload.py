"""An exported folder as its users load it: the tokens, the loss and the endings of the run, or no export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pretune.core.config import ConfigError, validate
from pretune.data.tokenizer import TRAINED_EOS, Tokenizer, train_byte_level
from pretune.dispatch import run
from pretune.run.config import RunConfig
from pretune.run.folder import find_run
from pretune.run.generator import assemble_generator
from pretune.run.model import merged_model
from pretune.run.tokenizer import assemble_tokenizer
from pretune.tasks.export.reload import check_model, check_tokenizer

Compose = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + mark + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + mark + '\n' }}{% endif %}"
)


def with_tokenizer(mapping: dict[str, Any], folder: Path, eos: str | None) -> dict[str, Any]:
    """A run's configuration with a tokenizer from a file."""
    mapping["data"]["tokenizer"] = {"kind": "file", "path": str(folder), "eos": eos, "add_tokens": []}
    return mapping


def chat_run(tiny: Compose, folder: Path, template: str = CHATML, **variables: Any) -> dict[str, Any]:
    """A run on chats, whose tokenizer has tokens for the turns."""
    chats = [
        [{"role": "user", "content": f"What is {number} plus 1?"}, {"role": "assistant", "content": f"{number + 1}."}]
        for number in range(60)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    backend = train_byte_level(iter(["What is 3 plus 1? user assistant"] * 9), 290, False)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    Tokenizer(backend, TRAINED_EOS, chat_template=template).save(folder / "tokenizer")
    mapping = tiny("name=chat", "data=chat", "data/tokenizer=trained", f"data.source.files=[{folder}/chats.jsonl]")
    mapping["data"]["format"]["variables"] = variables
    return with_tokenizer(mapping, folder / "tokenizer", None)


@pytest.mark.parametrize("name", ["gpt2", "llama2", pytest.param("qwen2.5", marks=pytest.mark.slow)])
def test_published_tokenizers_keep_their_ids_in_every_architecture(
    name: str, tiny: Compose, tmp_path: Path, shared_data: Path
) -> None:
    folder = shared_data / "tokenizers" / name
    if name == "llama2":
        folder = shared_data.parent / "cases" / "data" / "tok" / name
    mapping = with_tokenizer(tiny("name=one"), folder, "</s>" if name == "llama2" else "<|endoftext|>")
    mapping["model"]["vocab_size"] = 200_000
    config = validate(RunConfig, mapping)
    tokenizer = assemble_tokenizer(config)
    tokenizer.save(tmp_path)
    for chosen in ("llama", "qwen3", "arcee", "apertus", "nanochat"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": chosen}))
        check_tokenizer(config, tokenizer, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen2.5"])
def test_a_model_with_the_biases_of_qwen2_keeps_its_loss(
    name: str, tiny: Compose, tmp_path: Path, shared_data: Path
) -> None:
    biases = "model.bias={qkv: true, attention_output: false, mlp: false}"
    mapping = tiny("name=one", "budget.steps=1", "model.vocab_size=151936", "model.dim=16", biases)
    mapping = with_tokenizer(mapping, shared_data / "tokenizers" / name, "<|endoftext|>")
    run(mapping)
    run(mapping | {"task": "export"})
    (folder,) = (tmp_path / "runs" / "one" / "export").iterdir()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text = "  1234 Ünïcode 日本語\n\n'LL "
    assert theirs(text)["input_ids"] == assemble_tokenizer(validate(RunConfig, mapping)).encode(text)


def test_a_chat_ends_outside_where_it_ends_here(tiny: Compose, tmp_path: Path) -> None:
    mapping = chat_run(tiny, tmp_path, mark="!")
    run(mapping)
    run(mapping | {"task": "export"})
    (folder,) = (tmp_path / "runs" / "chat" / "export").iterdir()
    config = validate(RunConfig, mapping)
    model = merged_model(config, find_run("chat", config.output_dir), CPU)
    generator = assemble_generator(config, config.generate, model, assemble_tokenizer(config), CPU)
    outside = transformers.GenerationConfig.from_pretrained(folder)
    assert {*outside.eos_token_id} == generator.decoder.vocabulary.end_ids
    assert len(outside.eos_token_id) == 2
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    question = "Is <|im_end|> a token?"
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "Is it?"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("assistant!\n")
    wanted = "".join(segment.text for segment in generator.prompt_segments("Is it?", True))
    assert chat == wanted
    assert theirs(chat)["input_ids"] == generator.ids(generator.prompt_segments("Is it?", True))
    # What a user types is text in training; transformers reads it as the token, in any model.
    assert theirs.convert_tokens_to_ids("<|im_end|>") not in generator.ids(generator.prompt_segments(question, False))


def test_the_end_of_a_turn_in_plain_text_becomes_a_stop_string(
    tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n##\n' }}{% endfor %}"
    mapping = chat_run(tiny, tmp_path, template)
    run(mapping)
    run(mapping | {"task": "export"})
    assert "generate(..., tokenizer=tokenizer) ends a text before '##'" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs" / "chat" / "export").iterdir()
    content = json.loads((folder / "generation_config.json").read_text())
    assert content["stop_strings"] == ["##"]
    assert transformers.GenerationConfig.from_pretrained(folder).stop_strings == ["##"]


def test_a_tokenizer_that_transformers_reads_differently_is_refused(tiny: Compose, tmp_path: Path) -> None:
    """The class that transformers forces on a model_type; another pre-tokenizer in the file does the same."""
    config = validate(RunConfig, tiny("name=one"))
    tokenizer = assemble_tokenizer(config)
    tokenizer.save(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert [0] not in check_tokenizer(config, tokenizer, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match=r"transformers reads this run's tokenizer differently"):
        check_tokenizer(config, tokenizer, tmp_path / "out")
    other = Backend.from_str(tokenizer.backend.to_str())
    split = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    other.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=True)])
    other.save(str(tmp_path / "out" / "tokenizer.json"))
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="token 0 is"):
        check_tokenizer(config, tokenizer, tmp_path / "out")


def test_a_refused_export_leaves_nothing(tiny: Compose, tmp_path: Path) -> None:
    """A word that is no special token as EOS: transformers makes it one, wherever a text has it."""
    backend = train_byte_level(iter(["The cat sat"] * 9), 280, False)
    backend.add_tokens(["##"])
    backend.save(str(tmp_path / "tokenizer.json"))
    mapping = with_tokenizer(tiny("name=one", "budget.steps=1"), tmp_path, "##")
    run(mapping)
    with pytest.raises(ConfigError, match="from '▁ <0x0A> ##"):
        run(mapping | {"task": "export"})
    assert not list((tmp_path / "runs" / "one").glob("export/*"))
    assert not list((tmp_path / "runs" / "one" / "export").glob(".*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_other_weights_are_noticed(dtype: str, tiny: Compose, tmp_path: Path) -> None:
    settings = ("name=one", "budget.steps=2", "quantization=int8_int4", "quantization.group_size=16")
    run(tiny("name=one", "budget.steps=2"))
    out = tmp_path / "out"
    run(tiny(*settings, "task=export", f"export.output={out}", f"export.dtype={dtype}", "export.measure=false"))
    config = validate(RunConfig, tiny("name=one"))
    model = merged_model(config, find_run("one", config.output_dir), CPU)
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    tensors = load_file(out / "model.safetensors")
    tensors["model.embed_tokens.weight"] = model.embedding.weight[:320].detach().to(getattr(torch, dtype))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    ids = [list(range(2, 40))]
    with pytest.raises(RuntimeError, match="transformers computes a loss of"):
        check_model(merged_model(config, find_run("one", config.output_dir), CPU), ids, out, dtype)
