"""Where the prefill kernel serves: it must be right on a machine, and faster there.

`selfcheck` says how a kernel comes to be trusted, and keeps the verdicts. This one competes with
plain operations that run on MLX's own matrix products, so at first use it is timed against them as
well: some launches of a few milliseconds on a GPU, kept with the verdict.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_sink.attention import reference
from mlx_sink.attention.ring import Layout, Ring, blocks_of, layout_of
from mlx_sink.attention.rope import Rotation
from mlx_sink.kernels import arguments, prefill, selfcheck, source, trial
from mlx_sink.kernels.selfcheck import Verdict

CHUNK = 70
"""Queries of the check: two full tiles and one that is not."""
TIMED_CHUNK = 512
TIMED_RING = Ring(num_sinks=4, window=1024, epoch=4096, tokens=8704, start=8192, previous=4096)
"""What is timed: 8 query heads on 2, on a ring half of whose window lies in the epoch before."""
ROUNDS = 3
_HEADS = (8, 2)


@dataclass(frozen=True, slots=True)
class Specialisation:
    """What MLX compiles a kernel of its own for."""

    dtype: mx.Dtype
    head_dim: int
    v_head_dim: int
    rotated: int
    interleaved: bool
    softcap: bool = False
    learned_sinks: bool = False

    @property
    def name(self) -> str:
        """One word that tells it from all others."""
        heads, pairs = (self.head_dim, self.v_head_dim), (self.rotated, self.interleaved)
        options = self.softcap, self.learned_sinks
        return selfcheck.name_of(f"prefill-{self.dtype}", heads, "", pairs, options)


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
        KernelError: `selfcheck.SWITCH` is ``on``, and there is no GPU or the check failed.
        ConfigError: `selfcheck.SWITCH` is none of its three words.
    """
    if not selfcheck.is_wanted() or source.backend() != "metal":
        return None
    dtype, (_, H, _, D), n_kv, DV = queries.dtype, queries.shape, keys.shape[1], values.shape[3]
    if mx.default_device() != source.device() or D % 16 or DV % 16:
        return None
    if arguments.MAX_GROUP * n_kv < H or dtype not in arguments.DTYPES:
        return None
    if keys.dtype != dtype or values.dtype != dtype:
        return None
    tile = prefill.tile_of(D, DV, dtype)
    spec = Specialisation(
        *(dtype, D, DV, rotation.dims, rotation.interleaved),
        softcap=softcap is not None,
        learned_sinks=learned_sinks is not None,
    )
    return tile if tile is not None and _is_trusted(spec) else None


@functools.cache
def _is_trusted(spec: Specialisation) -> bool:
    """Tell whether a kernel serves; say once why a wrong one does not."""
    verdict = selfcheck.recall(spec.name, lambda: check(spec))
    if not selfcheck.accepts(spec.name, verdict):
        return False
    slower = verdict.speedup is not None and verdict.speedup <= 1
    return not slower or os.environ.get(selfcheck.SWITCH) == "on"


def check(spec: Specialisation) -> Verdict:
    """Run a specialisation on wrapped rings, compare it with `reference`, and time both."""
    layouts = [layout_of(ring, CHUNK) for ring in trial.RINGS]
    rows = max(run.row + run.length for layout in layouts for run in layout.runs)
    q, k, v = _arrays(spec, len(trial.RINGS), CHUNK, rows)
    rotation = trial.rotation_of(spec.rotated, spec.interleaved)
    scale = 2.0 * spec.head_dim**-0.5
    cap = trial.SOFTCAP if spec.softcap else None
    logits = trial.logits_of(q.shape[1]) if spec.learned_sinks else None
    try:
        tables = prefill.Tables.stack([_tables(spec, layout, rotation) for layout in layouts])
        options: reference.Extras = {"softcap": cap, "learned_sinks": logits}
        out = prefill.prefill(q, k, v, tables, scale=scale, **options)
        wanted = trial.by_reference(q, k, v, layouts, rotation, scale, cap, logits)
        verdict = selfcheck.judged(trial.error_of(out, wanted), spec.dtype)
        return replace(verdict, speedup=speedup(spec)) if verdict.passed else verdict
    except (RuntimeError, ValueError) as failure:
        return selfcheck.failed(failure)


def speedup(spec: Specialisation) -> float:
    """Return how many times faster the kernel is on this machine than the plain operations."""
    layout = layout_of(TIMED_RING, TIMED_CHUNK)
    rows = max(run.row + run.length for run in layout.runs)
    q, k, v = _arrays(spec, 1, TIMED_CHUNK, rows)
    rotation = trial.rotation_of(spec.rotated, spec.interleaved)
    scale = spec.head_dim**-0.5
    tables = _tables(spec, layout, rotation)
    cap = trial.SOFTCAP if spec.softcap else None
    logits = trial.logits_of(q.shape[1]) if spec.learned_sinks else None
    options: reference.Extras = {"softcap": cap, "learned_sinks": logits}

    def by_kernel() -> mx.array:
        return prefill.prefill(q, k, v, tables, scale=scale, **options)

    def by_ops() -> mx.array:
        turned, window = reference.Turned(q, layout, rotation, scale), layout.ring.window
        outputs = [
            reference.attend(turned.of(block), k, v, block, window, **options)
            for block in blocks_of(layout, reference.BLOCK)
        ]
        return mx.concatenate(outputs, axis=2)

    times = [(_seconds(by_kernel), _seconds(by_ops)) for _ in range(ROUNDS + 1)]
    ours, theirs = zip(*times[1:], strict=True)  # the first compiles
    return round(statistics.median(theirs) / statistics.median(ours), 3)


def _arrays(spec: Specialisation, batch: int, n: int, rows: int) -> list[mx.array]:
    n_heads, n_kv = _HEADS
    return trial.normals(
        (batch, n_heads, n, spec.head_dim),
        (batch, n_kv, rows, spec.head_dim),
        (batch, n_kv, rows, spec.v_head_dim),
        dtype=spec.dtype,
    )


def _tables(spec: Specialisation, layout: Layout, rotation: Rotation) -> prefill.Tables:
    tile = prefill.tile_of(spec.head_dim, spec.v_head_dim, spec.dtype)
    size = tile.queries if tile else 0
    return prefill.tables_of(layout, layout.ring.tokens, layout.end, rotation, size)


def _seconds(work: Callable[[], mx.array]) -> float:
    began = time.perf_counter()
    work().sum().item()
    return time.perf_counter() - began


def forget() -> None:
    """Forget what this process has settled: tests change the machine under it."""
    selfcheck.forget()
    _is_trusted.cache_clear()
