"""The choice of blocks, on arrays made by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_sink.attention.layout import Block
from mlx_sink.attention.recall import Archived, Shelf, choose, retrieve, votes_of
from mlx_sink.attention.rope import Rotation

b, D = 4, 8


def archived(shelf: Shelf, seed: int = 0, heads: int = 2) -> tuple[Archived, np.ndarray]:
    """Return an archive of random rows, NaN where no block lies, and its keys."""
    blocks = shelf.blocks()
    random = np.random.default_rng(seed)
    keys = random.normal(size=(1, heads, len(blocks) * b, D)).astype(np.float32)
    values = random.normal(size=keys.shape).astype(np.float32)
    for slot in np.flatnonzero(blocks < 0):
        keys[:, :, slot * b : (slot + 1) * b] = values[:, :, slot * b : (slot + 1) * b] = np.nan
    return Archived(mx.array(keys), mx.array(values), shelf, b, 3), keys


def queries(n: int, seed: int = 1, heads: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, heads, n, D)).astype(np.float32)


def by_hand(q: np.ndarray, keys: np.ndarray, shelf: Shelf, evicted: int) -> dict[int, float]:
    """Return the votes for each block that a query chooses among, in float64."""
    place = {int(block): slot for slot, block in enumerate(shelf.blocks()) if block >= 0}
    among = [j for j in sorted(place) if max(0, evicted - shelf.limit) <= j < evicted]
    votes = dict.fromkeys(among, 0.0)
    for h in range(q.shape[0]):
        rows = keys[0, h // 2].astype(np.float64)
        best = [max(q[h] @ rows[place[j] * b + i] for i in range(b)) for j in among]
        shares = np.exp(np.array(best) - max(best, default=0))
        for j, share in zip(among, shares / shares.sum(), strict=True):
            votes[j] += share
    return votes


SHELVES = [
    Shelf(size=9, slots=8, first=0, count=5, new=0, limit=8),
    Shelf(size=6, slots=6, first=11, count=6, new=0, limit=5),
    Shelf(size=6, slots=6, first=7, count=6, new=5, limit=4),
    Shelf(size=6, slots=0, first=0, count=0, new=7, limit=5),
]


@pytest.mark.parametrize("shelf", SHELVES, ids=["filling", "full", "full and new", "new alone"])
def test_the_blocks_with_most_votes_in_the_order_of_the_text(shelf: Shelf):
    view, keys = archived(shelf)
    end = shelf.first + shelf.count + shelf.new
    evicted = [end - 2, end - 1, end]
    q = queries(3)
    votes = np.array(votes_of(mx.array(q), view, evicted))[0]
    slots, blocks = choose(mx.array(q), view, evicted, 2)
    for i, n in enumerate(evicted):
        expected = by_hand(q[0, :, i], keys, shelf, n)
        of_slot = shelf.blocks()
        for slot, vote in enumerate(votes[i]):
            assert vote == pytest.approx(expected.get(int(of_slot[slot]), 0.0), abs=1e-5)
        best = sorted(sorted(expected, key=lambda j: -expected[j])[:2])
        assert np.array(blocks)[0, i].tolist() == best
        assert [of_slot[slot] for slot in np.array(slots)[0, i]] == best


def test_of_equal_votes_the_older():
    """Blocks that are all alike: without a rule the choice would depend on the array's length."""
    for slots, first in ((8, 0), (8, 5), (20, 0)):
        shelf = Shelf(size=8, slots=slots, first=first, count=8, new=0, limit=8)
        ones = mx.ones((1, 2, slots * b, D))
        view = Archived(ones, ones, shelf, b, 3)
        _, blocks = choose(mx.array(queries(1)), view, [first + 8], 3)
        assert np.array(blocks).tolist() == [[[first, first + 1, first + 2]]]


def test_votes_of_nothing_are_told_apart_too():
    """A share that underflows to 0 is still a block's, and not that of an empty slot."""
    shelf = Shelf(size=6, slots=6, first=0, count=4, new=0, limit=5)
    view, _ = archived(shelf)
    rows = np.array(view.keys)
    rows[:, :, :b] *= 1000
    view = Archived(mx.array(rows), view.values, shelf, b, 3)
    _, blocks = choose(mx.array(100 * queries(1)), view, [4], 3)
    assert np.array(blocks).tolist() == [[[0, 1, 2]]]


def test_what_is_not_seen_holds_nothing():
    """A query with fewer evicted blocks than others must meet neither their values nor NaN."""
    shelf = Shelf(size=9, slots=8, first=0, count=2, new=0, limit=8)
    view, _ = archived(shelf)
    block = Block(0, 3, 3, (), (), True, frozenset(), (0, 0, 0), (0, 1, 2), everything=False)
    found = retrieve(mx.array(queries(3)), view, block, 2, Rotation([]))
    assert found.seen is not None
    seen = np.array(found.seen)
    assert seen.sum(axis=1).tolist() == [0, b, 2 * b]
    values = np.array(found.values)[0]
    assert (values[:, ~seen] == 0).all()
    assert np.isfinite(values).all()
