"""Decode attention over a sink ring as a Metal kernel: tables, checks, grid, launch.

The kernel's text, and what each of its threads owns, is in ``metal/decode.metal``. Nothing that
changes from step to step is a constant of the text: it comes as tables, so that a model compiles
one specialisation for each number of query rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sink.attention.ring import Block, KeyRange, Layout, Turn
from mlx_sink.attention.rope import Rotation
from mlx_sink.errors import KernelError
from mlx_sink.kernels import arguments, source

MAX_QUERIES = 8
"""New tokens of a call that the kernel serves."""
MAX_RANGES = 8
"""Rows of the range table: runs of live keys under one turn."""
TEXTS = ("decode_common", "decode_plain", "decode", "decode_merge")
"""Files of kernel text."""

_REGISTERS = 32
"""Outputs that a lane accumulates, over all rows of its simdgroup. MLX's own kernel keeps 16."""
_INPUTS = ("q", "k", "v", "ranges", "turns", "learned", "scalars")


@dataclass(frozen=True, slots=True)
class Tables:
    """What the queries of a call see, as the kernel reads it.

    Attributes:
        ranges: Runs of live rows, ``[B or 1, 8, 8]`` int32; the columns are in the kernel's text.
        turns: Cosines and sines of the queries' turns, ``[B or 1, 2 * L * dims]`` float32 (at
            least 8, as MLX hands smaller arrays over in another address space).
        n: L, queries of the call.
        live: Rows that the longest sequence of the batch sees.
        last: The last row that is read, plus 1.
        dims: Rotated dimensions.
        interleaved: As in `Rotation`.
    """

    ranges: mx.array
    turns: mx.array
    n: int
    live: int
    last: int
    dims: int
    interleaved: bool

    @classmethod
    def stack(cls, rows: Sequence[Tables]) -> Tables:
        """Return the tables of a batch whose sequences stand at different tokens."""
        a = rows[0]
        return cls(
            mx.concatenate([t.ranges for t in rows]),
            mx.concatenate([t.turns for t in rows]),
            a.n,
            max(t.live for t in rows),
            max(t.last for t in rows),
            a.dims,
            a.interleaved,
        )


def fits(layout: Layout, block: Block, packed: bool = False) -> bool:
    """Tell whether a block of a call is small enough for the kernel.

    The end of a long chunk is not, whatever its size: every number of queries is compiled and
    checked for itself, and chunks would ask for all of them.
    """
    pieces = block.spans if block.n == 1 and not packed else block.ranges
    return layout.n <= MAX_QUERIES and len(pieces) <= MAX_RANGES


@functools.lru_cache(maxsize=4)
def tables_of(layout: Layout, block: Block, rotation: Rotation, *, packed: bool = False) -> Tables:
    """Make the tables of a block of queries; all layers of a model ask for the same in a step.

    Args:
        layout: The call.
        block: Its queries.
        rotation: The layer's rotary embedding.
        packed: No range is to have sinks and others: they are held in different arrays.

    Raises:
        KernelError: More queries or ranges than the kernel serves.
    """
    if not 1 <= block.n <= MAX_QUERIES:
        raise KernelError(f"queries must be 1 to {MAX_QUERIES}, got {block.n}")
    rows = _range_rows(block, layout.ring.window, packed)
    if len(rows) > MAX_RANGES:
        raise KernelError(f"the keys must lie in at most {MAX_RANGES} ranges, got {len(rows)}")
    ranges = np.zeros((1, MAX_RANGES, 8), np.int32)
    ranges[0, : len(rows)] = rows
    return Tables(
        mx.array(ranges),
        mx.array(_turn_row(layout, block, rotation)),
        block.n,
        sum(row[1] for row in rows),
        max(row[0] + row[1] for row in rows),
        rotation.dims,
        rotation.interleaved,
    )


def _range_rows(block: Block, window: int, packed: bool) -> list[tuple[int, ...]]:
    if block.n == 1 and not packed:
        # Everything in the ranges is visible: neighbours under one turn are one range.
        return [(s.start, s.stop - s.start, int(s.turn), 0, 0, 0, 0, 0) for s in block.spans]
    rows: list[tuple[int, ...]] = []
    for r in block.ranges:
        edge = int(_is_edge(r, block, window))
        # Only small differences count, and tokens of an endless stream outgrow int32.
        token = max(r.token - block.first, -r.length) if r.sinks else r.token - block.first
        reach = arguments.FAR if r.sinks else window
        rows.append((r.row, r.length, int(r.turn), edge, token, reach, 0, 0))
    return rows


def _is_edge(r: KeyRange, block: Block, window: int) -> bool:
    """Tell whether a query of the block does not see all keys of a range."""
    ahead = r.token + r.length - 1 > block.first
    behind = not r.sinks and r.token <= block.last - 1 - window
    return ahead or behind


def _turn_row(layout: Layout, block: Block, rotation: Rotation) -> np.ndarray:
    """Return cosines and sines of the previous epoch's turn and the sinks', worked out in f64."""
    start = layout.ring.tokens
    queries = slice(block.first - start, block.last - start)
    positions = [list(layout.turns(turn))[queries] for turn in (Turn.PREVIOUS, Turn.SINK)]
    angles = np.multiply.outer(np.asarray(positions, np.float64), rotation.frequencies)
    row = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32).ravel()
    return np.pad(row, (0, max(0, 8 - row.size)))[None]


@dataclass(frozen=True, slots=True)
class Launch:
    """How arrays of some shapes are served: what is compiled, and over which grid."""

    template: list[tuple[str, Any]]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    shape: tuple[int, ...]
    dtype: mx.Dtype
    merge: list[tuple[str, Any]]
    merge_grid: tuple[int, int, int]
    out: tuple[int, ...]


def decode(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    tables: Tables,
    *,
    scale: float,
    softcap: float | None = None,
    learned_sinks: mx.array | None = None,
    splits: int | None = None,
) -> mx.array:
    """Attend from at most 8 new tokens to the live rows of a ring.

    Args:
        queries: ``[B, n_heads, L, head_dim]`` after RoPE; float16, bfloat16 or float32.
        keys: ``[B, n_kv_heads, rows, head_dim]`` after RoPE: a ring or any view of one, which
            is read where it lies. Where a row's elements are neighbours, rows lie 4 elements
            or a multiple of that apart and begin likewise (a view ``[..., 1:]`` does not): the
            kernel loads up to 16 bytes at once. MLX does not tell strides before an array is
            computed, so this is the caller's to keep; the library's own rings do.
        values: ``[B, n_kv_heads, rows, v_head_dim]``, likewise.
        tables: Which rows each sequence sees, and how its queries are turned.
        scale: Factor on q.k.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        learned_sinks: A logit a head that takes part in the softmax, ``[n_heads]``.
        splits: Parts of the keys that threadgroups share out; chosen by the GPU's size if None.

    Returns:
        ``[B, n_heads, L, v_head_dim]`` in the dtype of the queries; everything is accumulated
        in float32, and rounded once.

    Raises:
        KernelError: A shape or dtype does not fit; the message names the argument.
    """
    launch = launch_of(
        tuple(queries.shape),
        tuple(keys.shape),
        tuple(values.shape),
        (queries.dtype, keys.dtype, values.dtype),
        (tables.ranges.shape[0], tables.n, tables.live, tables.last),
        (tables.dims, tables.interleaved),
        (softcap is not None, None if learned_sinks is None else tuple(learned_sinks.shape)),
        splits,
    )
    inputs = [
        *(mx.contiguous(queries), keys, values, tables.ranges, tables.turns),
        *(arguments.logits(learned_sinks), arguments.scalars(scale, softcap)),
    ]
    return launched(_pass_1(), launch, inputs, queries.dtype)


def launched(
    pass_1: source.Kernel, launch: Launch, inputs: Sequence[mx.array], dtype: mx.Dtype
) -> mx.array:
    """Launch a first pass, and the second if there are splits to merge.

    Args:
        pass_1: The kernel.
        launch: Its grid and template.
        inputs: Its inputs; the sixth are the learned sinks.
        dtype: Of the result.
    """
    (out,) = pass_1(
        inputs=inputs,
        template=launch.template,
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[launch.shape],
        output_dtypes=[launch.dtype],
    )
    if launch.shape == launch.out:
        return out
    (out,) = _pass_2()(
        inputs=[out, inputs[5]],
        template=launch.merge,
        grid=launch.merge_grid,
        threadgroup=(32, 1, 1),
        output_shapes=[launch.out],
        output_dtypes=[dtype],
    )
    return out


@functools.lru_cache(maxsize=256)
def launch_of(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    dtypes: tuple[mx.Dtype, mx.Dtype, mx.Dtype],
    tables: tuple[int, int, int, int],
    rotation: tuple[int, bool],
    options: tuple[bool, tuple[int, ...] | None],
    splits: int | None,
    packed: tuple[int, int, int] | None = None,
) -> Launch:
    """Check a call and lay it out; once for all calls that look alike.

    The last argument is bits of keys and of values and the group size, if they are quantised.
    """
    batch, n, live, last = tables
    arguments.check(
        *(q, k, v, dtypes),
        batch=batch,
        n=n,
        last=last,
        dims=rotation[0],
        learned=options[1],
    )
    if splits is not None and not 1 <= splits <= 1024:
        raise KernelError(f"splits must be 1 to 1024, got {splits}")
    (B, H, L, D), n_kv, DV, dtype = q, k[1], v[3], dtypes[0]
    G = H // n_kv
    EK, EV = (_share(dim, of_a_group=packed is not None) for dim in (D, DV))
    wide = max(EK, EV)
    # Rows that a simdgroup keeps in registers; more are shared out among up to 16 simdgroups.
    most = max(1, _REGISTERS // wide, -(-G * L // 16))
    groups = -(-G * L // most)
    rows = -(-G * L // groups)
    slices = 1 if groups > 1 else 8 if rows * DV <= 512 else 4
    tile = 4 if wide * dtype.size > 8 else 8
    fitting = (n for n in (32, 16, 8) if n * (D + DV) * dtype.size <= 16384)
    splits = splits or _splits(live, B * n_kv)
    threads = 32 * slices * groups
    single = splits == 1
    shared = [("G", G), ("L", L), ("DV", DV), ("LSINK", options[1] is not None)]
    template = [
        *(("T", dtype), ("OUT", dtype if single else mx.float32), *shared),
        *(("D", D), ("ROWS", rows), ("RG", groups), ("KS", slices), ("TK", tile)),
        *(("EK", EK), ("EV", EV), ("TILE", next(fitting, tile)), ("DIMS", rotation[0])),
        *(("INTERLEAVED", rotation[1]), ("SOFTCAP", options[0]), ("SINGLE", single)),
    ]
    if packed is not None:
        template += zip(("KBITS", "VBITS", "GS"), packed, strict=True)
    out = (B, H, L, DV)
    return Launch(
        template,
        grid=(threads * splits, n_kv, B),
        threadgroup=(threads, 1, 1),
        shape=out if single else (B * n_kv, splits, G * L, DV + 2),
        dtype=dtype if single else mx.float32,
        merge=[("OUT", dtype), *shared],
        merge_grid=(32 * G * L, n_kv, B),
        out=out,
    )


def _share(dim: int, of_a_group: bool = False) -> int:
    """Return the consecutive dimensions that a lane owns: even, and dim a multiple of it.

    Quantised, they are all of one group: 32 is a multiple of it too.
    """
    share = 2 * -(-dim // 64)
    while dim % share or (of_a_group and 32 % share):
        share += 2
    return share


def _splits(live: int, heads: int) -> int:
    """Return enough threadgroups for the GPU, and for each at least 128 keys."""
    return max(1, min(-(-4 * _cores() // heads), -(-live // 128)))


@functools.cache
def _cores() -> int:
    """Guess the GPU's cores from the letter that ends its architecture, as MLX does."""
    name = str(mx.device_info().get("architecture", "")) if mx.metal.is_available() else ""
    return {"p": 5, "g": 12, "s": 36, "d": 72}.get(name[-1:], 12)


@functools.cache
def _pass_1() -> source.Kernel:
    return source.build(("decode_plain", "decode"), ("decode_common",), _INPUTS, ("out",))


@functools.cache
def _pass_2() -> source.Kernel:
    return source.build(("decode_merge",), ("decode_common",), ("partials", "learned"), ("out",))


def forget() -> None:
    """Forget the kernels that were built: tests put a runner in the place of MLX's."""
    for cached in (source.build, _pass_1, _pass_2):
        cached.cache_clear()
