"""What a model's own tokenizer begins and ends texts with reaches samples, answers and exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from published import model_folder

from pretune.core.config import ConfigError, validate
from pretune.data.formats.build import build_formatter
from pretune.data.formats.documents import documents
from pretune.data.shards import prepare
from pretune.dispatch import run
from pretune.run.config import RunConfig
from pretune.run.folder import cache_folder, find_run
from pretune.run.generator import assemble_generator
from pretune.run.model import merged_model
from pretune.run.tokenizer import assemble_tokenizer
from pretune.tasks.export.reload import check_tokenizer

Compose = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")
TEMPLATE = (  # writes no BOS
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def with_model(mapping: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run with the tokenizer of a model's folder, and a table padded beyond it."""
    mapping["data"]["tokenizer"] = {"kind": "file", "path": str(folder), "eos": None, "add_tokens": []}
    mapping["model"]["vocab_size"] = 640
    return mapping


def training_ids(config: RunConfig) -> list[list[int]]:
    """The validation documents as the run reads them."""
    data = prepare(config.data, assemble_tokenizer(config), cache_folder()).validation
    ends = data.document_ends.tolist()
    return [data.read(start, stop)[0].tolist() for start, stop in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("family", ["llama3", "gemma", "t5", "gpt2"])
def test_an_export_gives_the_ids_of_training(family: str, tiny: Compose, tmp_path: Path) -> None:
    mapping = with_model(tiny("name=one", "budget.steps=1"), model_folder(tmp_path / "model", family))
    run(mapping)
    run(mapping | {"task": "export"})
    config = validate(RunConfig, mapping)
    tokenizer, (folder,) = assemble_tokenizer(config), (tmp_path / "runs" / "one" / "export").iterdir()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    formatter = build_formatter(config.data.format, tokenizer.template_tokens)
    texts = ["".join(one.text for one in document) for document in documents(config.data, "validation", formatter)]
    found = [[*theirs(text, split_special_tokens=True)["input_ids"], theirs.eos_token_id] for text in texts]
    wanted = training_ids(config)
    assert len(wanted) > 3
    assert found == wanted
    about = json.loads((folder / "tokenizer_config.json").read_text())
    assert about["add_bos_token"] is (family in ("llama3", "gemma"))
    ends = transformers.GenerationConfig.from_pretrained(folder)
    found = ends.eos_token_id if isinstance(ends.eos_token_id, list) else [ends.eos_token_id]
    assert found[0] == theirs.eos_token_id
    model = merged_model(config, find_run("one", config.output_dir), CPU)
    generator = assemble_generator(config, config.generate, model, tokenizer, CPU)
    assert {*found} == generator.decoder.vocabulary.end_ids
    assert len(found) == {"llama3": 3, "gemma": 2}.get(family, 1)
    # A prompt begins as transformers begins a text, and so does none.
    asked = theirs("The cat")["input_ids"]
    assert generator.ids(generator.prompt_segments("The cat", False)) == asked
    assert generator.ids([]) == [ends.bos_token_id] == ([*tokenizer.beginning] or [tokenizer.eos_id])


@pytest.mark.parametrize("template", [TEMPLATE, "{{ bos_token }}" + TEMPLATE])
def test_a_chat_begins_once_whoever_writes_it(template: str, tiny: Compose, tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": f"What is {number} plus 1?"}, {"role": "assistant", "content": f"{number + 1}."}]
        for number in range(60)
    ]
    rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (tmp_path / "chats.jsonl").write_text(rows)
    data = ("data=chat", "data/tokenizer=trained", f"data.source.files=[{tmp_path}/chats.jsonl]")
    mapping = tiny("name=chat", "budget.steps=1", "data.sequence_length=64", *data)
    mapping["data"]["format"]["template"] = template
    mapping = with_model(mapping, model_folder(tmp_path / "model", "llama3"))
    run(mapping)
    run(mapping | {"task": "export"})
    (folder,) = (tmp_path / "runs" / "chat" / "export").iterdir()
    theirs, config = transformers.AutoTokenizer.from_pretrained(folder), validate(RunConfig, mapping)
    held_out = training_ids(config)
    rendered = [theirs.apply_chat_template(chat, return_dict=False) for chat in chats]
    assert held_out
    for ids in held_out:
        assert ids.count(theirs.bos_token_id) == 1
        assert ids in rendered  # EOS is what ends a turn
    model = merged_model(config, find_run("chat", config.output_dir), CPU)
    generator = assemble_generator(config, config.generate, model, assemble_tokenizer(config), CPU)
    prompt = generator.ids(generator.prompt_segments("Is it?", True))
    asked = [{"role": "user", "content": "Is it?"}]
    assert prompt == theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)


def test_an_export_that_forgets_it_is_refused(tiny: Compose, tmp_path: Path) -> None:
    config = validate(RunConfig, with_model(tiny("name=one"), model_folder(tmp_path / "model", "llama3")))
    tokenizer = assemble_tokenizer(config)
    tokenizer.save(tmp_path / "out")
    assert check_tokenizer(config, tokenizer, tmp_path / "out")[0][:1] == [*tokenizer.beginning]
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(ConfigError, match="token 0 is"):
        check_tokenizer(config, tokenizer, tmp_path / "out")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny: Compose, tmp_path: Path) -> None:
    mapping = with_model(tiny("name=one"), model_folder(tmp_path / "model", "llama3"))
    mapping["model"]["vocab_size"] = 300
    with pytest.raises(ConfigError, match=r"the model's vocabulary only 300; set model\.vocab_size="):
        assemble_tokenizer(validate(RunConfig, mapping))


def test_what_is_shown_begins_with_it(tiny: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mapping = with_model(tiny("name=one", "task=prepare", "prepare.show=1"), model_folder(tmp_path / "model", "gemma"))
    run(mapping)
    assert "\n<bos>[[" in capsys.readouterr().out
