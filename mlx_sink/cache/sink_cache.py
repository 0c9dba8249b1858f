"""A KV cache of fixed size that speaks mlx-lm's cache protocol; no attention arithmetic."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx

from mlx_sink.attention.layout import Layout, layout_of
from mlx_sink.attention.packed import Packed
from mlx_sink.attention.recall import Archived
from mlx_sink.attention.reference import mask_of
from mlx_sink.attention.ring import Ring
from mlx_sink.attention.rope import Rotation
from mlx_sink.cache import kv_sharing
from mlx_sink.cache.archive import Archive
from mlx_sink.cache.refusals import Refusals, Unsaved
from mlx_sink.cache.rewindable import Rewindable
from mlx_sink.cache.storage import storage_of
from mlx_sink.config import SinkConfig
from mlx_sink.errors import CacheError, UnsupportedModelError
from mlx_sink.io.tensors import Omitted


class SinkCache(Rewindable, Refusals):
    """The keys and values of one layer: the sinks, and the newest tokens in a ring.

    `offset` is what the model's RoPE reads: tokens since the epoch began, which stays bounded.
    The length of the stream is `tokens`.

    Without sinks it is the ring of a layer with a sliding window.

    Args:
        config: What to keep.
        rotation: The layer's rotary embedding.
        lends: Other layers attend to this one's rows too, and may name no cache.
        limit: Positions from which on the model would compute something else, or ``None``.
        chunked: A token sees only its own chunk of ``window`` tokens (Llama 4).
        archive: Where evicted blocks go, for a layer that recalls.

    Attributes:
        recalls: The tokens of the next call look up evicted blocks, if there is an archive.
    """

    def __init__(
        self,
        config: SinkConfig,
        rotation: Rotation,
        *,
        lends: bool = False,
        limit: int | None = None,
        chunked: bool = False,
        archive: Archive | None = None,
    ):
        self.ring = replace(Ring.from_config(config), chunked=chunked)
        self.rotation = rotation
        self.lends = lends
        self.limit = limit
        self.archive = archive
        self.recalls = True
        self._archived: Archived | None = None
        k_bits, v_bits = config.bits
        self._keys, self._values = storage_of(config, k_bits), storage_of(config, v_bits)
        self._layout: Layout | None = None
        self._is_pending = False
        self._fetched: weakref.ref[mx.array] | None = None
        self._lent: tuple[mx.array, mx.array] | None = None
        self._packed: tuple[Packed, Packed] | None = None

    @property
    def keys(self) -> Any:
        """The array of keys, slots in order, or those of quantised ones; ``None`` if empty.

        Some models put an array in its place, for when it is computed.
        """
        return self._keys.state

    @keys.setter
    def keys(self, value: Any) -> None:
        self._keys = self._keys.restored(value, self.ring.extent)

    @property
    def values(self) -> Any:
        """As `keys`."""
        return self._values.state

    @values.setter
    def values(self, value: Any) -> None:
        self._values = self._values.restored(value, self.ring.extent)

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
            CacheError: The rows of the call before were never attended to, or the call is too
                long for `limit`.
        """
        if self._is_pending:
            raise CacheError(
                "the model does not attend through mlx_sink: "
                "keys were fetched twice without an attention call between"
            )
        recalls = self.archive.most if self.archive and self.recalls else 0
        layout = layout_of(self.ring, keys.shape[2], recalls)
        if self.limit is not None and self.ring.position + layout.n > self.limit:
            most = self.limit - self.ring.position
            raise CacheError(f"{layout.n} tokens at once are too many: read at most {most}")
        self._layout, self._is_pending, self.ring = layout, True, layout.after
        self._lent = None  # or it would keep MLX from writing in place
        k, v = self._keys.update(layout, keys), self._values.update(layout, values)
        if isinstance(k, Packed) and isinstance(v, Packed):
            # A kernel reads them as they are; where one serves, the others are never computed.
            self._packed = k, v
            k, v = k.expanded(), v.expanded()
        fetched = cast("mx.array", k), cast("mx.array", v)
        if self.archive:
            self._archived = self.archive.take(layout, *fetched, recalls=self.recalls)
        self._fetched = weakref.ref(fetched[0])
        if self.lends:
            self._lent = fetched
            kv_sharing.note(self)
        return fetched

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return the rows last fetched, for a layer that has no keys of its own.

        Raises:
            CacheError: Nothing was fetched, or this layer's rows are for itself alone.
        """
        if self._lent is None:
            raise CacheError("the model reads keys of a layer that it did not read when attached")
        return self._lent

    @property
    def is_pending(self) -> bool:
        """True between fetching rows and attending to them."""
        return self._is_pending

    def leaves_to_model(self, keys: mx.array, mask: object) -> bool:
        """Tell whether the model multiplies the rows on its own, without `sink_attention`.

        Args:
            keys: What it attends to.
            mask: Its mask.
        """
        return False

    def handed_out(self, keys: mx.array) -> bool:
        """Tell whether these are the very keys last fetched from here."""
        return self._fetched is not None and self._fetched() is keys

    def take_layout(self, keys: mx.array | None = None, mask: object = None) -> Layout:
        """Return the layout of the rows last fetched, and note that they are attended to.

        Args:
            keys: What is attended to: the fetched keys, a second time too, or something that
                the model made of them, once.
            mask: The model's mask.

        Raises:
            CacheError: Other keys, or another mask than `make_mask` gave.
        """
        layout, was_pending = self._layout, self._is_pending
        self._is_pending = False
        again = keys is not None and self.handed_out(keys)
        if layout is None or not (was_pending or again):
            raise CacheError("attention was called with keys of another layer or call")
        if not self.knows(mask):
            raise CacheError("the model attends under a mask of its own")
        return layout

    def take_packed(self, keys: mx.array) -> tuple[Packed, Packed] | None:
        """Return the rows last fetched as they are held, if quantised; held no longer after.

        Args:
            keys: What is attended to; what a model made of the fetched keys is nowhere packed.
        """
        packed, self._packed = self._packed, None
        return packed if packed is not None and self.handed_out(keys) else None

    def take(
        self, keys: mx.array, mask: object
    ) -> tuple[Layout, tuple[Packed, Packed] | None, Archived | None]:
        """Return all that attention is told of the rows last fetched; see `take_layout`.

        Raises:
            UnsupportedModelError: The model has made other keys of those that are archived.
        """
        layout = self._layout
        if layout is None or mask is not None or not self.handed_out(keys):
            layout = self.take_layout(keys, mask)
            if self.archive and not self.handed_out(keys):
                raise UnsupportedModelError(
                    "it attends to keys that it makes of those it keeps, and blocks of those it "
                    "keeps cannot stand among them: leave recall out"
                )
            return layout, self.take_packed(keys), self._archived
        self._is_pending = False
        packed, self._packed = self._packed, None
        return layout, packed, self._archived

    def take_archived(self) -> Archived | None:
        """Return the evicted blocks that the last call may look up, if any."""
        return self._archived

    def knows(self, mask: object) -> bool:
        """Tell whether a mask says what the layout of the last call says."""
        if not isinstance(mask, mx.array) or self._layout is None:
            return True
        # Models of chunked attention make the mask themselves.
        return self.ring.chunked or mask is mask_of(self._layout)

    @property
    def start_position(self) -> int:
        """What models of chunked attention count the columns of their mask from."""
        return self.offset

    def maybe_trim_front(self) -> None:
        """Do nothing: what mlx-lm's ``ChunkedKVCache`` does here, a ring does by itself."""

    def make_mask(
        self, n: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        """Answer mlx-lm's question for a mask: none is needed, the layout says it all.

        Some models ask the cache of a layer with full attention for the mask of layers with a
        window even if they have none: what they get can be asked for, not attended under.
        """
        if n == 1:
            return None
        layout = layout_of(self.ring, n)
        if window_size is not None and not self.has_window(window_size):
            return mx.zeros_like(mask_of(layout))
        return mask_of(layout) if return_array else "causal"

    def has_window(self, window_size: int) -> bool:
        """Tell whether a window that the model speaks of is this layer's."""
        return not self.ring.num_sinks and window_size == self.ring.window

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
        """Take back the newest ``n`` tokens, as if they had never come; see `Rewindable`."""
        n = min(n, self.ring.tokens)
        self.ring = self.ring.trimmed(n)
        return n

    def reopen(self) -> None:
        """See `Rewindable`."""
        self.ring = self.ring.reopened()

    def size(self) -> int:
        """Return the tokens held."""
        return self.ring.live

    def empty(self) -> bool:
        """Tell whether nothing was taken in yet."""
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, the archive's included."""
        archive = self.archive.nbytes if self.archive else 0
        return self._keys.nbytes + self._values.nbytes + archive

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
        The last part keeps mlx-lm from saving them (`Unsaved`), and need not be given back.
        """
        ring = self.ring
        sizes, stands = (ring.num_sinks, ring.window, ring.epoch), (ring.tokens, ring.start)
        since = ring.previous, ring.rollback, ring.taken_back
        archive = [self.archive.state] if self.archive else []
        return self.keys, self.values, *sizes, *stands, *since, *archive, Unsaved()

    @state.setter
    def state(self, value: tuple[Any, ...]) -> None:
        keys, values, *integers = (part for part in value if not isinstance(part, Omitted))
        archive = integers.pop() if self.archive else None
        self.ring = Ring(*integers, chunked=self.ring.chunked, block=self.ring.block)
        extent = self.ring.extent
        self._keys = self._keys.restored(keys, extent)
        self._values = self._values.restored(values, extent)
        self._layout, self._is_pending, self._fetched = None, False, None
        self._lent = self._packed = self._archived = None
        if self.archive:
            self.archive = self.archive.restored(archive, self.ring)
