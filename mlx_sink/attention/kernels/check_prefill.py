"""Where the prefill kernel serves: each of its variants must be right on this machine, and faster.

`trust` has the rules, and stores the verdicts. This kernel competes with plain operations that run
on MLX's own matrix products, so at first use it is also timed against them: some launches of a few
milliseconds on a GPU. The verdict has the result.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_sink.attention.kernels import inputs, prefill, source, trust
from mlx_sink.attention.kernels.sample import RINGS, Sample, random_sample
from mlx_sink.attention.kernels.tables import PrefillTables, prefill_tables
from mlx_sink.attention.ring import Ring
from mlx_sink.attention.rope import Rotation
from mlx_sink.errors import KernelError

CHUNK = 70
"""Queries of the check: two full tiles and one that is not."""
TIMED_CHUNK = 512
TIMED_RING = Ring(num_sinks=4, window=1024, epoch=4096, tokens=8704, start=8192, previous=4096)
"""What is timed: a ring half of whose window lies in the epoch before."""
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class PrefillVariant:
    """What MLX compiles a prefill kernel of its own for; names as in `DecodeVariant`."""

    dtype: mx.Dtype
    head_dim: int
    v_head_dim: int
    rotated: int
    interleaved: bool
    softcap: bool = False
    learned_sinks: bool = False

    @property
    def name(self) -> str:
        """One word that no other variant has."""
        return trust.name_of(
            f"prefill-{self.dtype}",
            (self.head_dim, self.v_head_dim),
            "",
            (self.rotated, self.interleaved),
            (self.softcap, self.learned_sinks),
        )

    def sample(
        self,
        n: int = CHUNK,
        n_heads: int = 8,
        n_kv_heads: int = 2,
        rings: Sequence[Ring] = RINGS,
    ) -> Sample:
        """Return random arrays for this variant, the same every time."""
        return random_sample(
            self.dtype,
            n=n,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            rotated=self.rotated,
            interleaved=self.interleaved,
            softcap=self.softcap,
            learned_sinks=self.learned_sinks,
            rings=rings,
        )


def serves(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    rotation: Rotation,
    *,
    softcap: float | None = None,
    learned_sinks: mx.array | None = None,
) -> prefill.Tile | None:
    """Return the kernel's tile if it serves a chunk, checking and timing the first of its kind.

    Its text is Metal's alone: CUDA has no 8x8 fragments.

    Args:
        queries: ``[B, n_heads, L, head_dim]``.
        keys: ``[B, n_kv_heads, rows, head_dim]``.
        values: ``[B, n_kv_heads, rows, v_head_dim]``.
        rotation: The layer's rotary embedding.
        softcap: As in `prefill.prefill`.
        learned_sinks: As in `prefill.prefill`.

    Raises:
        KernelError: `trust.SWITCH` is ``on``, and there is no GPU or the check failed.
        ConfigError: `trust.SWITCH` is none of its three words.
    """
    if not trust.is_wanted() or source.backend() != "metal":
        return None
    dtype, (_, H, _, D), n_kv, DV = queries.dtype, queries.shape, keys.shape[1], values.shape[3]
    if mx.default_device() != source.device() or D % 16 or DV % 16:
        return None
    if inputs.MAX_GROUP * n_kv < H or dtype not in inputs.DTYPES:
        return None
    if keys.dtype != dtype or values.dtype != dtype:
        return None
    tile = prefill.tile_of(D, DV, dtype)
    variant = PrefillVariant(
        dtype,
        D,
        DV,
        rotation.dims,
        rotation.interleaved,
        softcap=softcap is not None,
        learned_sinks=learned_sinks is not None,
    )
    return tile if tile is not None and _is_trusted(variant) else None


@functools.cache
def _is_trusted(variant: PrefillVariant) -> bool:
    """Tell whether a kernel serves; warn once if one is wrong."""
    verdict = trust.verdict_of(variant.name, lambda: check(variant))
    if not trust.accepts(variant.name, verdict):
        return False
    slower = verdict.speedup is not None and verdict.speedup <= 1
    return not slower or trust.is_forced()


def check(variant: PrefillVariant) -> trust.Verdict:
    """Run a variant on wrapped rings, compare it with `reference`, and time both."""
    sample = variant.sample()
    try:
        verdict = trust.judge(sample.error(launcher(sample)(sample.queries)), variant.dtype)
        return replace(verdict, speedup=speedup(variant)) if verdict.passed else verdict
    except (RuntimeError, ValueError) as error:
        return trust.failure(error)


def speedup(variant: PrefillVariant) -> float:
    """Return how many times faster the kernel is on this machine than the plain operations."""
    sample = variant.sample(TIMED_CHUNK, rings=(TIMED_RING,))
    queries, launch = sample.queries, launcher(sample)
    times = [
        (_seconds(lambda: launch(queries)), _seconds(lambda: sample.by_operations(queries)))
        for _ in range(ROUNDS + 1)
    ]
    kernel, operations = zip(*times[1:], strict=True)  # the first round compiles
    return round(statistics.median(operations) / statistics.median(kernel), 3)


def launcher(sample: Sample) -> Callable[[mx.array], mx.array]:
    """Return a function of queries that launches the kernel on a sample.

    Raises:
        KernelError: The heads are too large for the kernel.
    """
    head_dim, v_head_dim = sample.keys.shape[3], sample.values.shape[3]
    tile = prefill.tile_of(head_dim, v_head_dim, sample.queries.dtype)
    if tile is None:
        raise KernelError(f"no tile of heads of {head_dim}, {v_head_dim} fits threadgroup memory")
    rows = [
        prefill_tables(layout, layout.ring.tokens, layout.end, sample.rotation, tile.queries)
        for layout in sample.layouts
    ]
    tables = rows[0] if len(rows) == 1 else PrefillTables.stack(rows)
    return lambda queries: prefill.prefill(
        queries, sample.keys, sample.values, tables, scale=sample.scale, **sample.options
    )


def _seconds(run: Callable[[], mx.array]) -> float:
    start = time.perf_counter()
    run().sum().item()
    return time.perf_counter() - start


def forget() -> None:
    """Forget what this process has decided: tests change the machine under it."""
    prefill.forget()
    trust.is_wanted.cache_clear()
    _is_trusted.cache_clear()
