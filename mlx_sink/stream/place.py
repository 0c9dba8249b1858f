"""Where a stream stands: what can be asked of one at any time."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from mlx_sink.config import ALWAYS
from mlx_sink.models.attach import config_of
from mlx_sink.stream.loop import Loop


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
