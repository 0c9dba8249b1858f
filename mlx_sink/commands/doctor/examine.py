"""Check and time the common variants of the kernels on this machine."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_sink.attention.kernels import check_decode, check_prefill, source, trust
from mlx_sink.attention.kernels.check_decode import DecodeVariant
from mlx_sink.attention.kernels.check_prefill import PrefillVariant
from mlx_sink.attention.kernels.trust import Verdict
from mlx_sink.config import SinkConfig
from mlx_sink.io import terminal
from mlx_sink.measure.attention_times import Times, decode_times
from mlx_sink.measure.machine import versions

N_KV_HEADS = 8
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
NO_GPU = "no Metal, no CUDA"


@dataclass(frozen=True, slots=True)
class TimedKernel:
    """A variant of a kernel that was checked and timed.

    Attributes:
        kernel: Its name.
        verdict: Whether it is right here; None where it cannot run.
        times: Of the kernel, and of what serves without it.
    """

    kernel: str
    verdict: Verdict | None
    times: Times

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a JSON-ready dictionary."""
        return {**_to_dict(self.kernel, self.verdict), **self.times.to_dict()}


@dataclass(frozen=True, slots=True)
class PrefillKernel:
    """A variant of the prefill kernel, and whether it is right and fast here."""

    kernel: str
    verdict: Verdict

    @property
    def serves(self) -> bool:
        """It is right, and faster than the plain operations."""
        return self.verdict.passed and (self.verdict.speedup or 0) > 1

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a JSON-ready dictionary."""
        return {
            **_to_dict(self.kernel, self.verdict),
            "speedup": self.verdict.speedup,
            "serves": self.serves,
        }


def _to_dict(kernel: str, verdict: Verdict | None) -> dict[str, Any]:
    missing = "CUDA lacks what this kernel needs" if source.is_available() else NO_GPU
    return {
        "kernel": kernel,
        "passed": verdict.passed if verdict else None,
        "max_error": verdict.error if verdict else None,
        "reason": verdict.reason if verdict else missing,
    }


@dataclass(frozen=True, slots=True)
class Examination:
    """The results of the doctor.

    Attributes:
        machine: GPU, system and versions.
        backend: ``metal``, ``cuda`` or empty.
        config: The ring that was timed.
        decode: Variants of the decode kernel.
        prefill: Variants of the prefill kernel; none without Metal.
        stored: Verdicts that earlier use of the library has left, by kernel.
    """

    machine: dict[str, str]
    backend: str
    config: SinkConfig
    decode: tuple[TimedKernel, ...]
    prefill: tuple[PrefillKernel, ...]
    stored: dict[str, Verdict]

    @property
    def is_wrong(self) -> bool:
        """A kernel that was checked is wrong on this machine."""
        verdicts = [result.verdict for result in (*self.decode, *self.prefill)]
        return any(verdict is not None and not verdict.passed for verdict in verdicts)

    def to_dict(self) -> dict[str, Any]:
        """Return the results as a JSON-ready dictionary."""
        return {
            "machine": self.machine,
            "metal": self.backend == "metal",
            "backend": self.backend,
            "ring": {**self.config.to_dict(), "n_kv_heads": N_KV_HEADS},
            "kernels": [result.to_dict() for result in self.decode],
            "prefill": [result.to_dict() for result in self.prefill],
            "kept": [
                {"kernel": kernel, **verdict.to_dict()} for kernel, verdict in self.stored.items()
            ],
        }


def examine(
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    groups: Sequence[int],
    config: SinkConfig,
    rounds: int = 10,
    queries: Sequence[int] = (1,),
) -> Examination:
    """Check and time variants on this machine, whatever verdicts are stored.

    Args:
        dtypes: Names of dtypes, as in `DTYPES`.
        head_dims: Sizes of the heads.
        groups: Query heads for each kv head.
        config: The ring that is timed; quantised if it says so.
        rounds: Rounds of a timing.
        queries: New tokens of a step.
    """
    (k_bits, v_bits), size = config.bits, config.kv_group_size
    packed = None if k_bits is None or v_bits is None else (k_bits, v_bits, size)
    decode = [
        DecodeVariant(DTYPES[dtype], group, head_dim, head_dim, n, head_dim, False, packed=packed)
        for dtype, head_dim, group, n in itertools.product(dtypes, head_dims, groups, queries)
    ]
    prefill = [
        PrefillVariant(DTYPES[dtype], head_dim, head_dim, head_dim, False)
        for dtype, head_dim in itertools.product(dtypes, head_dims)
        if source.backend() == "metal"
    ]
    with terminal.bar(len(decode) + len(prefill), "checking", "kernel") as bar:
        decode_results: list[TimedKernel] = []
        for variant in decode:
            decode_results.append(_examine_decode(variant, config, rounds))
            bar.update()
        prefill_results: list[PrefillKernel] = []
        for variant in prefill:
            prefill_results.append(PrefillKernel(variant.name, check_prefill.check(variant)))
            bar.update()
    return Examination(
        _machine(),
        source.backend(),
        config,
        tuple(decode_results),
        tuple(prefill_results),
        trust.stored() if source.is_available() else {},
    )


def _examine_decode(variant: DecodeVariant, config: SinkConfig, rounds: int) -> TimedKernel:
    verdict = check_decode.check(variant) if source.is_available() else None
    times = decode_times(variant, N_KV_HEADS, config, rounds=rounds, kernel=runs(verdict))
    return TimedKernel(variant.name, verdict, times)


def runs(verdict: Verdict | None) -> bool:
    """Tell whether a kernel can be timed: it ran, right or wrong."""
    return verdict is not None and verdict.error is not None


def _machine() -> dict[str, str]:
    return {
        **(trust.machine() if source.is_available() else {}),
        "processor": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions(),
    }
