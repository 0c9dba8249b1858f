"""What it takes for a cache to take back its newest tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Rewindable(ABC):
    """A cache that can take back its newest tokens. Of mlx-lm's, recurrent ones cannot.

    Ours say so by this class, and not by the methods that they happen to have: what one of them
    lacks would be taken for "no limit" here and for "nothing" there.
    """

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Tokens seen since the stream began."""

    @property
    @abstractmethod
    def rollback(self) -> int:
        """Spare slots: tokens that can be taken back at any time."""

    @property
    @abstractmethod
    def spare(self) -> int:
        """Tokens that `trim` can take back now."""

    @abstractmethod
    def is_trimmable(self) -> bool:
        """Tell whether tokens can be taken back at any time."""

    @abstractmethod
    def trim(self, n: int) -> int:
        """Take back the newest ``n`` tokens, as if they had never come.

        Returns:
            The tokens taken back: n, or all there are if those are fewer.

        Raises:
            CacheError: n is more than `spare`, so the result would be wrong. Nothing changes.
        """

    @abstractmethod
    def reopen(self) -> None:
        """Take back the newest token once more than `spare` allows, to read the same one again."""

    @abstractmethod
    def empty(self) -> bool:
        """Tell whether nothing was taken in yet."""


def rollback_of(cache: Any) -> int:
    """Return how many tokens a cache of any kind can take back at any time."""
    return cache.rollback if isinstance(cache, Rewindable) and cache.is_trimmable() else 0
