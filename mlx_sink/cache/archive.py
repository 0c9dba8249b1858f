"""Keep what has left the window of one layer, block by block, within a number of blocks.

A block is archived in the call after which no later token sees it; its keys are then turned to
stand at 0..b-1, whatever their place in the text, and are not touched again. Which blocks are held
follows from the number of tokens alone: the newest that have left the window, until the archive is
full, and from then on each new one takes the place of the oldest. Some slots more than a query
chooses among are there for blocks of the call itself, and for when tokens are taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from mlx_sink.attention.layout import Layout
from mlx_sink.attention.packed import Packed
from mlx_sink.attention.recall import Archived, Rows, Shelf
from mlx_sink.attention.ring import Ring
from mlx_sink.attention.rope import Rotation
from mlx_sink.config import GROUP_SIZES, SinkConfig
from mlx_sink.errors import CacheError

GROWTH = 1.5
"""Factor by which arrays grow until they reach their limit."""

LEAST = 8
"""Blocks of the smallest arrays."""


class Archive:
    """The evicted blocks of one layer.

    Args:
        config: What to keep.
        rotation: The layer's rotary embedding.
        limit: Blocks that a query may choose among, those of all sequences of a batch together.
    """

    def __init__(self, config: SinkConfig, rotation: Rotation, limit: int):
        self.most = config.recall // config.recall_block
        self.limit = limit
        self.bytes_per_block = 0
        self._config, self._rotation = config, rotation
        self._block, self._bits = config.recall_block, config.recall_bits
        self._group_size = config.kv_group_size
        self._spare = config.spare_blocks
        self._arrays: list[mx.array] = []
        """Of keys, then of values, ``[B, n_kv_heads, slots * b, *]``: one each, or three."""

    def take(
        self, layout: Layout, keys: mx.array, values: mx.array, *, recalls: bool
    ) -> Archived | None:
        """Take in the blocks that have left the window after a call.

        Args:
            layout: The call.
            keys: ``[B, n_kv_heads, rows, head_dim]`` as the call attends to them.
            values: ``[B, n_kv_heads, rows, v_head_dim]``.
            recalls: The call's queries look up blocks.

        Returns:
            What they choose from; ``None`` if they do not, or if there is nothing yet.

        Raises:
            CacheError: The group size does not divide the head_dim, or there is no room for the
                blocks that a query may retrieve.
        """
        self._note(keys, values)
        ring, after = layout.ring, layout.after
        begin, end = ring.evicted(ring.tokens), after.evicted(after.tokens)
        parts = self._parts(layout, begin, end, keys, values) if end > begin else []
        view = None
        if recalls and layout.n > 1 and ring.evicted(layout.end - 1):
            # The first queries may still choose what the call's own blocks will overwrite.
            view = self._view(ring, begin, max(0, end - begin), parts)
        if parts:
            self._write(begin, end, parts)
        if recalls and layout.n == 1 and ring.evicted(ring.tokens):
            view = self._view(ring, max(begin, end), 0, [])
        return view

    def _note(self, keys: mx.array, values: mx.array) -> None:
        """Work out the bytes of a block, and check them, in the first call."""
        if self.bytes_per_block:
            return
        B, per_token = keys.shape[0], 0
        for x in (keys, values):
            heads, dim = x.shape[1], x.shape[3]
            if self._bits is None:
                per_token += heads * dim * x.itemsize
                continue
            if dim % self._group_size:
                fitting = [str(size) for size in GROUP_SIZES if dim % size == 0]
                remedy = f"use {' or '.join(fitting)}" if fitting else "leave recall_bits out"
                raise CacheError(
                    f"kv_group_size {self._group_size} does not divide a head_dim of {dim}: "
                    f"{remedy}"
                )
            per_token += heads * (dim * self._bits // 8 + 2 * dim // self._group_size * x.itemsize)
        self.bytes_per_block = per_token * self._block
        self.limit //= B
        if self.limit < self.most:
            raise CacheError(
                f"recall_memory holds {self.limit} blocks of each of {B} sequences, and "
                f"{self.most} are looked up at once"
            )

    @property
    def size(self) -> int:
        """Slots of a full archive."""
        return self.limit + self._spare

    def held(self, ring: Ring) -> range:
        """Return the blocks that a stream can still look up, by their place in the text."""
        end = ring.evicted(max(0, ring.tokens - 1))
        return range(max(0, end - self.limit), end)

    def _parts(
        self, layout: Layout, begin: int, end: int, keys: mx.array, values: mx.array
    ) -> list[mx.array]:
        """Return the rows of blocks ``begin .. end-1`` as they are kept."""
        ring, S, b = layout.ring, layout.ring.num_sinks, self._block
        first, last = S + begin * b, S + end * b
        rows = [_cut(layout, x, first, last) for x in (keys, values)]
        if not self._rotation.is_identity:
            # From where a key stands in its epoch to its place in the block.
            turns = [
                (a - S) % b - a + (ring.start if a >= ring.start else ring.previous)
                for a in range(first, last)
            ]
            rows[0] = self._rotation.turn(rows[0], turns, key=("archived", layout))
        if self._bits is None:
            return rows
        parts = [mx.quantize(x, group_size=self._group_size, bits=self._bits) for x in rows]
        return [part for three in parts for part in three]

    def _write(self, begin: int, end: int, parts: Sequence[mx.array]) -> None:
        b = self._block
        self._grow(min(end, self.size), parts)
        block = max(begin, end - self.size)
        while block < end:
            slot = block % self.size
            n = min(end - block, self.size - slot)
            source = slice((block - begin) * b, (block - begin + n) * b)
            for array, rows in zip(self._arrays, parts, strict=True):
                array[:, :, slot * b : (slot + n) * b] = rows[:, :, source]
            block += n

    def _grow(self, slots: int, like: Sequence[mx.array]) -> None:
        held = self._slots
        if slots <= held:
            return
        room = min(self.size, max(LEAST, slots, int(held * GROWTH)))
        old = self._arrays or [None] * len(like)
        self._arrays = [_grown(a, x, room * self._block) for a, x in zip(old, like, strict=True)]

    @property
    def _slots(self) -> int:
        return self._arrays[0].shape[2] // self._block if self._arrays else 0

    def _view(self, ring: Ring, end: int, new: int, parts: Sequence[mx.array]) -> Archived:
        """Return blocks up to ``end - 1`` in their slots, and after them the call's own."""
        first = max(0, end - self.size)
        shelf = Shelf(self.size, self._slots, first, end - first, new, self.limit)
        arrays: Sequence[mx.array] = self._arrays or parts
        if new and self._arrays:
            pairs = zip(self._arrays, parts, strict=True)
            arrays = [mx.concatenate([old, rows], axis=2) for old, rows in pairs]
        half = len(arrays) // 2
        keys, values = self._rows(arrays[:half]), self._rows(arrays[half:])
        return Archived(keys, values, shelf, self._block, ring.num_sinks)

    def _rows(self, arrays: Sequence[mx.array]) -> Rows:
        if self._bits is None:
            return arrays[0]
        words, scales, biases = arrays
        return Packed(None, words, scales, biases, self._bits, self._group_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self._arrays)

    @property
    def state(self) -> list[mx.array] | None:
        """The arrays of keys, then those of values, slots in order; ``None`` before the first."""
        return self._arrays or None

    def restored(self, state: Any, ring: Ring) -> Archive:
        """Return an archive that goes on from a state; this one stays as it is.

        Args:
            state: As `state` gives it.
            ring: Where the stream stands.

        Raises:
            CacheError: The arrays do not hold the blocks that the stream has archived.
        """
        new = Archive(self._config, self._rotation, self.limit)
        new.bytes_per_block = self.bytes_per_block
        arrays = cast("list[mx.array]", [] if state is None else list(state))
        needed = min(ring.evicted(ring.tokens), new.size) * self._block
        if len(arrays) not in (0, 2 if self._bits is None else 6) or (needed and not arrays):
            raise CacheError("an archive has other arrays than its settings say")
        for array in arrays:
            rows = array.shape[2] if array.ndim == 4 else -1
            alike = array.shape[:3] == arrays[0].shape[:3]
            if not alike or rows % self._block or not needed <= rows <= new.size * self._block:
                raise CacheError(f"the arrays of an archive have {rows} rows, {needed} are in use")
        new._arrays = arrays
        return new


def _cut(layout: Layout, x: mx.array, first: int, last: int) -> mx.array:
    """Return the rows of tokens ``first .. last-1`` among those of a call, in token order."""
    pieces: list[tuple[int, mx.array]] = []
    for run in layout.runs:
        token, stop = max(first, run.token), min(last, run.token + run.length)
        if token < stop:
            row = run.row + token - run.token
            pieces.append((token, x[:, :, row : row + stop - token]))
    rows = [rows for _, rows in sorted(pieces, key=lambda piece: piece[0])]
    return rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=2)


def _grown(old: mx.array | None, like: mx.array, rows: int) -> mx.array:
    B, heads, _, dim = like.shape
    held = 0 if old is None else old.shape[2]
    fresh = mx.zeros((B, heads, rows - held, dim), like.dtype)
    return fresh if old is None else mx.concatenate([old, fresh], axis=2)
