"""What mlx-lm would do to our caches without a word, refused in words that name ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from mlx_sink.errors import CacheError
from mlx_sink.io.tensors import Omitted


@dataclass(frozen=True, slots=True)
class Unsaved(Omitted):
    """A part of a state that mlx-lm evaluates and copies with it, and cannot save.

    ``save_prompt_cache`` would write a file that ``load_prompt_cache`` cannot load: it knows none
    of our classes. As the state holds something that is no value, it raises, before it writes
    anything, and puts this into its message.
    """

    def __str__(self) -> str:
        """Return what to do instead."""
        return "a sink cache is saved with its stream, by mlx_sink.Stream.save, and resumed by it"


class Refusals:
    """A cache that mlx-lm's ``kv_bits`` does not quantise later on."""

    @property
    def to_quantized(self) -> NoReturn:
        """Refuse mlx-lm's ``kv_bits``.

        mlx-lm asks each cache for this method in its first call, and ignores the option for one
        that has none. It calls it only when `offset` has reached ``quantized_kv_start``, which a
        bounded one may never do: so it is the question that raises.

        Raises:
            CacheError: Always.
        """
        raise CacheError(
            "a sink cache is quantised from its first token or not at all: instead of mlx-lm's "
            "kv_bits, attach with SinkConfig(kv_bits=...)"
        )
