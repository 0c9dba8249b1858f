"""Where a stream stands: what can be asked of one at any time."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.nn as nn

from mlx_sink.cache.group import leaves
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.config import ALWAYS
from mlx_sink.models.attach import config_of
from mlx_sink.stream.loop import Loop


class Archived(NamedTuple):
    """What a stream can look up.

    Attributes:
        tokens: Which tokens, by their index in the stream. Those before them and after the sinks
            are forgotten.
        nbytes: Bytes of the archives of all layers.
    """

    tokens: range
    nbytes: int


class Place:
    """The public view of a stream's loop."""

    _loop: Loop

    @property
    def model(self) -> nn.Module:
        """The model that the stream runs on."""
        return self._loop.model

    @property
    def caches(self) -> list[Any]:
        """The stream's caches, one for each layer."""
        return self._loop.caches

    @property
    def position(self) -> int:
        """Tokens read and made since the stream began."""
        return self._loop.position

    @property
    def nbytes(self) -> int:
        """Bytes of the caches, the draft model's included."""
        return self._loop.nbytes

    @property
    def drafted(self) -> tuple[int, int]:
        """Tokens that the draft model has guessed so far, and how many of them were right."""
        return self._loop.drafted

    @property
    def recalls_always(self) -> bool:
        """Whether whatever is fed looks up evicted tokens, and not only questions."""
        config = config_of(self.model)
        return config is not None and config.recall_mode == ALWAYS

    @property
    def archived(self) -> Archived | None:
        """What has left the window and can be looked up; ``None`` without recall."""
        rings = [c for c in leaves(self.caches) if isinstance(c, SinkCache) and c.archive]
        if not rings:
            return None
        ring, archives = rings[0].ring, [c.archive for c in rings if c.archive]
        held = archives[0].held(ring)
        first, b = ring.num_sinks, ring.block
        tokens = range(first + held.start * b, first + held.stop * b)
        return Archived(tokens, sum(archive.nbytes for archive in archives))
