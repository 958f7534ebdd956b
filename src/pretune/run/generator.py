"""A run's model as a text generator with its training prompt format: for samples, evaluation and task=generate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch

from pretune.compute.compilation import compile_frozen
from pretune.compute.config import PrecisionConfig
from pretune.compute.precision import autocast, dtype_of
from pretune.core.named_tensors import is_sharded
from pretune.data.formats.build import build_formatter
from pretune.data.formats.formatter import Formatter
from pretune.data.formats.segments import Segment
from pretune.data.tokenizer import Tokenizer
from pretune.generation.config import DecodingConfig
from pretune.generation.decode import Compiled, Decoder, LanguageModel, Vocabulary
from pretune.generation.texts import Piece, Text, in_batches, stream
from pretune.model.packed import packed
from pretune.model.transformer import Transformer
from pretune.run.config import RunConfig
from pretune.run.endings import endings


def _packed_copy(model: LanguageModel, precision: PrecisionConfig) -> LanguageModel | None:
    if not isinstance(model, Transformer) or is_sharded(model):  # torch does not copy models that are shared out
        return None
    return packed(model, dtype_of(precision.activations))


@dataclass(frozen=True)
class TextGenerator:
    """A model with everything needed to turn a prompt into text. Generate inside `autocast()`."""

    decoder: Decoder
    tokenizer: Tokenizer
    formatter: Formatter
    decoding: DecodingConfig
    precision: PrecisionConfig

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Autocast to the run's precision. Keep it open for many tokens, so that weights are converted only once."""
        return autocast(self.precision, self.decoder.device)

    def prompt_segments(self, question: str, template: bool) -> list[Segment]:
        """A question in the prompt format of the run's data, or unchanged if not `template`."""
        if not template:
            return [Segment(question, False)]
        return self.formatter.render_prompt([{"role": "user", "content": question}])

    def ids(self, prompt: Sequence[Segment]) -> list[int]:
        """The tokens of a prompt, which begin as a document does in training. An empty prompt of a tokenizer that puts
        nothing before a text becomes EOS, after which a new document starts."""
        parts = self.tokenizer.encode_segments(prompt)
        tokens = [*self.tokenizer.document_start(parts), *chain.from_iterable(parts)]
        return tokens or [self.tokenizer.eos_id]

    def stream(self, prompt: Sequence[int]) -> Iterator[Piece]:
        """Stream the text after one prompt."""
        return stream(self.decoder, self.tokenizer, [prompt], self.decoding)

    def generate(self, prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[tuple[int, Text]]:
        """The index and the generated text of each prompt, `batch_size` prompts at a time; see in_batches."""
        return in_batches(self.decoder, self.tokenizer, prompts, self.decoding, batch_size)


def assemble_generator(
    config: RunConfig,
    decoding: DecodingConfig,
    model: LanguageModel,
    tokenizer: Tokenizer,
    device: torch.device,
    compiled_rows: int | None = None,
) -> TextGenerator:
    """A run's text generator. Texts end where those of training do, see endings; for `compiled_rows` see Compiled.

    Raises ConfigError for an end token that the tokenizer does not have.
    """
    formatter = build_formatter(config.data.format, tokenizer.template_tokens)
    found = endings(tokenizer, formatter, decoding.end_tokens, decoding.stop)
    vocabulary = Vocabulary(tokenizer.vocab_size, found.ids)
    compiled = None if compiled_rows is None else Compiled(compiled_rows, compile_frozen)
    decoder = Decoder(model, vocabulary, device, compiled, partial(_packed_copy, model, config.precision))
    return TextGenerator(
        decoder, tokenizer, formatter, decoding.model_copy(update={"stop": found.strings}), config.precision
    )
