"""Several caches that take in the same tokens, and the flat list of a model's caches."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from mlx_sink.cache.refusals import Refusals, Unsaved
from mlx_sink.cache.rewindable import Rewindable, rollback_of
from mlx_sink.errors import CacheError
from mlx_sink.io.tensors import Omitted


class CacheGroup(Rewindable, Refusals):
    """Several caches that take in the same tokens: those of a layer, or all of a stream's.

    mlx-lm knows those of a layer as a ``CacheList``. A cache that its model never feeds holds no
    token: it has none to give back, and sets the others no limit.

    Args:
        caches: Caches of ours or of mlx-lm's, or groups of them.
    """

    def __init__(self, *caches: Any):
        self.caches = caches

    def __copy__(self) -> CacheGroup:
        return CacheGroup(*map(copy, self.caches))

    def __getitem__(self, i: int) -> Any:
        return self.caches[i]

    @property
    def offset(self) -> int:
        """Position of the next token, the same in all rings that are fed; 0 without one."""
        return max((getattr(cache, "offset", 0) for cache in self.caches), default=0)

    def is_trimmable(self) -> bool:
        """Tell whether tokens can be taken back from all of them at any time."""
        return all(cache.is_trimmable() for cache in self.caches)

    @property
    def tokens(self) -> int:
        """Tokens seen since the stream began; 0 where no cache counts them."""
        return max((c.tokens for c in self.caches if isinstance(c, Rewindable)), default=0)

    @property
    def rollback(self) -> int:
        """Tokens that all of them can take back at any time."""
        return min(map(rollback_of, self.caches), default=0)

    @property
    def spare(self) -> int:
        """Tokens that `trim` can take back now: as many as all can that hold any."""
        return min((c.spare if isinstance(c, Rewindable) else 0 for c in self._fed), default=0)

    def trim(self, n: int) -> int:
        """Take back the newest ``n`` tokens from all of them, or from none; see `Rewindable`."""
        fed, spare = self._fed, self.spare
        if not fed:
            return 0
        if spare == self.tokens:
            n = min(n, spare)
        if not 0 <= n <= spare:
            raise CacheError(f"cannot take back {n} tokens, only {spare}")
        for cache in fed if n else ():
            cache.trim(n)
        return n

    def reopen(self) -> None:
        """See `Rewindable`."""
        for cache in self._fed:
            cache.reopen()

    @property
    def _fed(self) -> list[Any]:
        return [cache for cache in self.caches if not cache.empty()]

    def size(self) -> int:
        """Return the tokens held."""
        return max((cache.size() for cache in self.caches), default=0)

    def empty(self) -> bool:
        """Tell whether nothing was taken in yet."""
        return not self._fed

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(cache.nbytes for cache in self.caches)

    @property
    def state(self) -> list[Any]:
        """The states of the caches."""
        return [*(cache.state for cache in self.caches), Unsaved()]

    @state.setter
    def state(self, value: Sequence[Any]) -> None:
        states = [state for state in value if not isinstance(state, Omitted)]
        for cache, state in zip(self.caches, states, strict=True):
            cache.state = state


def leaves(caches: Sequence[Any]) -> list[Any]:
    """Return the caches of a model's list, those in groups one by one."""
    flat: list[Any] = []
    for cache in caches:
        flat.extend(leaves(cache.caches) if isinstance(cache, CacheGroup) else [cache])
    return flat
