"""Layers that attend to another layer's rows, recognised by the rows themselves.

Some models name no cache when they do that. The caches whose rows are known to be lent are noted
here, by thread, and asked whether the keys are theirs.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

import mlx.core as mx


class Lender(Protocol):
    """A cache whose rows other layers attend to."""

    def handed_out(self, keys: mx.array) -> bool:
        """Tell whether these are the very keys last fetched from it."""
        ...


class _Lenders(threading.local):
    def __init__(self) -> None:
        self.known: dict[int, weakref.ref[Lender]] = {}


_lenders = _Lenders()


def note(cache: Lender) -> None:
    """Note a lender; it is forgotten when it is gone."""
    known = _lenders.known
    if id(cache) not in known:
        for key in [key for key, lender in known.items() if lender() is None]:
            del known[key]
    known[id(cache)] = weakref.ref(cache)


def lender_of(keys: mx.array) -> Lender | None:
    """Return the lender that handed out keys last, in this thread."""
    for known in _lenders.known.values():
        lender = known()
        if lender is not None and lender.handed_out(keys):
            return lender
    return None
