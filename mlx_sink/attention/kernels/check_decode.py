"""Where the decode kernel serves: each of its variants must be right on this machine.

`trust` has the rules, and stores the verdicts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_sink.attention.kernels import decode, decode_packed, inputs, source, trust
from mlx_sink.attention.kernels.sample import RINGS, Sample, random_sample
from mlx_sink.attention.kernels.tables import DecodeTables, decode_tables
from mlx_sink.attention.packed import Packed
from mlx_sink.attention.ring import Ring
from mlx_sink.attention.rope import Rotation

_SPLITS = (1, 3)
"""The kernel runs without its second pass, and with it."""


@dataclass(frozen=True, slots=True)
class DecodeVariant:
    """What MLX compiles a decode kernel of its own for.

    Attributes:
        dtype: Of queries, keys and values.
        group: Query heads for each kv head.
        head_dim: Of queries and keys.
        v_head_dim: Of values.
        n: New tokens of a step.
        rotated: Dimensions that the rotary embedding rotates.
        interleaved: As in `Rotation`.
        softcap: With a softcap.
        learned_sinks: With learned sinks.
        packed: Bits of keys and of values, and the group size, of a quantised ring.
    """

    dtype: mx.Dtype
    group: int
    head_dim: int
    v_head_dim: int
    n: int
    rotated: int
    interleaved: bool
    softcap: bool = False
    learned_sinks: bool = False
    packed: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        """One word that no other variant has."""
        name = trust.name_of(
            f"decode-{self.dtype}",
            (self.head_dim, self.v_head_dim),
            f"gqa{self.group}-n{self.n}-",
            (self.rotated, self.interleaved),
            (self.softcap, self.learned_sinks),
        )
        return name if self.packed is None else name + "-k{}v{}g{}".format(*self.packed)

    def sample(self, n_kv_heads: int = 2, rings: Sequence[Ring] = RINGS) -> Sample:
        """Return random arrays for this variant, the same every time."""
        plain = random_sample(
            self.dtype,
            n=self.n,
            n_heads=n_kv_heads * self.group,
            n_kv_heads=n_kv_heads,
            head_dim=self.head_dim,
            v_head_dim=self.v_head_dim,
            rotated=self.rotated,
            interleaved=self.interleaved,
            softcap=self.softcap,
            learned_sinks=self.learned_sinks,
            rings=rings,
        )
        return plain if self.packed is None else plain.quantised(*self.packed)


def is_possible() -> bool:
    """Tell whether MLX computes where the kernel could run, and nobody has switched it off."""
    return trust.is_wanted() and mx.default_device() == source.device()


def serves(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    rotation: Rotation,
    *,
    softcap: float | None = None,
    learned_sinks: mx.array | None = None,
    packed: tuple[Packed, Packed] | None = None,
) -> bool:
    """Tell whether the decode kernel serves a call, checking it at the first of its kind.

    Args:
        queries: ``[B, n_heads, L, head_dim]``.
        keys: ``[B, n_kv_heads, rows, head_dim]``.
        values: ``[B, n_kv_heads, rows, v_head_dim]``.
        rotation: The layer's rotary embedding.
        softcap: As in `decode.decode`.
        learned_sinks: As in `decode.decode`.
        packed: The same keys and values as they are stored, if quantised.

    Raises:
        KernelError: `trust.SWITCH` is ``on``, and there is no GPU or the check failed.
        ConfigError: `trust.SWITCH` is none of its three words.
    """
    if not is_possible():
        return False
    return _serves(
        queries.shape[1:],
        (keys.shape[1], values.shape[3]),
        (queries.dtype, keys.dtype, values.dtype),
        (rotation.dims, rotation.interleaved),
        (softcap is not None, learned_sinks is not None),
        None if packed is None else (packed[0].bits, packed[1].bits, packed[0].group_size),
    )


@functools.lru_cache(maxsize=256)
def _serves(
    queries: tuple[int, ...],
    heads: tuple[int, int],
    dtypes: tuple[mx.Dtype, ...],
    rotation: tuple[int, bool],
    options: tuple[bool, bool],
    packed: tuple[int, int, int] | None,
) -> bool:
    """Answer `serves` for all calls that look alike."""
    (H, n, D), (n_kv, DV), dtype = queries, heads, dtypes[0]
    if D % 16 or DV % 16 or inputs.MAX_GROUP * n_kv < H:
        return False
    if dtype not in inputs.DTYPES or any(other != dtype for other in dtypes):
        return False
    softcap, learned = options
    variant = DecodeVariant(
        dtype,
        H // n_kv,
        D,
        DV,
        n,
        *rotation,
        softcap=softcap,
        learned_sinks=learned,
        packed=packed,
    )
    return _is_trusted(variant)


@functools.cache
def _is_trusted(variant: DecodeVariant) -> bool:
    """Tell whether a kernel serves; warn once if one does not."""
    return trust.accepts(variant.name, verdict_of(variant))


def verdict_of(variant: DecodeVariant) -> trust.Verdict:
    """Return the verdict on a variant on this machine: the one in the store, or a new one."""
    return trust.verdict_of(variant.name, lambda: check(variant))


def check(variant: DecodeVariant) -> trust.Verdict:
    """Run a variant on wrapped rings, and compare it with `reference`."""
    sample = variant.sample()
    try:
        launch = launcher(sample)
        outputs = [launch(sample.queries, splits) for splits in _SPLITS]
        return trust.judge(sample.error(*outputs), variant.dtype)
    except (RuntimeError, ValueError) as error:
        return trust.failure(error)


def launcher(sample: Sample) -> Callable[[mx.array, int | None], mx.array]:
    """Return a function of queries and splits that launches the kernel on a sample."""
    rows = [
        decode_tables(
            layout,
            layout.block(layout.ring.tokens, layout.end),
            sample.rotation,
            packed=sample.packed is not None,
        )
        for layout in sample.layouts
    ]
    tables = rows[0] if len(rows) == 1 else DecodeTables.stack(rows)
    scale, options = sample.scale, sample.options

    def launch(queries: mx.array, splits: int | None = None) -> mx.array:
        if sample.packed is not None:
            return decode_packed.decode_packed(
                queries, *sample.packed, tables, scale=scale, splits=splits, **options
            )
        return decode.decode(
            queries, sample.keys, sample.values, tables, scale=scale, splits=splits, **options
        )

    return launch


def forget() -> None:
    """Forget what this process has decided: tests change the machine under it."""
    decode.forget()
    decode_packed.forget()
    trust.is_wanted.cache_clear()
    _is_trusted.cache_clear()
    _serves.cache_clear()
