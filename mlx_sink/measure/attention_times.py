"""Time one layer's attention on a full sink ring: the kernel, plain operations, MLX's own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_sink.attention import reference
from mlx_sink.attention.kernels import check_decode, check_prefill, source
from mlx_sink.attention.kernels.check_decode import DecodeVariant
from mlx_sink.attention.kernels.check_prefill import PrefillVariant
from mlx_sink.attention.kernels.sample import Sample
from mlx_sink.attention.ring import Ring
from mlx_sink.config import SinkConfig

STEPS = 32
"""Decode steps of a round on a GPU: enough to hide the cost of the round itself."""
CHUNKS = 4
"""Prefill chunks of a round on a GPU."""


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one layer's attention, each the median of some rounds.

    Attributes:
        kernel: The kernel; None where it does not run.
        operations: The plain operations that serve without it.
        sdpa: `mx.fast.scaled_dot_product_attention` over as many keys, without the sinks' turn:
            what a cache without sinks costs.
    """

    kernel: float | None
    operations: float
    sdpa: float

    def to_dict(self) -> dict[str, float | None]:
        """Return the times as a JSON-ready dictionary."""
        return {"kernel_us": self.kernel, "ops_us": self.operations, "sdpa_us": self.sdpa}


def full_ring(config: SinkConfig) -> Ring:
    """Return a ring that has wrapped, half of whose window lies in the epoch before."""
    start = 3 * config.epoch_length
    return Ring(
        config.num_sinks,
        config.window,
        config.epoch_length,
        tokens=start + config.window // 2,
        start=start,
        previous=start - config.epoch_length,
    )


def decode_times(
    variant: DecodeVariant, n_kv_heads: int, config: SinkConfig, *, rounds: int, kernel: bool
) -> Times:
    """Time a decode step of one layer and one sequence.

    Args:
        variant: What to time. Its values must be as wide as its keys.
        n_kv_heads: Heads of keys and values.
        config: The ring.
        rounds: Rounds of each timing.
        kernel: Time the kernel too.
    """
    sample = variant.sample(n_kv_heads, rings=(full_ring(config),))
    launch = check_decode.launcher(sample) if kernel else None
    return _times(
        sample,
        None if launch is None else lambda queries: launch(queries, None),
        None,
        rounds,
        STEPS if source.is_available() else 2,
    )


def prefill_times(
    variant: PrefillVariant,
    n_heads: int,
    n_kv_heads: int,
    config: SinkConfig,
    *,
    chunk: int,
    rounds: int,
    kernel: bool,
) -> Times:
    """Time reading a chunk in one layer and one sequence.

    MLX's own attention gets a mask array: what a chunk on a rotating cache costs.

    Args:
        variant: What to time. Its values must be as wide as its keys.
        n_heads: Query heads.
        n_kv_heads: Heads of keys and values.
        config: The ring.
        chunk: Tokens that are read.
        rounds: Rounds of each timing.
        kernel: Time the kernel too.
    """
    sample = variant.sample(chunk, n_heads, n_kv_heads, rings=(full_ring(config),))
    return _times(
        sample,
        check_prefill.launcher(sample) if kernel else None,
        reference.mask_of(sample.layouts[0]),
        rounds,
        CHUNKS if source.is_available() else 1,
    )


def _times(
    sample: Sample,
    launch: Callable[[mx.array], mx.array] | None,
    mask: mx.array | None,
    rounds: int,
    steps: int,
) -> Times:
    learned = sample.options["learned_sinks"]
    sinks = None if learned is None else learned.astype(sample.queries.dtype)

    def by_sdpa(queries: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(
            queries, sample.keys, sample.values, scale=sample.scale, mask=mask, sinks=sinks
        )

    return Times(
        None if launch is None else _microseconds(launch, sample.queries, rounds, steps),
        _microseconds(sample.by_operations, sample.queries, rounds, steps),
        _microseconds(by_sdpa, sample.queries, rounds, steps),
    )


def _microseconds(
    step: Callable[[mx.array], mx.array], queries: mx.array, rounds: int, steps: int
) -> float:
    """Return a step's time: the median over rounds of steps that wait for one another.

    As layers do: each step's queries are the outputs of the one before.
    """
    times: list[float] = []
    for _ in range(rounds + 1):
        start, x = time.perf_counter(), queries
        for _ in range(steps):
            x = step(x)
        x.sum().item()
        times.append((time.perf_counter() - start) / steps * 1e6)
    return round(statistics.median(times[1:]), 1)  # the first round compiles
