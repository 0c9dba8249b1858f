"""Several caches of one layer, and the flat list of a model's caches."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from mlx_sink.errors import CacheError


class CacheGroup:
    """Several caches of one layer, which mlx-lm knows as a ``CacheList``.

    Args:
        caches: Caches of ours or of mlx-lm's.
    """

    def __init__(self, *caches: Any):
        self.caches = caches

    def __copy__(self) -> CacheGroup:
        return CacheGroup(*map(copy, self.caches))

    def __getitem__(self, i: int) -> Any:
        return self.caches[i]

    @property
    def offset(self) -> int:
        """Position of the next token, as the first ring has it; 0 without one."""
        return next((cache.offset for cache in self.caches if hasattr(cache, "offset")), 0)

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> CacheGroup:
        """Refuse mlx-lm's ``kv_bits``, as `SinkCache` does: mlx-lm would ignore it silently.

        Raises:
            CacheError: Always.
        """
        raise CacheError(
            f"sink rings are quantised from the first token or not at all: instead of mlx-lm's "
            f"kv_bits, attach with SinkConfig(kv_bits={bits})"
        )

    def is_trimmable(self) -> bool:
        """Tell whether tokens can be taken back from all of them."""
        return all(cache.is_trimmable() for cache in self.caches)

    def trim(self, n: int) -> int:
        """Take back the newest ``n`` tokens; see `SinkCache.trim`."""
        taken_back = [cache.trim(n) for cache in self.caches]
        return taken_back[0]

    def size(self) -> int:
        """Return the tokens held."""
        return max(cache.size() for cache in self.caches)

    def empty(self) -> bool:
        """Tell whether nothing was taken in yet."""
        return self.caches[0].empty()

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(cache.nbytes for cache in self.caches)

    @property
    def state(self) -> list[Any]:
        """The states of the caches."""
        return [cache.state for cache in self.caches]

    @state.setter
    def state(self, value: Sequence[Any]) -> None:
        for cache, state in zip(self.caches, value, strict=True):
            cache.state = state


def leaves(caches: Sequence[Any]) -> list[Any]:
    """Return the caches of a model's list, those in groups one by one."""
    flat: list[Any] = []
    for cache in caches:
        flat.extend(cache.caches if isinstance(cache, CacheGroup) else [cache])
    return flat
