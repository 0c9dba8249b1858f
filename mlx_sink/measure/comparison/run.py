"""Methods side by side on one text, in one process: what each costs, and what it still knows.

All methods read the same tokens up to a length; then each decodes the same last tokens before it,
in turns, and is timed. Those tokens are part of the text as all others are, so nothing is fed that
does not count. Then the next length.
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
from mlx_sink.measure.comparison import methods
from mlx_sink.measure.comparison.results import BesideRecompute, Measurement, MethodResult
from mlx_sink.measure.losses import Losses, Mean, Tokens
from mlx_sink.measure.machine import timed
from mlx_sink.models.lazy import weight_bytes

STEPS = 32
"""Tokens before each length that are decoded one by one and timed."""


@dataclass(frozen=True, slots=True)
class ComparisonSettings:
    """What is compared.

    Attributes:
        config: Sinks and window; other methods keep as many tokens.
        methods: Names of `methods.NAMES`.
        lengths: Tokens at which everything is measured, ascending.
        chunk: Tokens read at once.
        seconds: Reading time after which a method is stopped.
        samples: Tokens between two lengths that are recomputed.
        limit: Bytes of cache beyond which full attention is stopped.
    """

    config: SinkConfig
    methods: tuple[str, ...]
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
class MethodRun:
    """How far one method has come.

    Attributes:
        name: Of `methods.NAMES`.
        caches: Its caches.
        losses: Of the tokens that it has read; `methods.SAMPLED` has those of the samples.
        sampled: Positions of the samples.
        at: What was measured at each length.
        seconds: Time spent reading.
        bucket_tokens: Tokens read since the last length.
        bucket_seconds: Time spent reading since then.
        workspace: Most bytes that reading has taken since then beside the caches.
        stopped: Why it went no further.
        position: Tokens that it has read.
    """

    name: str
    caches: list[Any]
    losses: list[Losses] = field(default_factory=list[Losses])
    sampled: list[int] = field(default_factory=list[int])
    at: list[Measurement] = field(default_factory=list[Measurement])
    seconds: float = 0.0
    bucket_tokens: float = 0.0
    bucket_seconds: float = 0.0
    workspace: int = 0
    stopped: str | None = None
    position: int = 0

    def add(self, part: Losses) -> None:
        """Add the losses of the next tokens."""
        self.losses.append(part)
        self.position += part.size

    def all_losses(self) -> Losses:
        """Return the losses so far in one array."""
        self.losses = [np.concatenate([np.empty(0, np.float32), *self.losses])]
        return self.losses[0]

    def result(self) -> MethodResult:
        """Return what has been measured so far."""
        return MethodResult(self.position, self.stopped, tuple(self.at))


class Comparison:
    """A comparison that can be stopped after any step, saved and resumed.

    Args:
        model: From `load`.
        inputs: Tokens to feed, ``[1, tokens]``.
        targets: Those to predict.
        settings: What to compare.

    Attributes:
        runs: How far each method has come, by name.
        skipped: Methods that the model cannot have, and why.
    """

    def __init__(
        self, model: nn.Module, inputs: Tokens, targets: Tokens, settings: ComparisonSettings
    ):
        self.model, self.settings = model, settings
        self._inputs, self._targets = inputs, targets
        self._weights = weight_bytes(model)
        self.runs: dict[str, MethodRun] = {}
        self.skipped: dict[str, str] = {}
        for name in settings.methods:
            try:
                is_sampled = name == methods.SAMPLED
                caches = [] if is_sampled else methods.caches_of(name, model, settings.config)
                self.runs[name] = MethodRun(name, caches)
            except UnsupportedModelError as error:
                self.skipped[name] = str(error)

    def seconds_left(self) -> float:
        """Return how long reading will go on, by the speed of each method so far."""
        end, left = self.settings.lengths[-1], 0.0
        for run in self._streams():
            if run.stopped or run.position >= end:
                continue
            speed = run.bucket_tokens / run.bucket_seconds if run.bucket_seconds else None
            if speed is None and run.at:
                speed = run.at[-1].prefill_tokens_per_s
            most = max(0.0, self.settings.seconds - run.seconds)
            left += most if speed is None else min(most, (end - run.position) / speed)
        return left

    def steps(self) -> Iterator[None]:
        """Go on to the end; after each step the comparison can be saved."""
        for length in self.settings.lengths:
            for run in self._streams():
                yield from self._read(run, length)
            self._decode(length)
            yield
            if methods.SAMPLED in self.runs:
                self._recompute(self.runs[methods.SAMPLED], length)
                yield

    def _streams(self) -> list[MethodRun]:
        return [run for name, run in self.runs.items() if name != methods.SAMPLED]

    def _read(self, run: MethodRun, length: int) -> Iterator[None]:
        end = length - STEPS
        if run.position < end and not run.stopped:
            run.stopped = self._reason_to_stop(run, end)
        while run.position < end and not run.stopped:
            self._read_chunk(run, end)
            yield

    def _reason_to_stop(self, run: MethodRun, end: int) -> str | None:
        """Say why a method is not to read on to the next length, or return ``None``."""
        bytes_then = methods.nbytes(run.caches) * end // max(run.position, 1)
        if run.name == "full" and run.position and bytes_then > self.settings.limit:
            return f"{bytes_then / 1e9:.1f} GB of cache would not fit"
        if run.at and not run.bucket_tokens:
            # To read on without reaching the next length would show nothing.
            seconds_more = (end - run.position) / run.at[-1].prefill_tokens_per_s
            if run.seconds + seconds_more > self.settings.seconds:
                return "its time is out before the next length"
        return None

    def _read_chunk(self, run: MethodRun, end: int) -> None:
        chunk = methods.chunk_of(run.name, self.settings.chunk)
        start = run.position
        # Also where tokens are read one by one, a step is long enough to be worth saving after.
        stop = min(end, start + max(chunk, 16))
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        began = time.perf_counter()
        parts = [part[0] for _, part in self._losses(run, slice(start, stop), chunk)]
        seconds = time.perf_counter() - began
        for part in parts:
            run.add(part)
        run.workspace = max(run.workspace, mx.get_peak_memory() - before)
        run.seconds += seconds
        run.bucket_tokens += stop - start
        run.bucket_seconds += seconds
        if run.seconds > self.settings.seconds and run.position < end:
            run.stopped = "its time was out"

    def _losses(self, run: MethodRun, span: slice, chunk: int) -> Iterator[tuple[int, Losses]]:
        inputs, targets = self._inputs[:, span], self._targets[:, span]
        return losses.chunk_losses(self.model, run.caches, inputs, targets, chunk)

    def _decode(self, length: int) -> None:
        """Decode the last tokens before a length with every method that got there, in turns."""
        alive = [run for run in self._streams() if run.position == length - STEPS]
        times: dict[str, list[float]] = {run.name: [] for run in alive}
        for t in range(length - STEPS, length):
            for run in alive if t % 2 else reversed(alive):
                step = self._losses(run, slice(t, t + 1), 1)
                times[run.name].append(timed(lambda step=step, run=run: _take(step, run)).wall)
        for run in alive:
            nbytes = methods.nbytes(run.caches)
            run.at.append(
                self._measurement(
                    length,
                    times[run.name],
                    part=run.all_losses()[self._since(length) : length],
                    block=losses.DRAWN_TOGETHER,
                    prefill_tokens_per_s=round(run.bucket_tokens / run.bucket_seconds, 2),
                    cache_bytes=nbytes,
                    peak_bytes=self._weights + nbytes + run.workspace,
                )
            )
            run.bucket_tokens, run.bucket_seconds, run.workspace = 0.0, 0.0, 0

    def _recompute(self, run: MethodRun, length: int) -> None:
        if any(measurement.length == length for measurement in run.at):
            return
        since = self._since(length)
        n = min(self.settings.samples, length - since)
        sampled = [since + (2 * i + 1) * (length - since) // (2 * n) for i in range(n)]
        args = (self.model, self.settings.config, self._inputs, self._targets)
        times: list[float] = []
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for t in sampled:
            step = ((0, part[None]) for part in losses.recompute(*args, [t]))
            times.append(timed(lambda step=step: _take(step, run)).wall)
        peak_bytes = self._weights + mx.get_peak_memory() - before
        run.sampled += sampled
        run.at.append(
            self._measurement(
                length,
                times,
                part=run.all_losses()[-n:],
                block=1,
                prefill_tokens_per_s=round(1 / statistics.mean(times), 2),
                cache_bytes=0,
                peak_bytes=peak_bytes,
            )
        )

    def _since(self, length: int) -> int:
        """Return the length before a length, or 0."""
        return max((n for n in self.settings.lengths if n < length), default=0)

    def _measurement(
        self, length: int, times: Sequence[float], *, part: Losses, block: int, **costs: Any
    ) -> Measurement:
        mean = Mean.of(part)
        low, high = losses.interval(part, block)
        quartiles = [round(float(np.percentile(times, q)) * 1e3, 4) for q in (25, 50, 75)]
        return Measurement(
            length=length,
            ms=quartiles[1],
            ms_low=quartiles[0],
            ms_high=quartiles[2],
            count=mean.count,
            loss=mean.loss,
            perplexity=mean.perplexity,
            since=self._since(length),
            low=low,
            high=high,
            **costs,
        )

    def beside_recompute(self) -> dict[str, BesideRecompute]:
        """Compare each method with recomputing, on the same tokens past the first eviction."""
        oracle = self.runs.get(methods.SAMPLED)
        if oracle is None:
            return {}
        results: dict[str, BesideRecompute] = {}
        sampled = np.array(oracle.sampled, np.int64)
        for run in self._streams():
            both = (sampled >= self.settings.config.capacity) & (sampled < run.position)
            if both.sum() < 2:
                continue
            own = run.all_losses()[sampled[both]]
            recomputed = oracle.all_losses()[: len(sampled)][both]
            low, high = losses.interval(own - recomputed, 1)
            results[run.name] = BesideRecompute(
                count=int(both.sum()),
                perplexity=Mean.of(own).perplexity,
                recompute=Mean.of(recomputed).perplexity,
                difference=float((own - recomputed).mean(dtype=np.float64)),
                low=low,
                high=high,
            )
        return results

    def results(self) -> dict[str, MethodResult]:
        """Return what has been measured so far, by method."""
        skipped = {name: MethodResult(0, why, ()) for name, why in self.skipped.items()}
        return {name: run.result() for name, run in self.runs.items()} | skipped


def _take(step: Iterator[tuple[int, Losses]], run: MethodRun) -> None:
    for _, part in step:
        run.add(part[0])
