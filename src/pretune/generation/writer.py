"""From tokens to text as they come: nothing is shown that a later token could still change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Writer:
    """The text of one continuation.

    Held back are the halves of a character whose bytes lie in several tokens, and whatever may be the beginning of a
    stop string. `text` ends before the first stop string, wherever tokens begin and end.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self._tokens: list[int] = []
        # Tokens up to _read are in the text. Those from _window are decoded again: some tokenizers write a token
        # otherwise at the start of a text than behind another one.
        self._window = self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Take one more token; return what can be shown now."""
        self._tokens.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """No token follows; return the rest of the text."""
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
        """Take from what is held back all that no stop string can begin in."""
        ends = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            return self._held[: min(ends)]
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, and is longer than."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
