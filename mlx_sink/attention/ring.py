"""Where tokens live and how far apart they are: integers only, no arrays.

The first S tokens of a stream (the sinks) keep slots ``0..S-1`` for ever; token ``a >= S`` lives
in slot ``S + (a - S) % W`` until token ``a + W`` overwrites it. With S = 2, W = 4, after 9
tokens (0..8)::

    slot    0  1 | 2  3  4  5
    token   0  1 | 6  7  8  5        token 5 is the oldest, 8 the newest

With R = ``rollback`` spare slots the ring has W + R, and a token is overwritten R tokens later. A
query sees the newest W all the same; the R before those are kept for when tokens are taken back::

    slot    0  1 | 2  3  4  5  6     R = 1: token 4 is not seen, until 8 is taken back
    token   0  1 | 7  8  4  5  6

Positions are counted from the start of the current *epoch*, so that they stay small. A key is
rotated once, at the position it had when it arrived. What a query needs instead is an extra
*turn*, one for each kind of key range (`Turn`), because rotations add up: R(a) R(b) = R(a + b).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from mlx_sink.config import SinkConfig
from mlx_sink.errors import CacheError


class Turn(enum.IntEnum):
    """The extra rotation that a query gets before it meets the keys of a range."""

    NONE = 0
    """Keys of the same epoch: positions already differ by the true distance."""
    PREVIOUS = 1
    """Keys of the epoch before: turned by the length of that epoch."""
    SINK = 2
    """Sink tokens: turned so that the distance is ``min(t, S + W - 1) - i``."""


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a key array that hold consecutive tokens: ``row + i`` holds ``token + i``."""

    row: int
    token: int
    length: int


@dataclass(frozen=True, slots=True)
class Copy:
    """``length`` rows from ``source`` of one array to ``target`` of another."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Ring:
    """The state of a stream: how many tokens came, and where its epochs began.

    Immutable; `advanced` and `trimmed` return the next state.

    Attributes:
        num_sinks: S.
        window: W, own token included.
        epoch: E, tokens after which positions restart; at least S + W + R, so that the sinks lie
            in the first epoch and a window never spans more than two, nor does a window that
            stands up to R tokens before the newest: two beginnings are all there is to remember.
        tokens: t, tokens seen so far, which is also the index of the next one.
        start: A, the token at which the current epoch began.
        previous: The token at which the epoch before began.
        rollback: R, spare slots.
        taken_back: Rows beyond the newest token that are still in the slots: of tokens that were
            taken back, and not yet overwritten. They have used up as many spare slots.
        chunked: A query sees nothing before the last token whose index is a multiple of W
            (chunked attention, Llama 4), and without sinks.
    """

    num_sinks: int
    window: int
    epoch: int
    tokens: int = 0
    start: int = 0
    previous: int = 0
    rollback: int = 0
    taken_back: int = 0
    chunked: bool = False

    @classmethod
    def from_config(cls, config: SinkConfig) -> Ring:
        """Return the ring of a stream that has seen nothing."""
        S, W, E = config.num_sinks, config.window, config.epoch_length
        return cls(S, W, E, rollback=config.rollback)

    @property
    def capacity(self) -> int:
        """Tokens that a full ring's next query may see, S + W."""
        return self.num_sinks + self.window

    @property
    def slots(self) -> int:
        """Slots of a full ring, S + W + R."""
        return self.capacity + self.rollback

    @property
    def position(self) -> int:
        """P, what RoPE sees for the next token: tokens since the epoch began."""
        return self.tokens - self.start

    @property
    def live(self) -> int:
        """Slots that hold a token of the context."""
        return min(self.tokens, self.capacity)

    @property
    def extent(self) -> int:
        """Slots up to the last that holds a token."""
        return min(self.tokens, self.slots)

    @property
    def spare(self) -> int:
        """How many tokens can be taken back: R; all, while nothing has been overwritten."""
        if self.tokens + self.taken_back <= self.slots:
            return self.tokens
        return self.rollback - self.taken_back

    def slot(self, token: int) -> int:
        """Return the slot that holds ``token`` while it is alive."""
        if token < self.num_sinks:
            return token
        return self.num_sinks + (token - self.num_sinks) % (self.window + self.rollback)

    def advanced(self, n: int) -> Ring:
        """Return the state after ``n`` more tokens, in a new epoch if this one is over."""
        left = max(0, self.taken_back - n)
        return self._at(self.tokens + n, self.start, self.previous, left)

    def trimmed(self, n: int) -> Ring:
        """Return the state with the newest ``n`` tokens taken back.

        Raises:
            CacheError: More tokens than were seen, or more than can come back: a query would
                have to see tokens whose keys have been overwritten.
        """
        if not 0 <= n <= self.tokens:
            raise CacheError(f"cannot take back {n} tokens of {self.tokens}")
        if n > self.spare:
            raise CacheError(
                f"cannot take back {n} tokens, only {self.spare}: the keys that would be seen "
                f"then have been overwritten; SinkConfig(rollback=n) keeps those of n more tokens"
            )
        return self._back(n)

    def reopened(self) -> Ring:
        """Return the state before the newest token, which must be the next to come.

        This is exact without a spare slot: the one row that may be gone is the one that the
        newest token has overwritten, and will again.

        Raises:
            CacheError: There is no token.
        """
        if not self.tokens:
            raise CacheError("cannot read the newest token again: there is none")
        return self._back(1)

    def _back(self, n: int) -> Ring:
        tokens, start = self.tokens - n, self.start
        if tokens < start:
            # E >= S + W + R: what can be seen from here lies in that epoch, and none before it.
            start = self.previous
        return self._at(tokens, start, self.previous, self.taken_back + n)

    def _at(self, tokens: int, start: int, previous: int, taken_back: int) -> Ring:
        """Return the state at a token, in a new epoch if the one that began at start is over."""
        if tokens - start >= self.epoch:
            start, previous = tokens, start
        S, W, E, R = self.num_sinks, self.window, self.epoch, self.rollback
        return Ring(S, W, E, tokens, start, previous, R, taken_back, self.chunked)

    def live_runs(self) -> tuple[Run, ...]:
        """Return the tokens of the context in slot order."""
        t, S = self.tokens, self.num_sinks
        if t <= self.capacity:
            return _non_empty(Run(0, 0, t))
        oldest = t - self.window
        first = self.slot(oldest)
        whole = min(self.window, self.slots - first)
        return _non_empty(
            Run(0, 0, S),
            Run(S, oldest + whole, self.window - whole),
            Run(first, oldest, whole),
        )

    def in_token_order(self) -> tuple[Run, ...]:
        """Return the tokens of the context, oldest first."""
        return tuple(sorted(self.live_runs(), key=lambda run: run.token))

    def writes(self, n: int) -> tuple[Copy, ...]:
        """Return which of ``n`` arriving rows go to which slots, the evicted ones left out."""
        t, end, S = self.tokens, self.tokens + n, self.num_sinks
        copies: list[Copy] = []
        if t < S:
            copies.append(Copy(0, t, min(end, S) - t))
        token = max(t, S, end - self.window - self.rollback)
        while token < end:
            slot = self.slot(token)
            length = min(end - token, self.slots - slot)
            copies.append(Copy(token - t, slot, length))
            token += length
        return tuple(copies)


@dataclass(frozen=True, slots=True)
class KeyRange:
    """A run of rows that a block of queries meets under one turn: all sinks, or none."""

    row: int
    token: int
    length: int
    turn: Turn
    sinks: bool


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring rows ``[start, stop)`` under the same turn; tokens need not run on."""

    start: int
    stop: int
    turn: Turn


@dataclass(frozen=True, slots=True)
class Block:
    """Queries that are attended together, and the keys that any of them sees.

    Attributes:
        first: Token of the first query.
        last: Token after the last query.
        n: Queries in the block.
        ranges: The keys, in row order.
        spans: The same rows, as few pieces as their turns allow.
        turns: The turns that the keys ask for.
        everything: Every query sees all of these keys up to its own token: a causal mask,
            or none for a single query, says it all.
    """

    first: int
    last: int
    n: int
    ranges: tuple[KeyRange, ...]
    spans: tuple[Span, ...]
    turns: frozenset[Turn]
    everything: bool


@dataclass(frozen=True, slots=True, eq=False)
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
    """

    ring: Ring
    n: int
    runs: tuple[Run, ...]
    held: tuple[Run, ...]
    writes: tuple[Copy, ...]
    after: Ring

    @property
    def end(self) -> int:
        """The token after the last query."""
        return self.ring.tokens + self.n

    def turns(self, turn: Turn) -> range | list[int]:
        """Return how far each query is turned towards keys of a kind, in positions.

        Sinks: from P = t - A to ``min(t, S + W - 1)``, which is the distance to token 0.
        """
        ring, queries = self.ring, range(self.ring.tokens, self.end)
        if turn is Turn.SINK:
            return [min(t, ring.capacity - 1) - (t - ring.start) for t in queries]
        return [ring.start - ring.previous if turn is Turn.PREVIOUS else 0] * self.n

    def block(self, first: int, last: int) -> Block:
        """Return the keys that queries ``first .. last-1`` see, split by turn."""
        ring, S, W = self.ring, self.ring.num_sinks, self.ring.window
        oldest = max(S, first - first % W if ring.chunked else first - W + 1)
        # In the first epoch and with nothing evicted, positions are already right.
        sink = Turn.NONE if ring.start == 0 and last <= ring.capacity else Turn.SINK
        spans = (
            (0, min(S, last), sink, True),
            (oldest, min(last, ring.start), Turn.PREVIOUS, False),
            (max(oldest, ring.start), last, Turn.NONE, False),
        )
        ranges: list[KeyRange] = []
        for run in self.runs:
            for low, high, turn, sinks in spans:
                token = max(low, run.token)
                length = min(high, run.token + run.length) - token
                if length > 0:
                    row = run.row + token - run.token
                    ranges.append(KeyRange(row, token, length, turn, sinks))
        return Block(
            first,
            last,
            last - first,
            tuple(ranges),
            _merged(ranges),
            frozenset(r.turn for r in ranges),
            everything=oldest >= last - W,
        )


@lru_cache(maxsize=16)
def layout_of(ring: Ring, n: int) -> Layout:
    """Lay out a call of ``n`` tokens on a ring.

    A decode step (n = 1) attends to the ring itself in slot order, the new token already in
    its slot. A chunk attends to the ring's rows in token order and then to its own: the ring
    has no room for it.
    """
    writes, after = ring.writes(n), ring.advanced(n)
    if n == 1:
        held = after.live_runs()
        return Layout(ring, n, held, held, writes, after)
    held = ring.in_token_order()
    runs: list[Run] = []
    for run in (*held, Run(0, ring.tokens, n)):
        last = runs[-1] if runs else Run(0, 0, 0)
        if last.token + last.length == run.token and runs:
            runs[-1] = replace(last, length=last.length + run.length)
        else:
            runs.append(replace(run, row=last.row + last.length))
    return Layout(ring, n, tuple(runs), held, writes, after)


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
            spans[-1] = replace(spans[-1], stop=stop)
        else:
            spans.append(Span(r.row, stop, r.turn))
    return tuple(spans)


def _non_empty(*runs: Run) -> tuple[Run, ...]:
    return tuple(run for run in runs if run.length > 0)
