"""A KV cache of fixed size that speaks mlx-lm's cache protocol; no attention arithmetic."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx

from mlx_sink.config import SinkConfig
from mlx_sink.errors import CacheError
from mlx_sink.ring import Layout, Ring, layout_of
from mlx_sink.rope import Rotation
from mlx_sink.storage import Packed, storage_of


class SinkCache:
    """The keys and values of one layer: the sinks, and the newest tokens in a ring.

    `offset` is what the model's RoPE reads: tokens since the epoch began, which stays bounded.
    The length of the stream is `tokens`.

    Args:
        config: What to keep.
        rotation: The layer's rotary embedding.
    """

    def __init__(self, config: SinkConfig, rotation: Rotation):
        self.ring = Ring.from_config(config)
        self.rotation = rotation
        k_bits, v_bits = config.bits
        self._keys, self._values = storage_of(config, k_bits), storage_of(config, v_bits)
        self._pending: Layout | None = None
        self._packed: tuple[Packed, Packed] | None = None

    @property
    def keys(self) -> Any:
        """The array of keys, slots in order, or those of quantised ones; ``None`` if empty."""
        return self._keys.state

    @property
    def values(self) -> Any:
        """As `keys`."""
        return self._values.state

    @property
    def tokens(self) -> int:
        """Tokens seen since the stream began."""
        return self.ring.tokens

    @property
    def offset(self) -> int:
        """Position of the next token, as RoPE is to see it; below two epochs and a chunk."""
        return self.ring.position

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Take in new tokens and return the rows that they attend to.

        Args:
            keys: ``[B, n_kv_heads, L, head_dim]`` after RoPE at `offset`.
            values: ``[B, n_kv_heads, L, v_head_dim]``.

        Returns:
            Keys and values with rows as the layout of `take_layout` says.

        Raises:
            CacheError: The rows of the call before were never attended to.
        """
        if self._pending is not None:
            raise CacheError(
                "the model does not attend through mlx_sink: "
                "keys were fetched twice without an attention call between"
            )
        layout = self._pending = layout_of(self.ring, keys.shape[2])
        self.ring = layout.after
        k, v = self._keys.update(layout, keys), self._values.update(layout, values)
        if isinstance(k, Packed) and isinstance(v, Packed):
            # A kernel reads them as they are; where one serves, the others are never computed.
            self._packed = k, v
            return k.expanded(), v.expanded()
        return cast("mx.array", k), cast("mx.array", v)

    @property
    def is_pending(self) -> bool:
        """True between fetching rows and attending to them."""
        return self._pending is not None

    def take_layout(self) -> Layout:
        """Return the layout of the rows last fetched, and note that they are attended to.

        Raises:
            CacheError: Nothing was fetched since the last time.
        """
        layout, self._pending = self._pending, None
        if layout is None:
            raise CacheError("attention was called without new keys: shared KV is not supported")
        return layout

    def take_packed(self) -> tuple[Packed, Packed] | None:
        """Return the rows last fetched as they are held, if quantised; held no longer after."""
        packed, self._packed = self._packed, None
        return packed

    def make_mask(
        self, n: int, window_size: int | None = None, return_array: bool = False
    ) -> str | None:
        """Answer mlx-lm's question for a mask: none is needed, the layout says it all.

        Raises:
            CacheError: The model asks for its own window or for a mask array.
        """
        if window_size is not None or return_array:
            raise CacheError("the model wants a mask of its own for this layer")
        return None if n == 1 else "causal"

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> None:
        """Refuse mlx-lm's ``kv_bits``: without this method it would be ignored silently.

        Raises:
            CacheError: Always.
        """
        raise CacheError(
            f"a sink ring is quantised from its first token or not at all: instead of mlx-lm's "
            f"kv_bits, attach with SinkConfig(kv_bits={bits})"
        )

    def is_trimmable(self) -> bool:
        """Tell whether tokens can be taken back at any time: with spare slots they can.

        mlx-lm asks once, before it starts to draft tokens, and ignores a refusal later. So without
        spare slots this says no from the start, although `trim` works until the first eviction,
        and its speculative decoding refuses such a cache in one line.
        """
        return self.ring.rollback > 0

    @property
    def rollback(self) -> int:
        """Spare slots: tokens that can be taken back at any time."""
        return self.ring.rollback

    @property
    def spare(self) -> int:
        """Tokens that `trim` can take back now."""
        return self.ring.spare

    def trim(self, n: int) -> int:
        """Take back the newest ``n`` tokens, as if they had never come.

        Returns:
            The tokens taken back: n, or all there are if those are fewer.

        Raises:
            CacheError: n is more than `spare`, so the result would be wrong.
        """
        n = min(n, self.ring.tokens)
        self.ring = self.ring.trimmed(n)
        return n

    def reopen(self) -> None:
        """Take back the newest token once more than `spare` allows, to read the same one again."""
        self.ring = self.ring.reopened()

    def size(self) -> int:
        """Return the tokens held."""
        return self.ring.live

    def empty(self) -> bool:
        """Tell whether nothing was taken in yet."""
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self._keys.nbytes + self._values.nbytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one sequence that is no sink; 0 before the first."""
        return self._keys.bytes_per_token + self._values.bytes_per_token

    @property
    def bytes_per_sink(self) -> int:
        """Bytes of one sink of one sequence; 0 before the first."""
        return self._keys.bytes_per_sink + self._values.bytes_per_sink

    @property
    def state(self) -> tuple[Any, ...]:
        """The arrays and the integers of the ring, in the form mlx-lm evaluates and copies.

        The arrays are the live ones, which later tokens are written into: copy them to keep them.
        """
        ring = self.ring
        sizes, stands = (ring.num_sinks, ring.window, ring.epoch), (ring.tokens, ring.start)
        since = ring.previous, ring.rollback, ring.taken_back
        return self.keys, self.values, *sizes, *stands, *since

    @state.setter
    def state(self, value: tuple[Any, ...]) -> None:
        keys, values, *integers = value
        self.ring = Ring(*integers)
        extent = self.ring.extent
        self._keys = self._keys.restored(keys, extent)
        self._values = self._values.restored(values, extent)
        self._pending = self._packed = None
