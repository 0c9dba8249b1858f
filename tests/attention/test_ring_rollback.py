"""A ring with spare slots against a plain list, exhaustively for small sizes, with trims in it.

The simulation keeps the text as a list of the positions at which its keys were rotated, and the
slots as a list of what was written there last; taking tokens back shortens the one and leaves the
other as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest
from test_ring import check_block

from mlx_sink import CacheError, SinkConfig
from mlx_sink.attention.layout import blocks_of, layout_of
from mlx_sink.attention.ring import Ring, Run

SIZES = list(product(range(4), range(1, 6)))

Row = tuple[int, int] | None
"""A token and the position of its key; None for a row of a token that was taken back."""


@dataclass(frozen=True)
class State:
    """A ring, and what its slots hold."""

    ring: Ring
    slots: tuple[Row, ...]

    def read(self, n: int) -> tuple[list[Row], State]:
        """The rows that a call of n tokens fetches, and the state after it."""
        layout, slots = layout_of(self.ring, n), list(self.slots)
        new = [(self.ring.tokens + i, self.ring.position + i) for i in range(n)]
        for copy in layout.writes:
            assert copy.length > 0
            slots[copy.target : copy.target + copy.length] = new[
                copy.source : copy.source + copy.length
            ]
        assert len(slots) == len(self.slots), "written beyond the last slot"
        before = slots if n == 1 else self.slots
        rows = [before[row] for run in layout.held for row in rows_of(run)]
        rows = list(slots[: layout.after.extent]) if n == 1 else [*rows, *new]
        return rows, State(layout.after, tuple(slots))

    def trim(self, n: int) -> State:
        ring = self.ring.trimmed(n)
        assert ring.tokens == self.ring.tokens - n
        return State(ring, self._without(ring.tokens))

    def reopen(self) -> State:
        ring = self.ring.reopened()
        return State(ring, self._without(ring.tokens))

    def _without(self, tokens: int) -> tuple[Row, ...]:
        return tuple(row if row and row[0] < tokens else None for row in self.slots)

    def may_see(self, tokens: int) -> bool:
        """Whether all is there that calls from a token on can fetch, by the definition."""
        S, W = self.ring.num_sinks, self.ring.window
        context = {*range(min(S, tokens)), *range(max(0, tokens - W), tokens)}
        return context <= {row[0] for row in self.slots if row}


def rows_of(run: Run) -> range:
    return range(run.row, run.row + run.length)


def check_call(state: State, n: int) -> State:
    """Check that a call fetches living keys, each at the contract's distance."""
    layout = layout_of(state.ring, n)
    rows, after = state.read(n)
    positions: dict[int, int] = {}
    for run in layout.runs:
        for i, row in enumerate(rows_of(run)):
            held = rows[row]
            assert held is not None, "a row of a token that was taken back"
            assert held[0] == run.token + i
            positions[held[0]] = held[1]
    for size in {min(2, n), n}:
        for block in blocks_of(layout, size):
            check_block(layout, block, positions)
    return after


def states(S: int, W: int, R: int, epoch: int, until: int) -> Iterator[tuple[State, State]]:
    """Yield every state that calls of four lengths and trims of every length reach.

    Each comes with the state that it was reached from.
    """
    lengths = sorted({1, 2, R + 1, W + R + 1})
    first = State(Ring(S, W, epoch, rollback=R), (None,) * (S + W + R))
    todo, done = [first], {first}
    while todo:
        state = todo.pop()
        nexts = [state.trim(n) for n in range(1, state.ring.spare + 1)]
        if state.ring.tokens:
            nexts.append(check_call(state.reopen(), 1))
        nexts += [check_call(state, n) for n in lengths]
        for after in nexts:
            yield state, after
            if after not in done and after.ring.tokens <= until:
                done.add(after)
                todo.append(after)


@pytest.mark.parametrize("R", range(5))
@pytest.mark.parametrize(("S", "W"), SIZES)
def test_taken_back_is_as_if_it_never_came(S: int, W: int, R: int):
    """Whatever is read and taken back, every query meets its own keys at the right distances."""
    epoch = S + W + R + (S + W) % 2
    for before, after in states(S, W, R, epoch, until=2 * epoch + 2):
        ring, tokens = after.ring, after.ring.tokens
        assert ring.spare >= min(tokens, R - ring.taken_back)
        assert all(after.may_see(tokens - n) for n in range(ring.spare + 1))
        with pytest.raises(CacheError, match="cannot take back"):
            ring.trimmed(ring.spare + 1)
        assert ring.position < epoch + max(2, R + 1, W + R + 1), "positions grow"
        if before.ring.tokens > tokens:
            assert ring.taken_back == before.ring.taken_back + before.ring.tokens - tokens


@pytest.mark.parametrize(("S", "W"), SIZES)
def test_without_spare_slots_nothing_is_other(S: int, W: int):
    """R = 0 is the ring as it was: as many slots, and nothing comes back once one is evicted."""
    ring = Ring.from_config(SinkConfig(S, W, epoch=S + W))
    for _ in range(3 * (S + W)):
        assert (ring.slots, ring.extent) == (S + W, ring.live)
        assert ring.spare == (ring.tokens if ring.tokens <= S + W else 0)
        ring = ring.advanced(1)


def test_all_spare_slots_at_any_place():
    """Again and again, over wraps and epochs, as drafting a few tokens too far does."""
    S, W, R = 2, 5, 3
    ring, farthest = Ring(S, W, epoch=S + W + R, rollback=R), 0
    for _ in range(2000):
        ring = ring.advanced(R + 1)
        assert ring.trimmed(R).spare == (0 if ring.tokens > S + W + R else ring.tokens - R)
        ring = ring.trimmed(R)
        farthest = max(farthest, ring.position)
    assert ring.tokens == 2000
    assert farthest < S + W + R + 2 * R


def test_reopening_needs_no_spare_slot():
    """The newest token is read again over its own slot."""
    ring = Ring(2, 4, epoch=6).advanced(6).advanced(3)
    assert ring.spare == 0
    assert ring.reopened().advanced(1) == ring
    with pytest.raises(CacheError, match="there is none"):
        Ring(2, 4, epoch=6).reopened()


def test_from_config():
    ring = Ring.from_config(SinkConfig(2, 5, rollback=3))
    assert (ring.slots, ring.capacity, ring.rollback) == (10, 7, 3)
