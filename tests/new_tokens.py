"""Runs that add a chat template's tokens to a base model, and the same in transformers and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from published import model_folder
from stand_ins import RUNS, TINY, stand_in
from torch import Tensor

from pretune.core.config import validate
from pretune.launch.command_line import main
from pretune.launch.compose import composed as by_hydra
from pretune.launch.compose import plain
from pretune.launch.model_of_start import with_model
from pretune.model.transformer import Transformer
from pretune.run.config import RunConfig
from pretune.run.folder import find_run, read_config
from pretune.run.model import merged_model
from pretune.run.precision import resolve

FAMILIES = {
    "llama": ("llama", "embed_tokens", "self_attn.o_proj", "mlp.down_proj"),
    "llama tied": ("llama tied, wide heads", "embed_tokens", "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("gpt2", "wte", "attn.c_proj", "mlp.c_proj"),
}
"""A case of hub_models, and peft's names of the embedding and of two layers that are one layer here too."""
SFT = RUNS / "smollm_135m_sft.yaml"
CHATS = ("data=chat", "data/source=files", "data.source.files=[chats.jsonl]", "data.validation.fraction=0.2",
         "data.format.template=chatml", "data/tokenizer=inherited", "data.tokenizer.add_tokens=template")  # fmt: skip
LORA = ("adapter=lora", "adapter.rank=2", "adapter.targets=[attention.output,mlp.down]", "optimizer.lr=1e-2")


def start(family: str, spare: int = 0) -> tuple[Path, int]:
    """A base model without ChatML's tokens, and the number of its tokens; `spare`: rows of its table without one."""
    folder = Path("theirs")
    model_folder(folder, "gpt2")
    size = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    return stand_in(folder, FAMILIES[family][0], "gpt2", vocab_size=size + spare), size


def tune(*overrides: str) -> int:
    given = {one.partition("=")[0] for one in overrides}
    small = [one for one in (*TINY, *CHATS) if one.partition("=")[0] not in given]
    name = () if "name" in given else ("name=tuned",)
    begin = () if "stage.init_from" in given else ("stage.init_from=theirs",)
    return main(["--config", str(SFT), *name, *begin, *small, *overrides])


def config_of(name: str) -> RunConfig:
    return validate(RunConfig, read_config(Path("runs") / name / "config.yaml"))


def composed(*overrides: str) -> RunConfig:
    """The configuration of a run that has not begun, resolved as training resolves it."""
    given = {one.partition("=")[0] for one in overrides}
    small = [one for one in (*TINY, *CHATS) if one.partition("=")[0] not in given]
    with by_hydra(SFT, ["name=tuned", "stage.init_from=theirs", *small, *overrides]) as found:
        return resolve(validate(RunConfig, plain(with_model(found), SFT)), None).config


def resized(folder: Path, size: int) -> Any:
    """transformers' model with `size` rows, the new ones at the mean of the old: as it does without its noise."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = len(model.get_input_embeddings().weight)
    model.resize_token_embeddings(size, mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight.data[before:] = table.weight.data[:before].mean(0)
    return model.eval()


def tokens(size: int) -> Tensor:
    """Two rows that end in the last two tokens."""
    found = torch.randint(0, size, (2, 20), generator=torch.Generator().manual_seed(1))
    found[:, -2:] = torch.tensor([size - 2, size - 1])
    return found


def logits(model: Any, x: Tensor) -> Tensor:
    return model.unembed(model(x)) if isinstance(model, Transformer) else model(x).logits


def step(model: Any, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    scores = logits(model, x)
    F.cross_entropy(scores[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    optimizer.step()


def own_logits(name: str, x: Tensor) -> Tensor:
    config = config_of(name)
    model = merged_model(config, find_run(name, "runs"), torch.device("cpu")).eval()
    with torch.no_grad():
        return logits(model, x)
