"""Tokens to text, one at a time.

What token i releases is a pure function of the pieces of tokens 0..i and the stop strings, so that a job
which another Island started goes on with exactly the characters that are still due. Whatever might yet turn
out to be the beginning of a stop string, and bytes that do not yet make a character, are held back.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Text of one output. Feed it the pieces in order; after `stopped` there is no more text."""

    __slots__ = ("_decoder", "_held", "_stops", "stopped")

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def push(self, piece: bytes) -> str:
        """The text that this piece releases. Sets `stopped` when it completes a stop string; the text
        before that is released, the stop string and what follows are not.
        """
        if self.stopped:
            return ""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """The text still held back, when the output ends for another reason than a stop string."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        text += self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if not self._stops:
            return text
        held = self._held + text
        cut = _first_stop(held, self._stops)
        if cut >= 0:
            self.stopped = True
            self._held = ""
            return held[:cut]
        keep = _possible_stop(held, self._stops)
        self._held = held[len(held) - keep :] if keep else ""
        return held[: len(held) - keep]


def _first_stop(text: str, stops: Sequence[str]) -> int:
    """Where the stop string begins that is complete first (of those that end together, the longest). Or -1."""
    best: tuple[int, int] | None = None
    for stop in stops:
        start = text.find(stop)
        if start >= 0:
            found = (start + len(stop), start)
            if best is None or found < best:
                best = found
    return -1 if best is None else best[1]


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string begins."""
    longest = max(len(stop) for stop in stops) - 1
    for length in range(min(longest, len(text)), 0, -1):
        end = text[len(text) - length :]
        if any(stop.startswith(end) for stop in stops):
            return length
    return 0
