"""Folders of small models as others publish them: each with a tokenizer of another family, made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

TEXTS = ["The cat sat on the mat, and 12 dogs ate it.", "über naïve cafés: 日本 🎉\n\n  two", "## x1 y22 [INST]"] * 20
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}"
    "{{ '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def model_folder(folder: Path, family: str) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json, generation_config.json and config.json, and no weights."""
    backend, about, ends = FAMILIES[family]()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": int(1e30), **about}
    write(folder / "tokenizer_config.json", about)
    write(folder / "generation_config.json", {"eos_token_id": [backend.token_to_id(one) for one in ends]})
    write(folder / "config.json", {"model_type": "llama"})
    return folder


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))


def _byte_level(special: list[str], before: str | None) -> Backend:
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(
        Regex(r"'s|\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken(one, special=True) for one in special])
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)]
    if before is not None:
        tokens = [(before, backend.token_to_id(before))]
        steps.append(processors.TemplateProcessing(f"{before} $A", special_tokens=tokens))
    backend.post_processor = processors.Sequence(steps)
    return backend


def _sentencepiece(special: list[str], normalizer: Any, pre_tokenizer: Any) -> Backend:
    learner = Backend(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    known = sorted(learned["vocab"], key=learned["vocab"].get)
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *known]
    vocabulary = {one: number for number, one in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(one) for one in learned["merges"]]
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(one, normalized=False, special=True) for one in special])
    return backend


def _gpt2() -> tuple[Backend, dict[str, Any], list[str]]:
    end = "<|endoftext|>"
    return _byte_level([end], None), {"bos_token": end, "eos_token": end, "add_bos_token": False}, [end]


def _qwen2() -> tuple[Backend, dict[str, Any], list[str]]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return _byte_level(special, None), {"eos_token": "<|im_end|>", "chat_template": CHATML}, ["<|im_end|>", special[0]]


def _llama3() -> tuple[Backend, dict[str, Any], list[str]]:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
               "<|eot_id|>"]  # fmt: skip
    about = {"bos_token": special[0], "eos_token": "<|eot_id|>", "chat_template": LLAMA3_CHAT}
    return _byte_level(special, special[0]), about, ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]


def _llama2() -> tuple[Backend, dict[str, Any], list[str]]:
    before = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend = _sentencepiece(["<unk>", "<s>", "</s>"], before, None)
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA2_CHAT}, ["</s>"]


def _mistral() -> tuple[Backend, dict[str, Any], list[str]]:
    backend = _sentencepiece(
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
        None,
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA2_CHAT}, ["</s>"]


def _gemma() -> tuple[Backend, dict[str, Any], list[str]]:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    backend = _sentencepiece(special, normalizers.Replace(" ", "▁"), split)
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    about = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "chat_template": GEMMA_CHAT}
    return backend, about, ["<eos>", "<end_of_turn>"]


def _t5() -> tuple[Backend, dict[str, Any], list[str]]:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, show_progress=False, special_tokens=special, unk_token="<unk>")
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return backend, {"eos_token": "</s>", "pad_token": "<pad>"}, ["</s>"]


def _bert() -> tuple[Backend, dict[str, Any], list[str]]:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, show_progress=False, special_tokens=special)
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return backend, {"eos_token": "[SEP]", "cls_token": "[CLS]", "sep_token": "[SEP]"}, ["[SEP]"]


FAMILIES: dict[str, Callable[[], tuple[Backend, dict[str, Any], list[str]]]] = {
    "gpt2": _gpt2, "qwen2": _qwen2, "llama3": _llama3, "llama2": _llama2, "mistral": _mistral, "gemma": _gemma,
    "t5": _t5, "bert": _bert,
}  # fmt: skip
BEGINNINGS = {"llama3": "<|begin_of_text|>", "llama2": "<s>", "mistral": "<s>", "gemma": "<bos>", "bert": "[CLS]"}
"""What these tokenizers put before a text; the others put nothing there."""
AFTER = {"t5": "</s>", "bert": "[SEP]"}
"""What these tokenizers put after a text."""
