"""Tokenizers: loading, training, saving, and converting between text and token ids, based on `tokenizers`."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretune.core.config import ConfigError, InputError, nearest
from pretune.core.files import atomic_folder, fingerprint, write_atomic
from pretune.core.terminal import warn
from pretune.data.added_tokens import append_tokens, tokens_to_add
from pretune.data.beginning import keep_beginning, missing_beginning
from pretune.data.config import (
    AddTokens,
    DataConfig,
    FileTokenizer,
    HubTokenizer,
    InheritedTokenizer,
    TokenizerConfig,
    TrainedTokenizer,
)
from pretune.data.formats.build import build_formatter
from pretune.data.formats.config import chat_format
from pretune.data.formats.documents import training_texts
from pretune.data.formats.formatter import VERSION as FORMATS_VERSION
from pretune.data.formats.segments import Segment
from pretune.data.formats.special_tokens import TemplateTokens, spellings
from pretune.data.formats.template_source import hub_folder, is_jinja, template_of
from pretune.data.model_tokenizer import read_tokenizer
from pretune.data.segment_encoding import SegmentEncoder
from pretune.data.sources import hub
from pretune.data.sources.rows import Split, identity
from pretune.data.token_bytes import token_bytes
from pretune.data.tokenizer_files import (
    ADDED_IDS,
    CHAT_TEMPLATE,
    END_IDS,
    TEMPLATE_FROM,
    TOKENIZER,
    is_sealed,
    write_about,
)

if TYPE_CHECKING:
    import tokenizers

VERSION = 2
"""Increment when training on the same texts would give a different tokenizer, or other files: it is part of the cache
key."""

TRAINED_EOS = "<|endoftext|>"


class Tokenizer:
    """Converts text to ids and back. Text that spells a special token is treated as ordinary text: only `eos_id` ends a
    document, and only a chat template writes special tokens.

    `end_ids`: tokens that end a generated text as `eos` does; `max_length`: the number of tokens that the tokenizer's
    model was made for, or None; `template_from`: where the chat template was copied from, see TemplateTokens;
    `added_ids`: the tokens that the run has appended, which are the last.

    Raises ConfigError if the tokenizer has no token `eos`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos: str,
        bos: str = "",
        chat_template: str | None = None,
        end_ids: Sequence[int] = (),
        max_length: int | None = None,
        template_from: str | None = None,
        added_ids: Sequence[int] = (),
    ) -> None:
        eos_id = backend.token_to_id(eos)
        if eos_id is None:
            special = [token.content for token in backend.get_added_tokens_decoder().values()]
            raise ConfigError(
                f"data.tokenizer.eos: the tokenizer has no token '{eos}'{nearest(eos, special)}"
                f" (its special tokens: {', '.join(special[:8]) or 'none'})"
            )
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self.beginning: tuple[int, ...] = keep_beginning(backend)
        """The ids that begin each document: BOS, where the tokenizer puts one before a text, else none."""
        self.backend = backend
        bos = bos or "".join(str(backend.id_to_token(one)) for one in self.beginning[:1])
        self.eos, self.bos = eos, bos if bos and backend.token_to_id(bos) is not None else ""
        self.chat_template, self.template_from, self.max_length = chat_template, template_from, max_length
        self.eos_id: int = eos_id
        self.added_ids = tuple(added_ids)
        self.end_ids = frozenset({eos_id, *end_ids})
        """The ids that end a generated text: EOS, and others that the tokenizer's model ends a text with."""
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {index: token.content for index, token in added.items() if token.special}
        """The text of each special token, which `decode` leaves out, by id."""
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end-of-document token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as from `encode`."""
        return [found.ids for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_segments(self, segments: Sequence[Segment]) -> list[list[int]]:
        """The ids of each segment of one document; see encode_documents."""
        return self.encode_documents([segments])[0]

    def encode_documents(self, documents: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """The ids of each segment of each document: tokenized separately, and joined the document; see
        SegmentEncoder. What comes before them is not included: see document_start."""
        return self._segments.encode(documents)

    def document_start(self, ids: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The ids before the segments of a document or of a prompt that begins one, whose own ids these are: none, or
        BOS, unless a chat template has written it. They are not scored."""
        return missing_beginning(self.beginning, ids)

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ids; special tokens are left out, or included if `special`."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    @cached_property
    def _segments(self) -> SegmentEncoder:
        return SegmentEncoder(self.backend, self.beginning)

    @cached_property
    def template_tokens(self) -> TemplateTokens:
        """The tokenizer's chat template and special tokens."""
        special, added = tuple(self.special_tokens.values()), self.backend.get_added_tokens_decoder().values()
        others = tuple(one.content for one in added if not one.special)
        return TemplateTokens(self.chat_template, self.bos, self.eos, special, others, self.template_from)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits that depend on everything that determines a text's ids."""
        content = f"{self.eos}\n{self.backend.to_str()}{self._segments.rule}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def token_bytes(self) -> np.ndarray:
        """The number of bytes of text of each id: [vocab_size] int32, 0 for special tokens.

        The sum over a text's tokens is the length of the text in UTF-8, after the tokenizer's own normalization (for
        Llama 2 that includes the space it puts before a text); for WordPiece, without the spaces; see token_bytes.py.
        """
        lengths = token_bytes(self.backend, self.vocab_size)
        lengths[[self.eos_id, *self.beginning]] = 0
        return lengths

    def with_template(self, chat_template: str | None, template_from: str | None = None) -> Tokenizer:
        """The same tokenizer with another chat template."""
        other = (tuple(self.end_ids), self.max_length, template_from, self.added_ids)
        return Tokenizer(self.backend, self.eos, self.bos, chat_template, *other)

    def save(self, folder: Path) -> None:
        """Save the tokenizer, what begins and ends its texts, and its chat template in a folder that `load_tokenizer`
        and `transformers` can read."""
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos,
            **({"bos_token": self.bos} if self.bos else {}),
            # As training does; and decoding changes nothing. transformers reads this, and llama.cpp's converter.
            "add_bos_token": bool(self.beginning),
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "pretune_fingerprint": self.fingerprint,
            **({TEMPLATE_FROM: self.template_from} if self.template_from else {}),
            **({END_IDS: others} if (others := sorted(self.end_ids - {self.eos_id})) else {}),
            **({"model_max_length": self.max_length} if self.max_length else {}),
            **({ADDED_IDS: list(self.added_ids)} if self.added_ids else {}),
        }
        if self.chat_template is not None:
            write_atomic(folder / CHAT_TEMPLATE, self.chat_template)
        write_atomic(folder / TOKENIZER, self.backend.to_str(pretty=True))
        write_about(folder, about)


def load_tokenizer(config: TokenizerConfig, data: DataConfig, cache: Path) -> Tokenizer:
    """The tokenizer that `config` describes; kind = trained is trained on `data` and kept in `cache`.

    Raises InputError for files that cannot be read or a hub repository that does not exist, ConfigError for an unknown
    eos.
    """
    match config:
        case FileTokenizer():
            tokenizer = _from_files(config.path, config.eos, data, config.add_tokens)
        case HubTokenizer():
            tokenizer = _from_hub(config, data)
        case TrainedTokenizer():
            return _trained(config, data, cache)
        case InheritedTokenizer():
            raise ConfigError("data.tokenizer.kind = inherited needs stage.init_from to inherit from")
    if tokenizer.max_length is not None and data.sequence_length > tokenizer.max_length:
        warn(
            f"data.sequence_length = {data.sequence_length:,}, but the tokenizer in {config.path} says that its model "
            f"was made for {tokenizer.max_length:,} tokens (model_max_length)"
        )
    return tokenizer


def saved_tokenizer(folder: Path, data: DataConfig, add_tokens: AddTokens | None = None) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote to `folder`: as it is or, for another run, with `add_tokens` appended.
    InputError unless all its files are as they were."""
    if not is_sealed(folder):
        raise InputError(
            f"the tokenizer in {folder} is damaged: its files are not what was written; restore them from a copy, or "
            "delete the folder if data.tokenizer still says which tokenizer it was"
        )
    return _from_files(folder, None, data, add_tokens)


def _from_hub(config: HubTokenizer, data: DataConfig) -> Tokenizer:
    path, chat = hub.download_file(config.path, TOKENIZER), chat_format(data.format)
    if chat and chat.template is None:
        hub_folder(config.path)
    return _from_files(path, config.eos, data, config.add_tokens)


def _from_files(path: str | Path, eos: str | None, data: DataConfig, add_tokens: AddTokens | None) -> Tokenizer:
    """The tokenizer at `path`, with `add_tokens` appended (None: it has them); eos and chat template are those of the
    configuration or, if null, from its files."""
    found, chat = read_tokenizer(path, eos), chat_format(data.format)
    added = found.added_ids if add_tokens is None else ()
    if add_tokens:
        tokens = TemplateTokens(found.template, found.bos, found.eos, (), (), found.template_from)
        texts = tokens_to_add(add_tokens, data, tokens, [*found.backend.get_vocab()])
        added = append_tokens(found.backend, texts)
    other = (found.bos, found.template, found.end_ids, found.max_length, found.template_from, added)
    tokenizer = Tokenizer(found.backend, found.eos, *other)
    if chat is None or chat.template is None or chat.template == found.template_from:
        return tokenizer
    template_from = None if is_jinja(chat.template) else chat.template
    return tokenizer.with_template(template_of(chat, tokenizer.template_tokens), template_from)


def _trained(config: TrainedTokenizer, data: DataConfig, cache: Path) -> Tokenizer:
    tokens = TemplateTokens(None, "", TRAINED_EOS, ())
    added = tokens_to_add(config.add_tokens, data, tokens, ())
    depends_on = {
        "version": [VERSION, FORMATS_VERSION],
        "tokenizer": config.model_dump(exclude={"add_tokens"}) | ({"added": added} if added else {}),
        "source": identity(data.source, cache),
        "format": data.format.model_dump(),
        "held_out": asdict(Split.of(data)) if data.validation.fraction else None,
    }
    folder = cache / "tokenizers" / fingerprint(depends_on)
    if not is_sealed(folder):
        if folder.exists():
            warn(f"the tokenizer in {folder} is damaged: it is trained again")
            shutil.rmtree(folder)
        texts = training_texts(data, build_formatter(data.format, replace(tokens, special=added)))
        if added:  # which are no text to learn from
            texts = (spellings(replace(tokens, special=added)).sub("", text) for text in texts)
        backend = train_byte_level(_first(texts, config.max_bytes), config.vocab_size, config.split_digits)
        with atomic_folder(folder) as temporary:
            Tokenizer(backend, TRAINED_EOS).save(temporary)
    return _from_files(folder, TRAINED_EOS, data, config.add_tokens)


def _first(texts: Iterator[str], max_bytes: int) -> Iterator[str]:
    for text in texts:
        if max_bytes <= 0:
            return
        yield text[:max_bytes]
        max_bytes -= len(text.encode())


def train_byte_level(texts: Iterator[str], vocab_size: int, split_digits: bool) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer with at most `vocab_size` tokens: end of document, the 256 bytes, merges."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if split_digits else byte_level
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[TRAINED_EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    return backend
