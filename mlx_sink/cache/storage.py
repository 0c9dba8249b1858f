"""Store the keys, or the values, of one layer: in the model's dtype, or quantised.

Both kinds of storage take what the ring's layout says (which rows go to which slots) and hand out
the rows that a call attends to. Slots below ``num_sinks`` are the sinks', which stay as they came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from mlx_sink.attention.layout import Layout
from mlx_sink.attention.packed import Packed, assembled
from mlx_sink.attention.ring import Copy, Run
from mlx_sink.config import GROUP_SIZES, SinkConfig
from mlx_sink.errors import CacheError

GROWTH = 256
"""Slots by which arrays grow until they reach their limit."""

Parts = tuple[mx.array, mx.array, mx.array]
"""Words, scales and biases."""


class _Slots:
    """Arrays ``[B, n_kv_heads, slots, *]`` of as many slots each, which grow up to a limit."""

    def __init__(self, limit: int):
        self.limit = limit
        self.arrays: list[mx.array] = []

    def write(self, copies: Sequence[Copy], parts: Sequence[mx.array], needed: int) -> None:
        """Put rows of as many arrays into their slots, growing to those that are needed."""
        if not copies:
            return
        held = self.arrays[0].shape[2] if self.arrays else 0
        if needed > held:
            room = min(-(-needed // GROWTH) * GROWTH, self.limit)
            old = self.arrays or [None] * len(parts)
            self.arrays = [_grown(a, like, room) for a, like in zip(old, parts, strict=True)]
        for array, rows in zip(self.arrays, parts, strict=True):
            for c in copies:
                whole = c.length == rows.shape[2]
                source = rows if whole else rows[:, :, c.source : c.source + c.length]
                array[:, :, c.target : c.target + c.length] = source

    def holds(self, n: int) -> bool:
        """Tell whether there are n slots already."""
        return bool(self.arrays) and n <= self.arrays[0].shape[2]

    def put(self, slot: int, row: mx.array, n: int) -> mx.array:
        """Put one row of the only array into its slot, and return the first n: a decode step."""
        array = self.arrays[0]
        array[:, :, slot : slot + 1] = row
        return array if n == array.shape[2] else array[:, :, :n]

    def first(self, n: int) -> list[mx.array]:
        """Return the first n slots: the arrays themselves where that is all of them."""
        if not self.arrays or n >= self.arrays[0].shape[2]:
            return self.arrays
        return [array[:, :, :n] for array in self.arrays]

    def then(self, runs: Sequence[Run], parts: Sequence[mx.array]) -> list[mx.array]:
        """Return the slots of some runs, followed by new rows."""
        if not self.arrays:
            return list(parts)
        return [
            mx.concatenate(
                [*(array[:, :, run.row : run.row + run.length] for run in runs), rows], axis=2
            )
            for array, rows in zip(self.arrays, parts, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class Plain:
    """Rows in the dtype they come in.

    Args:
        config: What to keep.
    """

    def __init__(self, config: SinkConfig):
        self._config = config
        self._slots = _Slots(config.slots)
        self.bytes_per_token = 0

    @property
    def bytes_per_sink(self) -> int:
        """Bytes of a sink's row, all heads of one sequence."""
        return self.bytes_per_token

    def update(self, layout: Layout, rows: mx.array) -> mx.array:
        """Take in a call's rows and return those that it attends to.

        Args:
            layout: The call.
            rows: ``[B, n_kv_heads, layout.n, head_dim]``.

        Returns:
            ``[B, n_kv_heads, rows, head_dim]``, rows as ``layout.runs`` says.
        """
        extent = layout.extent
        if layout.n == 1 and self._slots.holds(extent):
            return self._slots.put(layout.writes[0].target, rows, extent)
        self.bytes_per_token = rows.shape[1] * rows.shape[3] * rows.itemsize
        if layout.n == 1:
            self._slots.write(layout.writes, [rows], extent)
            return self._slots.first(extent)[0]
        # A chunk's writes evict rows that its own first queries still see: fetch first.
        (fetched,) = self._slots.then(layout.held, [rows])
        self._slots.write(layout.writes, [rows], extent)
        return fetched

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self._slots.nbytes

    @property
    def state(self) -> mx.array | None:
        """The array, slots in order; ``None`` before the first row."""
        return self._slots.arrays[0] if self._slots.arrays else None

    def restored(self, state: mx.array | None, extent: int) -> Plain:
        """Return a storage that goes on from a state; this one stays as it is.

        Args:
            state: As `state` gives it.
            extent: Slots that hold tokens.

        Raises:
            CacheError: The array does not hold as many.
        """
        new = type(self)(self._config)
        new._slots.arrays = [] if state is None else [state]
        _check_extent(new._slots, extent)
        new.bytes_per_token = self.bytes_per_token
        return new


class Quantised:
    """Rows of which the sinks stay as they come, and the others are quantised as they come.

    Each is quantised once, from what the model made of it, and never again. What a query sees of a
    key is the quantised form from the beginning, in the key's own call too: it does not depend on
    how the text was cut into calls.

    Args:
        config: What to keep.
        bits: Bits of an element.
    """

    def __init__(self, config: SinkConfig, bits: int):
        self._config = config
        self._S = config.num_sinks
        self._sinks, self._ring = _Slots(config.num_sinks), _Slots(config.slots - self._S)
        self._bits, self._group_size = bits, config.kv_group_size
        self.bytes_per_sink = 0
        self.bytes_per_token = 0

    def update(self, layout: Layout, rows: mx.array) -> Packed:
        """Take in a call's rows and return those that it attends to; as in `Plain.update`.

        Raises:
            CacheError: The group size does not divide the rows' head_dim.
        """
        self._check(rows)
        S, extent = self._S, layout.extent
        n_sinks = min(max(S - layout.ring.tokens, 0), layout.n)
        sinks, ring = rows[:, :, :n_sinks], self._quantised(rows[:, :, n_sinks:])
        if layout.n == 1:
            self._write(layout, sinks, ring)
            held = self._sinks.first(min(S, extent)), self._ring.first(extent - S)
        else:
            before = [_cut(run, 0, S) for run in layout.held]
            after = [_cut(run, S, run.row + run.length) for run in layout.held]
            held = (
                self._sinks.then([run for run in before if run], [sinks]),
                self._ring.then([run for run in after if run], ring),
            )
            self._write(layout, sinks, ring)
        return assembled(*held, self._bits, self._group_size)

    def _check(self, rows: mx.array) -> None:
        _, heads, _, dim = rows.shape
        if dim % self._group_size:
            fitting = [str(size) for size in GROUP_SIZES if dim % size == 0]
            remedy = f"use {' or '.join(fitting)}" if fitting else "leave kv_bits out"
            raise CacheError(
                f"kv_group_size {self._group_size} does not divide a head_dim of {dim}: {remedy}"
            )
        scales = 2 * dim // self._group_size * rows.itemsize
        self.bytes_per_sink = heads * dim * rows.itemsize
        self.bytes_per_token = heads * (dim * self._bits // 8 + scales)

    def _quantised(self, rows: mx.array) -> Parts:
        parts = mx.quantize(rows, group_size=self._group_size, bits=self._bits)
        return cast("Parts", tuple(parts))

    def _write(self, layout: Layout, sinks: mx.array, ring: Parts) -> None:
        S, extent = self._S, layout.extent
        for_sinks = [c for c in layout.writes if c.target < S]
        for_ring = [
            Copy(c.source - sinks.shape[2], c.target - S, c.length)
            for c in layout.writes
            if c.target >= S
        ]
        self._sinks.write(for_sinks, [sinks], min(S, extent))
        self._ring.write(for_ring, ring, extent - S)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self._sinks.nbytes + self._ring.nbytes

    @property
    def state(self) -> tuple[mx.array | None, ...] | None:
        """Sinks, words, scales and biases, slots in order; ``None`` before the first row."""
        if not (self._sinks.arrays or self._ring.arrays):
            return None
        return (*(self._sinks.arrays or [None]), *(self._ring.arrays or [None] * 3))

    def restored(self, state: Sequence[mx.array | None] | None, extent: int) -> Quantised:
        """Return a storage that goes on from a state; as in `Plain.restored`."""
        sinks, *ring = [None] * 4 if state is None else state
        arrays = [part for part in ring if part is not None]
        if len(ring) != 3 or len(arrays) not in (0, 3):
            raise CacheError("a quantised cache has words, scales and biases, or none of them")
        if arrays and arrays[0].dtype != mx.uint32:
            raise CacheError("the words of a quantised cache are uint32")
        new = type(self)(self._config, self._bits)
        new._sinks.arrays = [] if sinks is None else [sinks]
        new._ring.arrays = arrays
        _check_extent(new._sinks, min(self._S, extent))
        _check_extent(new._ring, extent - self._S)
        new.bytes_per_sink, new.bytes_per_token = self.bytes_per_sink, self.bytes_per_token
        return new


Storage = Plain | Quantised


def storage_of(config: SinkConfig, bits: int | None) -> Storage:
    """Return an empty storage of some bits an element; ``None`` for the dtype of the model."""
    return Plain(config) if bits is None else Quantised(config, bits)


def _check_extent(slots: _Slots, extent: int) -> None:
    rows = [array.shape[2] if array.ndim == 4 else -1 for array in slots.arrays] or [0]
    if not all(extent <= n == rows[0] <= slots.limit for n in rows):
        raise CacheError(f"the arrays of a cache have {rows} slots, {extent} are in use")


def _cut(run: Run, low: int, high: int) -> Run | None:
    """Return the part of a run in rows ``low .. high-1``, counted from ``low``; or nothing."""
    first, last = max(run.row, low), min(run.row + run.length, high)
    return Run(first - low, run.token + first - run.row, last - first) if first < last else None


def _grown(old: Any, like: mx.array, slots: int) -> mx.array:
    B, heads, _, dim = like.shape
    held = 0 if old is None else old.shape[2]
    fresh = mx.zeros((B, heads, slots - held, dim), like.dtype)
    return fresh if old is None else mx.concatenate([old, fresh], axis=2)
