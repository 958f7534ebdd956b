"""Print documents as training sees them, with scored tokens marked."""

from __future__ import annotations

import itertools

from rich.console import Console
from rich.text import Text

from pretune.core.terminal import printable
from pretune.data.formats.special_tokens import spellings
from pretune.data.tokenizer import Tokenizer
from pretune.data.tokens import TokenData

SCORED, UNSCORED = "bold green", "dim"
MARKS = ("[[", "]]")
"""Put around scored text where there are no colors."""

ESCAPE = "\\"
"""Put before text that spells a special token and is none."""


def show_documents(
    console: Console, title: str, data: TokenData, tokenizer: Tokenizer, count: int, max_tokens: int
) -> None:
    """Print the first `count` documents of `data`, at most `max_tokens` tokens of each: scored text is green, or
    between [[ and ]] if the output is not a terminal."""
    ends = data.document_ends[:count].tolist()
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), start=1):
        stop = min(end, start + max_tokens)
        tokens, flags = data.read(start, stop)
        scored = [True] * len(tokens) if flags is None else flags.tolist()
        found = data.read(start, end)[1]
        num_scored = end - start if found is None else int(found.sum())
        heading = f"{title} {number} of {data.num_documents:,}: {end - start:,} tokens, {num_scored:,} scored"
        console.rule(Text(heading), align="left", characters="-")
        text = marked(tokenizer, tokens.tolist(), scored, console)
        if stop < end:
            text.append(f" ... {end - stop:,} tokens more")
        console.print(text, soft_wrap=True)


def marked(tokenizer: Tokenizer, tokens: list[int], scored: list[bool], console: Console) -> Text:
    """The text of tokens, including special tokens, with scored text in color or between marks. Text that only spells a
    special token has a backslash before it."""
    text = Text()
    pairs = zip(tokens, scored, strict=True)
    for is_scored, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        part = _written(tokenizer, [token for token, _ in group])
        part = printable(part, console.encoding)
        before, after = MARKS if is_scored and not console.is_terminal else ("", "")
        text.append(f"{before}{part}{after}", style=SCORED if is_scored else UNSCORED)
    return text


def _written(tokenizer: Tokenizer, tokens: list[int]) -> str:
    spelled = spellings(tokenizer.template_tokens)
    if not spelled.search(tokenizer.decode(tokens)):
        return tokenizer.decode(tokens, special=True)
    ids = {tokenizer.backend.token_to_id(text) for text in (*tokenizer.template_tokens.special, tokenizer.eos)}
    parts: list[str] = []
    for is_special, group in itertools.groupby(tokens, key=lambda token: token in ids):
        text = tokenizer.decode(list(group), special=True)
        parts.append(text if is_special else spelled.sub(lambda found: ESCAPE + found[0], text))
    return "".join(parts)
