"""Arms side by side on one text, in one process: what each costs, and what it still knows.

All arms read the same tokens up to a length; then each decodes the same last tokens before it, in
turns, and is timed. Those tokens are part of the text like all others, so nothing is fed that does
not count. Then the next length.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sink.config import SinkConfig
from mlx_sink.errors import InputError, UnsupportedModelError
from mlx_sink.measure import losses
from mlx_sink.measure import methods as arms
from mlx_sink.measure.losses import Losses, Tokens
from mlx_sink.measure.machine import timed
from mlx_sink.models.lazy import weight_bytes

STEPS = 32
"""Tokens before each length that are decoded one by one and timed."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is compared.

    Attributes:
        config: Sinks and window; other arms keep as many tokens.
        arms: Names of `arms.NAMES`.
        lengths: Tokens at which everything is measured, ascending.
        chunk: Tokens read at once.
        seconds: Reading time after which an arm is stopped.
        samples: Tokens between two lengths that are recomputed.
        limit: Bytes of cache beyond which an arm is stopped.
    """

    config: SinkConfig
    arms: tuple[str, ...]
    lengths: tuple[int, ...]
    chunk: int = 512
    seconds: float = 180.0
    samples: int = 64
    limit: int = 1 << 40

    def __post_init__(self) -> None:
        gaps = [b - a for a, b in pairwise((0, *self.lengths))]
        if not gaps or min(gaps) <= STEPS:
            raise InputError(f"lengths must ascend by more than {STEPS}, got {list(self.lengths)}")


@dataclass(slots=True)
class Arm:
    """Where one arm stands.

    Attributes:
        name: Of `arms.NAMES`.
        caches: Its caches.
        losses: Of the tokens that it has read; those of `arms.SAMPLED` of the samples.
        sampled: Positions of those samples.
        at: What was measured at each length.
        seconds: Time spent reading.
        bucket: Tokens and seconds of reading since the last length.
        workspace: Most bytes that reading has taken since then beside the caches.
        stopped: Why it went no further.
    """

    name: str
    caches: list[Any]
    losses: list[Losses] = field(default_factory=list[Losses])
    sampled: list[int] = field(default_factory=list[int])
    at: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    seconds: float = 0.0
    bucket: list[float] = field(default_factory=lambda: [0.0, 0.0])
    workspace: int = 0
    stopped: str | None = None
    position: int = 0

    def add(self, part: Losses) -> None:
        """Take in the losses of the next tokens."""
        self.losses.append(part)
        self.position += part.size

    def all_losses(self) -> Losses:
        """Return the losses so far in one array."""
        self.losses = [np.concatenate([np.empty(0, np.float32), *self.losses])]
        return self.losses[0]


class Comparison:
    """A run that can stop after any step and go on.

    Args:
        model: From `load`.
        inputs: Tokens to feed, ``[1, tokens]``.
        targets: Those to predict.
        settings: What to compare.

    Attributes:
        arms: Where each stands, by name.
        skipped: Arms that the model cannot have, and why.
    """

    def __init__(self, model: nn.Module, inputs: Tokens, targets: Tokens, settings: Settings):
        self.model, self.settings = model, settings
        self._inputs, self._targets = inputs, targets
        self.arms: dict[str, Arm] = {}
        self.skipped: dict[str, str] = {}
        for name in settings.arms:
            try:
                made = [] if name == arms.SAMPLED else arms.caches_of(name, model, settings.config)
                self.arms[name] = Arm(name, made)
            except UnsupportedModelError as error:
                self.skipped[name] = str(error)

    def seconds_left(self) -> float:
        """Return how long reading will go on, by the speed of each arm so far."""
        end, left = self.settings.lengths[-1], 0.0
        for arm in self._streams():
            if arm.stopped or arm.position >= end:
                continue
            tokens, seconds = arm.bucket
            speed = tokens / seconds if seconds else None
            if speed is None and arm.at:
                speed = arm.at[-1]["prefill_tokens_per_s"]
            most = max(0.0, self.settings.seconds - arm.seconds)
            left += most if speed is None else min(most, (end - arm.position) / speed)
        return left

    def steps(self) -> Iterator[None]:
        """Go on to the end; after each step everything is consistent."""
        for length in self.settings.lengths:
            for arm in self._streams():
                yield from self._read(arm, length)
            self._decode(length)
            yield
            if arms.SAMPLED in self.arms:
                self._recompute(self.arms[arms.SAMPLED], length)
                yield

    def _streams(self) -> list[Arm]:
        return [arm for name, arm in self.arms.items() if name != arms.SAMPLED]

    def _read(self, arm: Arm, length: int) -> Iterator[None]:
        until, chunk = length - STEPS, arms.chunk_of(arm.name, self.settings.chunk)
        if arm.position < until and not arm.stopped:
            held = arms.nbytes(arm.caches)
            grown = held * until // max(arm.position, 1)
            if arm.name == "full" and arm.position and grown > self.settings.limit:
                arm.stopped = f"{grown / 1e9:.1f} GB of cache would not fit"
            elif arm.at:
                # To read on without coming to the next length would show nothing.
                rest = (until - arm.position) / arm.at[-1]["prefill_tokens_per_s"]
                if not arm.bucket[0] and arm.seconds + rest > self.settings.seconds:
                    arm.stopped = "its time is out before the next length"
        while arm.position < until and not arm.stopped:
            # A chunk in the middle ends where it would in a run that was not stopped.
            end = min(until, arm.position + max(chunk, 16))
            before, span = mx.get_active_memory(), slice(arm.position, end)
            mx.reset_peak_memory()
            parts = losses.chunk_losses(
                self.model, arm.caches, self._inputs[:, span], self._targets[:, span], chunk
            )
            began = time.perf_counter()
            read = [part[0] for _, part in parts]
            took = time.perf_counter() - began
            for part in read:
                arm.add(part)
            arm.workspace = max(arm.workspace, mx.get_peak_memory() - before)
            arm.seconds += took
            arm.bucket = [arm.bucket[0] + end - span.start, arm.bucket[1] + took]
            if arm.seconds > self.settings.seconds and arm.position < until:
                arm.stopped = "its time was out"
            yield

    def _decode(self, length: int) -> None:
        """Decode the last tokens before a length with every arm that got there, in turns."""
        alive = [arm for arm in self._streams() if arm.position == length - STEPS]
        times: dict[str, list[float]] = {arm.name: [] for arm in alive}
        for t in range(length - STEPS, length):
            for arm in alive if t % 2 else reversed(alive):
                span = slice(t, t + 1)
                step = losses.chunk_losses(
                    self.model, arm.caches, self._inputs[:, span], self._targets[:, span], 1
                )
                times[arm.name].append(timed(lambda step=step, arm=arm: _take(step, arm)).wall)
        weights = weight_bytes(self.model)
        for arm in alive:
            tokens, seconds = arm.bucket
            held = arms.nbytes(arm.caches)
            costs = {
                "length": length,
                **_spread(times[arm.name]),
                "prefill_tokens_per_s": round(tokens / seconds, 2),
                "cache_bytes": held,
                "peak_bytes": weights + held + arm.workspace,
            }
            arm.at.append(costs | self._bucket(arm.all_losses(), length, losses.BLOCK))
            arm.bucket, arm.workspace = [0.0, 0.0], 0

    def _bucket(self, of_arm: Losses, length: int, block: int) -> dict[str, Any]:
        since = max((n for n in self.settings.lengths if n < length), default=0)
        part = of_arm[since:length] if block > 1 else of_arm[-self.settings.samples :]
        low, high = losses.interval(part, block)
        return losses.figures(part) | {"from": since, "low": low, "high": high}

    def _recompute(self, arm: Arm, length: int) -> None:
        if any(done["length"] == length for done in arm.at):
            return
        since = max((n for n in self.settings.lengths if n < length), default=0)
        n = min(self.settings.samples, length - since)
        sampled = [since + (2 * i + 1) * (length - since) // (2 * n) for i in range(n)]
        args = (self.model, self.settings.config, self._inputs, self._targets)
        times: list[float] = []
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for t in sampled:
            step = ((0, part[None]) for part in losses.recompute(*args, [t]))
            times.append(timed(lambda step=step: _take(step, arm)).wall)
        held = {"cache_bytes": 0, "prefill_tokens_per_s": round(1 / statistics.mean(times), 2)}
        weights = weight_bytes(self.model)
        held["peak_bytes"] = weights + mx.get_peak_memory() - before
        arm.sampled += sampled
        costs = {"length": length, **_spread(times), **held}
        arm.at.append(costs | self._bucket(arm.all_losses(), length, 1))

    def beside_recompute(self) -> dict[str, Any]:
        """Compare the other arms with recomputing, on the same tokens past the first eviction."""
        oracle = self.arms.get(arms.SAMPLED)
        if oracle is None:
            return {}
        found: dict[str, Any] = {}
        where = np.array(oracle.sampled, np.int64)
        for arm in self._streams():
            both = (where >= self.settings.config.capacity) & (where < arm.position)
            if both.sum() < 2:
                continue
            mine = arm.all_losses()[where[both]]
            theirs = oracle.all_losses()[: len(where)][both]
            low, high = losses.interval(mine - theirs, 1)
            difference = float((mine - theirs).mean(dtype=np.float64))
            found[arm.name] = {
                "count": int(both.sum()),
                "perplexity": losses.figures(mine)["perplexity"],
                "recompute": losses.figures(theirs)["perplexity"],
                "difference": difference,
                "low": low,
                "high": high,
            }
        return found

    def found(self) -> dict[str, Any]:
        """Return what has been measured so far, JSON-ready."""
        return {
            name: {"tokens": arm.position, "stopped": arm.stopped, "at": arm.at}
            for name, arm in self.arms.items()
        } | {name: {"tokens": 0, "stopped": why, "at": []} for name, why in self.skipped.items()}


def _take(step: Iterator[tuple[int, Losses]], arm: Arm) -> None:
    for _, part in step:
        arm.add(part[0])


def _spread(times: Sequence[float]) -> dict[str, float]:
    low, middle, high = (float(np.percentile(times, q)) * 1e3 for q in (25, 50, 75))
    return {"ms": round(middle, 4), "ms_low": round(low, 4), "ms_high": round(high, 4)}
