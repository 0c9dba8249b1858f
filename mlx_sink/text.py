"""From tokens to text in bounded memory, and when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StopStrings:
    """Cut a stream of text at the first of several strings.

    Text that may turn out to begin one is held back until that is known, which is never more
    than the longest of them.

    Args:
        stops: The strings; empty ones are ignored.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def feed(self, segment: str) -> str:
        """Take a piece of text and return what can be shown of it so far."""
        text = self._held + segment
        starts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown = len(text) - keep
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """Return what was still held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def forget(detokenizer: Any) -> None:
    """Let one of mlx-lm's streaming detokenizers drop the text and tokens already read.

    They keep the whole text otherwise, and copy it for every token. Call it after reading
    ``last_segment``; the text to come is the same.
    """
    detokenizer.tokens.clear()
    if "text" in vars(detokenizer):
        # The last character stays: at the very start of a text a space would be trimmed.
        detokenizer.text = detokenizer.text[-1:]
        detokenizer.offset = len(detokenizer.text)
    elif "_text" in vars(detokenizer):
        done = len(detokenizer._text)
        detokenizer._text, detokenizer.offset = "", max(0, detokenizer.offset - done)
