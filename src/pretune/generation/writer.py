"""Turn streamed tokens into text, withholding characters that a later token could still change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_CONTEXT = 8
"""Number of tokens before a continuation that its decoding looks at."""


class Writer:
    """The text of one continuation.

    It withholds incomplete characters, whose bytes are split over several tokens, and anything that may be the
    beginning of a stop string. `text` ends before the first stop string, regardless of token boundaries.

    `before`: the tokens that are continued; some tokenizers decode a token differently at the start of a text.
    `special`: the text of special tokens, which `decode` leaves out, by id. A stop string may contain it; what is shown
    does not.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str],
        before: Sequence[int] = (),
        special: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self._decode, self._stop = decode, stop
        self._special = {token: text for token, text in special.items() if any(text in one for one in stop)}
        self._tokens = list(before)[-_CONTEXT:]
        # Tokens before _read are in the text already. Decoding starts at _window, one chunk earlier.
        self._window, self._read = 0, len(self._tokens)
        self._held: list[tuple[str, bool]] = []
        """Characters that are withheld, and whether they are shown once they are free."""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add one token; return the text that can be shown now."""
        if token in self._special:
            self._held += [(character, False) for character in self._special[token]]
        else:
            self._tokens.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        return "" if self.stopped else self._take(final=True)

    def _take(self, final: bool) -> str:
        decoded = self._decode(self._tokens[self._window :])
        if self._read < len(self._tokens) and (final or not decoded.endswith(_REPLACEMENT)):
            known = self._decode(self._tokens[self._window : self._read])
            self._held += [(character, True) for character in decoded[len(known) :]]
            self._window, self._read = self._read, len(self._tokens)
        shown = self._free(final)
        self.text += shown
        return shown

    def _free(self, final: bool) -> str:
        """Release the withheld text up to where a stop string may begin."""
        held = "".join(character for character, _ in self._held)
        ends = [at for at in (held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            free = min(ends)
        else:
            free = len(held) - (0 if final else max((_overlap(held, stop) for stop in self._stop), default=0))
        shown = "".join(character for character, visible in self._held[:free] if visible)
        del self._held[:free]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
