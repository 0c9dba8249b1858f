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

With blocks of b tokens (recall) the window of token t begins at a block's edge, ``o(t) = S + b
floor((t - W + 1 - S) / b)``, and has W to W + b - 1 tokens: what is evicted is whole blocks, so
that every token is either seen or archived. The ring has b - 1 slots more. With b = 1 it is as
above: ``o(t) = t - W + 1``.

Positions are counted from the start of the current *epoch*, so that they stay small. A key is
rotated once, at the position it had when it arrived. What a query needs instead is an extra
*turn*, one for each kind of key range (`Turn`), because rotations add up: R(a) R(b) = R(a + b).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from mlx_sink.config import SinkConfig
from mlx_sink.errors import CacheError


class Turn(enum.IntEnum):
    """The extra rotation that a query gets before it meets the keys of a range."""

    NONE = 0
    """Keys of the same epoch: positions already differ by the true distance."""
    PREVIOUS = 1
    """Keys of the epoch before: turned by the length of that epoch."""
    SINK = 2
    """Sink tokens: turned so that the distance is ``min(t, S + W - 1) - i``. Retrieved blocks too:
    their keys are turned to follow on the sinks."""
    FAR = 3
    """Archived keys while they are scored: turned so that a block begins at distance W."""


class Run(NamedTuple):
    """Rows of a key array that hold consecutive tokens: ``row + i`` holds ``token + i``."""

    row: int
    token: int
    length: int


class Copy(NamedTuple):
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
        epoch: E, tokens after which positions restart; at least S + W + b - 1 + R, so that the
            sinks lie in the first epoch and a window never spans more than two, nor does one that
            stands up to R tokens before the newest: two beginnings are all there is to remember.
        tokens: t, tokens seen so far, which is also the index of the next one.
        start: A, the token at which the current epoch began.
        previous: The token at which the epoch before began.
        rollback: R, spare slots.
        taken_back: Rows beyond the newest token that are still in the slots: of tokens that were
            taken back, and not yet overwritten. They have used up as many spare slots.
        block: b, tokens by which the beginning of the window moves.
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
    block: int = 1

    @classmethod
    def from_config(cls, config: SinkConfig) -> Ring:
        """Return the ring of a stream that has seen nothing."""
        S, W, E = config.num_sinks, config.window, config.epoch_length
        return cls(S, W, E, rollback=config.rollback, block=config.block)

    @property
    def capacity(self) -> int:
        """Tokens that every query of a full ring sees, S + W."""
        return self.num_sinks + self.window

    @property
    def _ring_slots(self) -> int:
        return self.window + self.block - 1 + self.rollback

    @property
    def slots(self) -> int:
        """Slots of a full ring, S + W + b - 1 + R."""
        return self.num_sinks + self._ring_slots

    @property
    def position(self) -> int:
        """P, what RoPE sees for the next token: tokens since the epoch began."""
        return self.tokens - self.start

    @property
    def live(self) -> int:
        """Slots that hold a token that the newest one sees."""
        return min(self.tokens, self.num_sinks + self.tokens - self.edge(self.tokens - 1))

    def edge(self, token: int) -> int:
        """Return o(t), the oldest token of the window of ``token``; at least S."""
        beyond = token - self.window + 1 - self.num_sinks
        return self.num_sinks + max(0, beyond - beyond % self.block)

    def evicted(self, token: int) -> int:
        """Return how many blocks have left the window of ``token``."""
        return (self.edge(token) - self.num_sinks) // self.block

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
        return self.num_sinks + (token - self.num_sinks) % self._ring_slots

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
            # E is long enough: what can be seen from here lies in that epoch, and none before it.
            start = self.previous
        return self._at(tokens, start, self.previous, self.taken_back + n)

    def _at(self, tokens: int, start: int, previous: int, taken_back: int) -> Ring:
        """Return the state at a token, in a new epoch if the one that began at start is over."""
        if tokens - start >= self.epoch:
            start, previous = tokens, start
        S, W, E, R = self.num_sinks, self.window, self.epoch, self.rollback
        return Ring(S, W, E, tokens, start, previous, R, taken_back, self.chunked, self.block)

    def live_runs(self) -> tuple[Run, ...]:
        """Return the tokens of the context in slot order."""
        t, S, oldest = self.tokens, self.num_sinks, self.edge(self.tokens - 1)
        if oldest == S:
            return non_empty(Run(0, 0, t))
        first = self.slot(oldest)
        whole = min(t - oldest, self.slots - first)
        return non_empty(
            Run(0, 0, S),
            Run(S, oldest + whole, t - oldest - whole),
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
        token = max(t, S, end - self._ring_slots)
        while token < end:
            slot = self.slot(token)
            length = min(end - token, self.slots - slot)
            copies.append(Copy(token - t, slot, length))
            token += length
        return tuple(copies)


def non_empty(*runs: Run) -> tuple[Run, ...]:
    """Return the runs that have rows."""
    return tuple(run for run in runs if run.length > 0)
