"""Decode attention over a sink ring as a Metal kernel: checks, grid, launch.

The kernel's text, and what each of its threads owns, is in ``metal/decode.metal``. Nothing that
changes from step to step is a constant of the text: it comes in `tables`, so that a model compiles
one variant for each number of query rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_sink.attention.kernels import inputs, source
from mlx_sink.attention.kernels.tables import MAX_QUERIES, MAX_RANGES, DecodeTables
from mlx_sink.attention.layout import Block, Layout
from mlx_sink.errors import KernelError

TEXTS = ("decode_common", "decode_plain", "decode", "decode_merge")
"""Files of kernel text."""

_REGISTERS = 32
"""Outputs that a lane accumulates, over all rows of its simdgroup. MLX's own kernel keeps 16."""
INPUTS = ("q", "k", "v", "ranges", "turns", "learned", "scalars")


def fits(layout: Layout, block: Block, packed: bool = False) -> bool:
    """Tell whether a block of a call is small enough for the kernel.

    The end of a long chunk is not, whatever its size: every number of queries is compiled and
    checked for itself, and chunks would ask for all of them. Nor is what looks up evicted blocks,
    and several queries whose window begins at the edge of a block.
    """
    if block.evicted or (layout.ring.block > 1 and block.n > 1):
        return False
    pieces = block.spans if block.n == 1 and not packed else block.ranges
    return layout.n <= MAX_QUERIES and len(pieces) <= MAX_RANGES


@dataclass(frozen=True, slots=True)
class DecodeLaunch:
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
    tables: DecodeTables,
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
    arrays = [
        mx.contiguous(queries),
        keys,
        values,
        tables.ranges,
        tables.turns,
        inputs.logits(learned_sinks),
        inputs.scalars(scale, softcap),
    ]
    return launched(_pass_1(), launch, arrays, queries.dtype)


def launched(
    pass_1: source.Kernel, launch: DecodeLaunch, arrays: Sequence[mx.array], dtype: mx.Dtype
) -> mx.array:
    """Launch a first pass, and the second if there are splits to merge.

    Args:
        pass_1: The kernel.
        launch: Its grid and template.
        arrays: Its inputs; the sixth are the learned sinks.
        dtype: Of the result.
    """
    (out,) = pass_1(
        inputs=arrays,
        template=launch.template,
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[launch.shape],
        output_dtypes=[launch.dtype],
    )
    if launch.shape == launch.out:
        return out
    (out,) = _pass_2()(
        inputs=[out, arrays[5]],
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
) -> DecodeLaunch:
    """Check a call and lay it out; once for all calls that look alike.

    The last argument is bits of keys and of values and the group size, if they are quantised.
    """
    batch, n, live, last = tables
    inputs.validate(
        q,
        k,
        v,
        dtypes,
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
    division = _divide(G * L, D, DV, dtype.size, packed is not None)
    splits = splits or _splits(live, B * n_kv)
    threads = 32 * division.KS * division.RG
    single = splits == 1
    shared = [("G", G), ("L", L), ("DV", DV), ("LSINK", options[1] is not None)]
    template = [
        ("T", dtype),
        ("OUT", dtype if single else mx.float32),
        *shared,
        ("D", D),
        *division._asdict().items(),
        ("DIMS", rotation[0]),
        ("INTERLEAVED", rotation[1]),
        ("SOFTCAP", options[0]),
        ("SINGLE", single),
    ]
    if packed is not None:
        template += zip(("KBITS", "VBITS", "GS"), packed, strict=True)
    out = (B, H, L, DV)
    return DecodeLaunch(
        template,
        grid=(threads * splits, n_kv, B),
        threadgroup=(threads, 1, 1),
        shape=out if single else (B * n_kv, splits, G * L, DV + 2),
        dtype=dtype if single else mx.float32,
        merge=[("OUT", dtype), *shared],
        merge_grid=(32 * G * L, n_kv, B),
        out=out,
    )


class _Division(NamedTuple):
    """How the query rows, keys and dimensions of one kv head are divided, in the text's names.

    Attributes:
        ROWS: Query rows of a simdgroup.
        RG: Simdgroups that share out the query rows.
        KS: Simdgroups that share out the keys of a split.
        TK: Keys that a simdgroup multiplies at a time.
        EK: Dimensions of a key that a lane owns.
        EV: Dimensions of a value that a lane owns.
        TILE: Keys in threadgroup memory at a time, where RG is more than 1.
    """

    ROWS: int
    RG: int
    KS: int
    TK: int
    EK: int
    EV: int
    TILE: int


def _divide(rows: int, D: int, DV: int, itemsize: int, is_packed: bool) -> _Division:
    EK, EV = _share(D, is_packed), _share(DV, is_packed)
    wide = max(EK, EV)
    # Rows that a simdgroup keeps in registers; more are shared out among up to 16 simdgroups.
    most = max(1, _REGISTERS // wide, -(-rows // 16))
    RG = -(-rows // most)
    ROWS = -(-rows // RG)
    KS = 1 if RG > 1 else 8 if ROWS * DV <= 512 else 4
    TK = 4 if wide * itemsize > 8 else 8
    fitting = (keys for keys in (32, 16, 8) if keys * (D + DV) * itemsize <= 16384)
    return _Division(ROWS, RG, KS, TK, EK, EV, next(fitting, TK))


def _share(dim: int, is_packed: bool) -> int:
    """Return the consecutive dimensions that a lane owns: even, and dim a multiple of it.

    Where rows are quantised, they are all of one group: 32 is a multiple of it too.
    """
    share = 2 * -(-dim // 64)
    while dim % share or (is_packed and 32 % share):
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
    return source.build(("decode_plain", "decode"), ("decode_common",), INPUTS, ("out",))


@functools.cache
def _pass_2() -> source.Kernel:
    return source.build(("decode_merge",), ("decode_common",), ("partials", "learned"), ("out",))


def forget() -> None:
    """Forget the kernels that were built: tests put a runner in the place of MLX's."""
    for cached in (source.build, _pass_1, _pass_2):
        cached.cache_clear()
