"""From tokens to text in bounded memory, and when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_sink.stream.text.detokenize import Detokenizer, check


class StopStrings:
    """Cut a stream of text at the first of several strings.

    Text that may turn out to begin one is held back until that is known, which is never more
    than the longest of them.

    Args:
        stops: The strings; empty ones are ignored.

    Attributes:
        held: The text held back.
        found: True once one of them came up.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self.held = ""
        self.found = False

    def feed(self, segment: str) -> str:
        """Take a piece of text and return what can be shown of it so far."""
        text = self.held + segment
        starts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if starts:
            self.found, self.held = True, ""
            return text[: min(starts)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown = len(text) - keep
        self.held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """Return what was still held back, once no more text comes."""
        held, self.held = self.held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class ShownText:
    """The text of one answer: from tokens to what can be shown, and whether it is over.

    Args:
        detokenizer: A fresh one.
        stops: Strings that end the text.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]):
        self.stops = tuple(stops)
        self._detokenizer = detokenizer
        self._search = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """True once a stop string came up."""
        return self._search.found

    def feed(self, token: int) -> str:
        """Take a token and return what can be shown."""
        return self._search.feed(self._detokenizer.feed(token))

    def finish(self) -> str:
        """Return what was held back, once no more tokens come."""
        shown = self._search.feed(self._detokenizer.finish())
        return shown if self.stopped else shown + self._search.finish()

    def state(self) -> list[Any]:
        """Return all that the text to come depends on, JSON-ready."""
        return [list(self.stops), self._detokenizer.state(), self._search.held]

    @classmethod
    def restored(cls, detokenizer: Detokenizer, state: list[Any]) -> ShownText:
        """Go on from a `state` with a fresh detokenizer."""
        check(state, list, list, str)
        stops, inner, held = state
        check(stops, *[str] * len(stops))
        text = cls(detokenizer, stops)
        detokenizer.restore(inner)
        text._search.held = held
        return text
