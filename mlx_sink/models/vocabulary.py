"""How many tokens a model can read: the rows of the table that turns ids into vectors.

Neither the configuration nor the width of the logits says it: heads are padded, tokenizers have
words that were never trained, and MLX reads past the end of a table without a word.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_sink.errors import ModelError


class _LookUp(Exception):  # noqa: N818  (it ends a forward pass, and is no error)
    """A table was asked for rows by number: there is nothing more to watch."""

    def __init__(self, rows: int):
        self.rows = rows


_here = threading.local()
_patching = threading.Lock()


def vocabulary(model: nn.Module) -> int:
    """Return how many tokens a model can read: those from 0 up to this one, not included.

    Found by watching a forward pass that goes no farther than the first two-dimensional weight,
    plain or quantised, that is called with integers. Nothing is computed. For a model that looks
    tokens up in another way, the width of its logits.
    """
    make = getattr(model, "make_cache", None)
    caches = None if make is None else make()
    with _watched(model):
        try:
            logits = cast("Any", model)(mx.zeros((1, 1), mx.int32), cache=caches)
        except _LookUp as look_up:
            return look_up.rows
    return int(logits.shape[-1])


@contextmanager
def _watched(model: nn.Module) -> Generator[None]:
    """Have each table of the model raise when this thread looks a row up by its number."""
    kinds = {type(m) for m in cast("list[nn.Module]", model.modules()) if _rows(m)}
    # A class that has no `__call__` of its own has that of one above it.
    owners = {k for kind in kinds for k in kind.__mro__ if "__call__" in vars(k)}
    with _patching, ExitStack() as stack:
        for owner in owners:
            original = vars(owner)["__call__"]
            type.__setattr__(owner, "__call__", _raising(original))
            stack.callback(type.__setattr__, owner, "__call__", original)
        stack.callback(setattr, _here, "watching", False)
        _here.watching = True
        yield


def _raising(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: nn.Module, x: Any, *args: Any, **options: Any) -> Any:
        if getattr(_here, "watching", False) and isinstance(x, mx.array):
            rows = _rows(self)
            if rows and mx.issubdtype(x.dtype, mx.integer):
                raise _LookUp(rows)
        return original(self, x, *args, **options)

    return call


def _rows(module: nn.Module) -> int:
    """Return the rows of a module's own table; 0 if it has none."""
    weight = cast("dict[str, Any]", module).get("weight")
    return weight.shape[0] if isinstance(weight, mx.array) and weight.ndim == 2 else 0


def check_vocabulary(tokenizer: Any, draft_tokenizer: Any) -> None:
    """Raise unless two tokenizers give a text the same tokens.

    Special tokens may differ: families of models often name their reserved ones otherwise.

    Raises:
        ModelError: They have other vocabularies.
    """
    ours, theirs = (
        {word: i for word, i in t.get_vocab().items() if word not in t.get_added_vocab()}
        for t in (tokenizer, draft_tokenizer)
    )
    if ours != theirs:
        alike = len(ours.items() & theirs.items())
        raise ModelError(
            f"the draft model's tokenizer does not match the model's: of its {len(theirs)} "
            f"tokens {alike} are among the model's {len(ours)}; use one of the same family"
        )
