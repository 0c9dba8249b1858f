"""Which rows of a call's keys its queries see, and under which turn: integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from mlx_sink.attention.ring import Copy, Ring, Run, Turn


class KeyRange(NamedTuple):
    """A run of rows that a block of queries meets under one turn: all sinks, or none."""

    row: int
    token: int
    length: int
    turn: Turn
    sinks: bool


class Span(NamedTuple):
    """Neighbouring rows ``[start, stop)`` under the same turn; tokens need not run on."""

    start: int
    stop: int
    turn: Turn


# Neither this nor a layout is changed once it is made. Python would check that in each step.
@dataclass(slots=True, eq=False)
class Block:
    """Queries that are attended together, and the keys that any of them sees.

    Attributes:
        first: Token of the first query.
        last: Token after the last query.
        n: Queries in the block.
        ranges: The keys, in row order.
        spans: The same rows, as few pieces as their turns allow.
        in_a_row: The spans are neighbours.
        turns: The turns that the keys ask for, and what is retrieved.
        edges: The oldest window token that each query sees, counted from ``first``.
        evicted: Blocks that have left the window of each query, of which it retrieves some; empty
            if none does.
        everything: Every query sees all of these keys up to its own token: a causal mask,
            or none for a single query, says it all.
    """

    first: int
    last: int
    n: int
    ranges: tuple[KeyRange, ...]
    spans: tuple[Span, ...]
    in_a_row: bool
    turns: frozenset[Turn]
    edges: tuple[int, ...]
    evicted: tuple[int, ...]
    everything: bool


@dataclass(slots=True, eq=False)
class Layout:
    """What one call attends to: its queries, and the token behind every row of its keys.

    Compared by identity: `layout_of` hands the same object to every layer of a model, so that
    what is derived from it is worked out once a step.

    Attributes:
        ring: The state at the start of the call; query ``i`` is token ``ring.tokens + i``.
        n: Queries of the call.
        runs: The rows of the key array.
        held: Those that come out of the slots, in the same order; the others are the call's.
        writes: Which of the call's rows go to which slots.
        after: The state at the end of the call.
        recalls: Blocks that each query retrieves at the most; 0 if the call does not recall.
        extent: Slots that hold a token at the end of the call.
    """

    ring: Ring
    n: int
    runs: tuple[Run, ...]
    held: tuple[Run, ...]
    writes: tuple[Copy, ...]
    after: Ring
    recalls: int
    extent: int

    @property
    def end(self) -> int:
        """The token after the last query."""
        return self.ring.tokens + self.n

    def turns(self, turn: Turn) -> range | list[int]:
        """Return how far each query is turned towards keys of a kind, in positions.

        Sinks: from P = t - A to ``min(t, S + r + t - o(t))``, which is the distance to token 0 if
        r evicted tokens are retrieved. Without recall that is ``min(t, S + W - 1)``.

        Far: to W, the distance at which the keys of an archived block are scored.
        """
        ring, queries = self.ring, range(self.ring.tokens, self.end)
        if turn is Turn.SINK:
            return [min(t, self._farthest(t)) - (t - ring.start) for t in queries]
        if turn is Turn.FAR:
            return [ring.window - (t - ring.start) for t in queries]
        return [ring.start - ring.previous if turn is Turn.PREVIOUS else 0] * self.n

    def retrieved(self, token: int) -> int:
        """Return how many evicted tokens the query of ``token`` retrieves."""
        return min(self.recalls, self.ring.evicted(token)) * self.ring.block

    def _farthest(self, token: int) -> int:
        ring = self.ring
        retrieved = self.retrieved(token) if self.recalls else 0
        return ring.num_sinks + retrieved + token - ring.edge(token)

    def block(self, first: int, last: int) -> Block:
        """Return the keys that queries ``first .. last-1`` see, split by turn."""
        ring, S, W = self.ring, self.ring.num_sinks, self.ring.window
        edges = [first - first % W if ring.chunked else ring.edge(t) for t in range(first, last)]
        oldest, evicted = max(S, edges[0]), tuple[int, ...]()
        if self.recalls and ring.evicted(last - 1):
            evicted = tuple(map(ring.evicted, range(first, last)))
        # In the first epoch and with everything in sight, positions are already right.
        is_right = ring.start == 0 and self._farthest(last - 1) >= last - 1
        sink = Turn.NONE if is_right and not evicted else Turn.SINK
        seen = (
            (0, min(S, last), sink, True),
            (oldest, min(last, ring.start), Turn.PREVIOUS, False),
            (max(oldest, ring.start), last, Turn.NONE, False),
        )
        ranges: list[KeyRange] = []
        for run in self.runs:
            for low, high, turn, sinks in seen:
                token = max(low, run.token)
                length = min(high, run.token + run.length) - token
                if length > 0:
                    row = run.row + token - run.token
                    ranges.append(KeyRange(row, token, length, turn, sinks))
        spans = _merged(ranges)
        return Block(
            first,
            last,
            last - first,
            tuple(ranges),
            spans,
            all(a.stop == b.start for a, b in pairwise(spans)),
            frozenset([*(r.turn for r in ranges), *([Turn.SINK] if evicted else [])]),
            tuple(edge - first for edge in edges),
            evicted,
            everything=edges[-1] <= oldest,
        )


@lru_cache(maxsize=16)
def layout_of(ring: Ring, n: int, recalls: int = 0) -> Layout:
    """Lay out a call of ``n`` tokens on a ring, each of which retrieves some evicted blocks.

    A decode step (n = 1) attends to the ring itself in slot order, the new token already in
    its slot. A chunk attends to the ring's rows in token order and then to its own: the ring
    has no room for it.
    """
    writes, after = ring.writes(n), ring.advanced(n)
    if n == 1:
        held = after.live_runs()
        return Layout(ring, n, held, held, writes, after, recalls, after.extent)
    held = ring.in_token_order()
    runs: list[Run] = []
    for run in (*held, Run(0, ring.tokens, n)):
        last = runs[-1] if runs else Run(0, 0, 0)
        if last.token + last.length == run.token and runs:
            runs[-1] = last._replace(length=last.length + run.length)
        else:
            runs.append(run._replace(row=last.row + last.length))
    return Layout(ring, n, tuple(runs), held, writes, after, recalls, after.extent)


@lru_cache(maxsize=64)
def blocks_of(layout: Layout, size: int) -> tuple[Block, ...]:
    """Cut the queries of a call into blocks of at most ``size``, and between chunks."""
    first, blocks = layout.ring.tokens, list[Block]()
    while first < layout.end:
        last = min(first + size, layout.end)
        if layout.ring.chunked:
            last = min(last, first - first % layout.ring.window + layout.ring.window)
        blocks.append(layout.block(first, last))
        first = last
    return tuple(blocks)


def _merged(ranges: Sequence[KeyRange]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for r in ranges:
        stop = r.row + r.length
        if spans and spans[-1].stop == r.row and spans[-1].turn is r.turn:
            spans[-1] = spans[-1]._replace(stop=stop)
        else:
            spans.append(Span(r.row, stop, r.turn))
    return tuple(spans)
