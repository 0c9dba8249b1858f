"""The ring's integers against a plain list, exhaustively for small sizes.

The simulation below knows nothing of slots modulo a window, runs, ranges or turns: it keeps a
list of slots, overwrites the oldest, and writes down the position each key had when it came.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from tiny import distance, visible

from mlx_sink import CacheError, SinkConfig
from mlx_sink.attention.layout import Block, Layout, blocks_of, layout_of
from mlx_sink.attention.ring import Ring, Run, Turn

SIZES = list(product(range(5), range(1, 7)))


class Slots:
    """A ring as a list: the sinks, and a window in which the newest replaces the oldest."""

    def __init__(self, S: int, W: int, t: int = 0):
        self.S, self.W = S, W
        self.slots: list[int] = []
        for token in range(t):
            self.append(token)

    def append(self, token: int) -> None:
        if len(self.slots) < self.S + self.W:
            self.slots.append(token)
        else:
            self.slots[self.slots.index(min(self.slots[self.S :]), self.S)] = token


def rows_of(runs: tuple[Run, ...]) -> list[tuple[int, int]]:
    """Spell runs out as (row, token) pairs."""
    return [(run.row + i, run.token + i) for run in runs for i in range(run.length)]


@pytest.mark.parametrize(("S", "W"), SIZES)
def test_slots_hold_what_the_list_holds(S: int, W: int):
    """A token in the wrong slot is a token read as another one."""
    for t in range(4 * (S + W) + 3):
        slots = Slots(S, W, t).slots
        ring = Ring(S, W, epoch=S + W, tokens=t)
        assert ring.live == len(slots)
        assert rows_of(ring.live_runs()) == list(enumerate(slots))
        assert [ring.slot(token) for token in slots] == list(range(len(slots)))
        in_order = rows_of(ring.in_token_order())
        assert [token for _, token in in_order] == sorted(slots)
        assert all(slots[row] == token for row, token in in_order)
        assert all(run.length > 0 for run in ring.live_runs())


@pytest.mark.parametrize(("S", "W"), SIZES)
def test_writes_leave_what_one_by_one_leaves(S: int, W: int):
    """A chunk's rows must end where single steps put them, each slot written at most once."""
    for t, n in product(range(3 * (S + W) + 2), range(1, 3 * W + S + 3)):
        ring, slots = Ring(S, W, epoch=S + W, tokens=t), Slots(S, W, t)
        before = [*slots.slots, *[None] * (S + W - len(slots.slots))]
        written: list[int] = []
        for copy in ring.writes(n):
            assert copy.length > 0
            for i in range(copy.length):
                assert 0 <= copy.source + i < n
                before[copy.target + i] = t + copy.source + i
                written.append(copy.target + i)
        for token in range(t, t + n):
            slots.append(token)
        assert before[: len(slots.slots)] == slots.slots
        assert len(written) == len(set(written))
        assert len(ring.writes(n)) <= 4, "more copies than the ring has seams"


@pytest.mark.parametrize(("S", "W"), SIZES)
def test_rows_of_a_call(S: int, W: int):
    """A decode step reads the ring in slot order; a chunk the old ring in token order, then it."""
    for t, n in product(range(3 * (S + W) + 2), (1, 2, 3, W, W + 1, 3 * W + 1)):
        layout = layout_of(Ring(S, W, epoch=S + W, tokens=t), n)
        tokens = Slots(S, W, t + 1).slots if n == 1 else sorted(Slots(S, W, t).slots)
        tokens += [] if n == 1 else range(t, t + n)
        assert rows_of(layout.runs) == list(enumerate(tokens))
        assert layout.end == t + n


def states(S: int, W: int, epoch: int, until: int) -> Iterator[tuple[Ring, dict[int, int], int]]:
    """Yield every state and call that cuts of six lengths reach.

    Each comes with the positions that the live keys had on arrival, and the call's length. The
    positions are written down token by token; the epochs by the rule alone: when P >= E after a
    call, the next one starts a new epoch.
    """
    lengths = sorted({1, 2, 3, W, W + 1, epoch + 2})
    todo: list[tuple[Ring, dict[int, int]]] = [(Ring(S, W, epoch), {})]
    done: set[tuple[Ring, tuple[tuple[int, int], ...]]] = set()
    while todo:
        ring, positions = todo.pop()
        key = ring, tuple(sorted(positions.items()))
        if key in done or ring.tokens > until:
            continue
        done.add(key)
        for n in lengths:
            yield ring, positions, n
            came = positions | {ring.tokens + i: ring.position + i for i in range(n)}
            after = ring.advanced(n)
            live = Slots(S, W, after.tokens).slots
            todo.append((after, {token: came[token] for token in live}))


def keys_of(block: Block) -> dict[int, tuple[int, Turn, bool]]:
    """Spell a block's ranges out: token to (row, turn, is a sink)."""
    keys: dict[int, tuple[int, Turn, bool]] = {}
    for r in block.ranges:
        assert r.length > 0
        for i in range(r.length):
            assert r.token + i not in keys, "a key under two turns would count twice"
            keys[r.token + i] = r.row + i, r.turn, r.sinks
    return keys


def check_block(layout: Layout, block: Block, positions: dict[int, int]) -> None:
    """Check a block's keys, rows, distances and ``everything`` against the contract."""
    S, W, t0 = layout.ring.num_sinks, layout.ring.window, layout.ring.tokens
    queries = range(block.first, block.last)
    keys = keys_of(block)
    rows = {token: row for row, token in rows_of(layout.runs)}
    assert all(row == rows[token] for token, (row, _, _) in keys.items())
    assert [row for row, _, _ in keys.values()] == sorted(row for row, _, _ in keys.values())
    assert all(is_sink == (token < S) for token, (_, _, is_sink) in keys.items())
    pieces = [(row, span.turn) for span in block.spans for row in range(span.start, span.stop)]
    assert pieces == [(row, turn) for row, turn, _ in keys.values()]
    assert block.turns == {turn for _, turn in pieces}
    assert block.n == len(queries)
    turns = {turn: layout.turns(turn) for turn in Turn}
    met: set[int] = set()
    everything = True
    for t in queries:
        sees = visible(t, S, W)
        position = layout.ring.position + t - t0
        met.update(sees)
        everything = everything and len(sees) == sum(token <= t for token in keys)
        for token in sees:
            turned = position + turns[keys[token][1]][t - t0]
            assert turned - positions[token] == distance(t, token, S, W)
    assert set(keys) == met, "the keys that some query of the block sees, and no other"
    assert block.everything == everything


@pytest.mark.parametrize("longer", [0, 2])
@pytest.mark.parametrize(("S", "W"), SIZES)
def test_visible_keys_and_distances(S: int, W: int, longer: int):
    """The heart: whatever the cuts, each query meets its keys at the contract's distances."""
    epoch = S + W + longer
    for ring, positions, n in states(S, W, epoch, until=2 * epoch + 3):
        layout = layout_of(ring, n)
        came = positions | {ring.tokens + i: ring.position + i for i in range(n)}
        for size in {min(2, n), n}:
            for block in blocks_of(layout, size):
                check_block(layout, block, came)


def test_turns_are_none_until_the_first_wrap():
    """While positions are right as they are, MLX's fused attention serves."""
    S, W = 2, 5
    for t, n in product(range(S + W), range(1, S + W)):
        if t + n <= S + W:
            (block,) = blocks_of(layout_of(Ring(S, W, epoch=20, tokens=t), n), 99)
            assert {r.turn for r in block.ranges} == {Turn.NONE}
            assert block.everything


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 100])
def test_blocks_partition_the_queries(size: int):
    layout = layout_of(Ring(2, 3, epoch=9, tokens=11), 4)
    blocks = blocks_of(layout, size)
    assert [t for b in blocks for t in range(b.first, b.last)] == [11, 12, 13, 14]
    assert all(b.n <= size for b in blocks)
    assert all(b.n == size for b in blocks[:-1])


def test_positions_stay_bounded():
    """Position and turns must not grow with the stream: float32 angles fail at large ones."""
    S, W, epoch = 2, 5, 9
    ring, chunks = Ring(S, W, epoch), [1, 4, 1, 1, 13, 2]
    for i in range(3000):
        n = chunks[i % len(chunks)]
        layout = layout_of(ring, n)
        assert ring.position < epoch + max(chunks)
        assert ring.start - ring.previous < epoch + max(chunks)
        for turn in Turn:
            assert max(map(abs, layout.turns(turn))) < 2 * epoch + max(chunks)
        ring = ring.advanced(n)
    assert ring.tokens == 500 * sum(chunks)


@pytest.mark.parametrize("far", [2**31, 2**53, 2**70])
def test_far_streams_are_laid_out_like_near_ones(far: int):
    """Nothing depends on t itself: no fixed-size integer, no float."""
    S, W = 2, 5
    shift = far // W * W
    near = Ring(S, W, epoch=9, tokens=31, start=28, previous=17)
    ring = replace(near, tokens=31 + shift, start=28 + shift, previous=17 + shift)
    for n in (1, 3, 14):
        here, there = layout_of(near, n), layout_of(ring, n)
        assert ring.writes(n) == near.writes(n)
        for turn in Turn:
            assert list(there.turns(turn)) == list(here.turns(turn))
        for a, b in zip(blocks_of(here, 4), blocks_of(there, 4), strict=True):
            for r, q in zip(a.ranges, b.ranges, strict=True):
                assert q == r._replace(token=r.token if r.sinks else r.token + shift)
            assert a.everything == b.everything


def test_layers_share_a_layout():
    """What is derived from a layout is kept per object: a copy per layer would redo it."""
    assert layout_of(Ring(2, 5, 9, tokens=8), 3) is layout_of(Ring(2, 5, 9, tokens=8), 3)


@pytest.mark.parametrize(("S", "W"), SIZES)
@pytest.mark.parametrize("longer", [0, 1])
def test_trimming_is_as_if_the_tokens_never_came(S: int, W: int, longer: int):
    """Positions after a trim must go on from the epoch that the remaining keys were in."""
    for t, cuts in product(range(S + W + 1), (1, 3, 100)):
        ring = Ring(S, W, epoch=S + W + longer)
        while ring.tokens < t:
            ring = ring.advanced(min(cuts, t - ring.tokens))
        for n in range(t + 1):
            left = ring.trimmed(n)
            assert left.tokens == t - n
            if n:
                assert (left.position, left.start) == (t - n, 0)
            else:
                assert left == ring


def test_trim_refuses_what_cannot_come_back():
    ring = Ring(2, 4, epoch=6)
    with pytest.raises(CacheError, match="cannot take back 1 tokens of 0"):
        ring.trimmed(1)
    with pytest.raises(CacheError, match="cannot take back -1 tokens"):
        ring.trimmed(-1)
    with pytest.raises(CacheError, match=r"cannot take back 1 tokens, only 0: .*rollback"):
        ring.advanced(7).trimmed(1)


def test_from_config():
    ring = Ring.from_config(SinkConfig(3, 5, epoch=11))
    assert ring == Ring(3, 5, 11)
    assert (ring.tokens, ring.position, ring.live, ring.capacity) == (0, 0, 0, 8)
