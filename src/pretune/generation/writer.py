"""Turn streamed tokens into text, withholding characters that a later token could still change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Writer:
    """The text of one continuation.

    It withholds incomplete characters, whose bytes are split over several tokens, and anything that may be the
    beginning of a stop string. `text` ends before the first stop string, regardless of token boundaries.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self._tokens: list[int] = []
        # Tokens before _read are in the text already. Decoding starts at _window, one chunk earlier, because some
        # tokenizers decode a token differently at the start of a text than after another token.
        self._window = self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add one token; return the text that can be shown now."""
        self._tokens.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        return "" if self.stopped else self._take(final=True)

    def _take(self, final: bool) -> str:
        decoded = self._decode(self._tokens[self._window :])
        if final or not decoded.endswith(_REPLACEMENT):
            known = self._decode(self._tokens[self._window : self._read])
            self._held += decoded[len(known) :]
            self._window, self._read = self._read, len(self._tokens)
        shown = self._free(final)
        self.text += shown
        return shown

    def _free(self, final: bool) -> str:
        """Release the withheld text up to where a stop string may begin."""
        ends = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            return self._held[: min(ends)]
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
