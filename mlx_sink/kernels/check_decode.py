"""Where the decode kernel serves: each of its variants must be right on this machine.

`trust` has the rules, and stores the verdicts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_sink.attention.packed import Packed, packed
from mlx_sink.attention.rope import Rotation
from mlx_sink.kernels import decode, decode_packed, inputs, source, trust
from mlx_sink.kernels.tables import DecodeTables, decode_tables

_KV_HEADS = 2
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
    if not trust.is_wanted() or mx.default_device() != source.device():
        return False
    dtype, (_, H, n, D), n_kv = queries.dtype, queries.shape, keys.shape[1]
    if D % 16 or values.shape[3] % 16 or inputs.MAX_GROUP * n_kv < H:
        return False
    if dtype not in inputs.DTYPES or keys.dtype != dtype or values.dtype != dtype:
        return False
    variant = DecodeVariant(
        dtype,
        H // n_kv,
        D,
        values.shape[3],
        n,
        rotation.dims,
        rotation.interleaved,
        softcap=softcap is not None,
        learned_sinks=learned_sinks is not None,
        packed=packed and (packed[0].bits, packed[1].bits, packed[0].group_size),
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
    sample = trust.sample(
        variant.dtype,
        n=variant.n,
        n_heads=_KV_HEADS * variant.group,
        n_kv_heads=_KV_HEADS,
        head_dim=variant.head_dim,
        v_head_dim=variant.v_head_dim,
        rotated=variant.rotated,
        interleaved=variant.interleaved,
        softcap=variant.softcap,
        learned_sinks=variant.learned_sinks,
    )
    try:
        sample, run = _runner(variant, sample)
        options = sample.options
        outputs = [run(scale=sample.scale, splits=splits, **options) for splits in _SPLITS]
        return trust.judge(sample.error(*outputs), variant.dtype)
    except (RuntimeError, ValueError) as error:
        return trust.failure(error)


def _runner(
    variant: DecodeVariant, sample: trust.Sample
) -> tuple[trust.Sample, Callable[..., mx.array]]:
    """Return a function that launches the kernel on a sample, and the sample as it reads it."""
    is_packed = variant.packed is not None
    rows = [
        decode_tables(
            layout,
            layout.block(layout.ring.tokens, layout.end),
            sample.rotation,
            packed=is_packed,
        )
        for layout in sample.layouts
    ]
    tables = DecodeTables.stack(rows)
    q, k, v = sample.queries, sample.keys, sample.values
    if variant.packed is None:
        return sample, functools.partial(decode.decode, q, k, v, tables)
    k_bits, v_bits, size = variant.packed
    keys, values = (
        packed(k, trust.NUM_SINKS, k_bits, size),
        packed(v, trust.NUM_SINKS, v_bits, size),
    )
    run = functools.partial(decode_packed.decode_packed, q, keys, values, tables)
    return replace(sample, keys=keys.expanded(), values=values.expanded()), run


def forget() -> None:
    """Forget what this process has decided: tests change the machine under it."""
    decode.forget()
    decode_packed.forget()
    trust.is_wanted.cache_clear()
    _is_trusted.cache_clear()
