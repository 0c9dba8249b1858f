"""mlx-lm's wired limit, held while any stream of the process runs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, wired_limit


class _Wired:
    """mlx-lm's wired limit, which is the process's: set by the first stream, back by the last."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self._limit: Any = None

    @contextmanager
    def __call__(self, model: nn.Module) -> Generator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._limit = wired_limit(model, cast("list[mx.Stream]", [generation_stream]))
                self._limit.__enter__()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._limit.__exit__(None, None, None)


wired = _Wired()
"""Context manager: memory stays wired on a Mac while any stream generates."""
