"""A kernel is trusted on a machine after it has matched the plain operations there.

At first use of a specialisation the kernel runs once on random data whose ring has wrapped and
spans two epochs, and is compared with `reference`, worked out on the CPU. That takes a few
milliseconds beside the compiler's time; the verdict is kept in a file, for this GPU, system, MLX
and kernel text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sink.attention.packed import Packed, packed
from mlx_sink.attention.ring import layout_of
from mlx_sink.attention.rope import Rotation
from mlx_sink.errors import ConfigError, KernelError
from mlx_sink.kernels import arguments, decode, prefill, source, trial
from mlx_sink.kernels.decode_packed import TEXTS as PACKED_TEXTS
from mlx_sink.kernels.decode_packed import decode_packed
from mlx_sink.kernels.decode_packed import forget as forget_packed

SWITCH = "MLX_SINK_KERNEL"
"""``auto``: a kernel serves where it is trusted. ``on``: it is an error where it would serve and
cannot. ``off``: plain operations serve everywhere."""
FOLDER = "MLX_SINK_CACHE"
"""Where verdicts are kept, if not in the user's cache folder."""

TOLERANCES = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 2e-2}
"""Largest error in units of the largest output: rounding of the result, and fast::exp2."""


@dataclass(frozen=True, slots=True)
class Specialisation:
    """What MLX compiles a kernel of its own for."""

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
    """Bits of keys and of values, and the group size, of a quantised ring."""

    @property
    def name(self) -> str:
        """One word that tells it from all others."""
        rows = f"gqa{self.group}-n{self.n}-"
        heads, pairs = (self.head_dim, self.v_head_dim), (self.rotated, self.interleaved)
        options = self.softcap, self.learned_sinks
        name = name_of(f"decode-{self.dtype}", heads, rows, pairs, options)
        return name if self.packed is None else name + "-k{}v{}g{}".format(*self.packed)


def name_of(
    kernel: str,
    heads: tuple[int, int],
    rows: str,
    rotation: tuple[int, bool],
    options: tuple[bool, bool],
) -> str:
    """Put a specialisation in one word: ``decode-float16-d64-gqa4-n1-rope64-halves-softcap``."""
    head_dim, v_head_dim = heads
    dims = f"d{head_dim}" + ("" if v_head_dim == head_dim else f"v{v_head_dim}")
    pairs = "interleaved" if rotation[1] else "halves"
    extras = "-softcap" * options[0] + "-learned" * options[1]
    return f"{kernel.replace('mlx.core.', '')}-{dims}-{rows}rope{rotation[0]}-{pairs}{extras}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a check.

    Attributes:
        passed: The kernel may serve.
        error: Largest error in units of the largest output; None if nothing could be compared.
        reason: Why it may not serve, or empty.
        speedup: How many times faster it is here than the plain operations; None for a kernel
            that serves without having been timed.
    """

    passed: bool
    error: float | None
    reason: str
    speedup: float | None = None


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
        packed: The same keys and values as they are held, if quantised.

    Raises:
        KernelError: `SWITCH` is ``on``, and there is no Metal or the check failed.
        ConfigError: `SWITCH` is none of its three words.
    """
    if not is_wanted() or mx.default_device() != source.device():
        return False
    dtype, (_, H, n, D), n_kv = queries.dtype, queries.shape, keys.shape[1]
    if D % 16 or values.shape[3] % 16 or arguments.MAX_GROUP * n_kv < H:
        return False
    if dtype not in arguments.DTYPES or keys.dtype != dtype or values.dtype != dtype:
        return False
    return _is_trusted(
        Specialisation(
            *(dtype, H // n_kv, D, values.shape[3], n, rotation.dims, rotation.interleaved),
            softcap=softcap is not None,
            learned_sinks=learned_sinks is not None,
            packed=packed and (packed[0].bits, packed[1].bits, packed[0].group_size),
        )
    )


@functools.cache
def is_wanted() -> bool:
    """Tell whether kernels are to be used at all: settled once, at the first decode step."""
    mode = os.environ.get(SWITCH, "auto")
    if mode not in ("auto", "on", "off"):
        raise ConfigError(f"{SWITCH} must be auto, on or off, got {mode!r}")
    if mode == "on" and not source.is_available():
        raise KernelError(f"{SWITCH} is on, but MLX has no Metal and no CUDA on this machine")
    return mode != "off" and source.is_available()


@functools.cache
def _is_trusted(spec: Specialisation) -> bool:
    """Tell whether a kernel serves; say once why one does not."""
    return accepts(spec.name, verdict_of(spec))


def accepts(name: str, verdict: Verdict) -> bool:
    """Return the verdict's word; warn of a kernel that may not serve.

    Raises:
        KernelError: It may not serve, and `SWITCH` is ``on``.
    """
    if verdict.passed:
        return True
    message = f"the kernel {name} is not used on this machine: {verdict.reason}"
    if os.environ.get(SWITCH) == "on":
        raise KernelError(message)
    warnings.warn(
        f"{message}. Results stay right, and come more slowly. Please report this with the output "
        "of `python -m mlx_sink.doctor`.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def verdict_of(spec: Specialisation) -> Verdict:
    """Return the verdict on a specialisation on this machine: the one kept, or a new one."""
    return recall(spec.name, lambda: check(spec))


def recall(name: str, make: Callable[[], Verdict]) -> Verdict:
    """Return the verdict kept under a kernel's name for this machine, or make and keep one."""
    path = folder() / f"{_key(name)}.json"
    verdict = _read(path)
    if verdict is None:
        verdict = make()
        _write(path, name, verdict)
    return verdict


def check(spec: Specialisation) -> Verdict:
    """Run a specialisation, with one split and with several, and compare it with `reference`."""
    heads, rows, B = 2, max(ring.capacity for ring in trial.RINGS) + spec.n, len(trial.RINGS)
    q, k, v = trial.normals(
        (B, heads * spec.group, spec.n, spec.head_dim),
        (B, heads, rows, spec.head_dim),
        (B, heads, rows, spec.v_head_dim),
        dtype=spec.dtype,
    )
    rotation = trial.rotation_of(spec.rotated, spec.interleaved)
    layouts = [layout_of(ring, spec.n) for ring in trial.RINGS]
    scale = 2.0 * spec.head_dim**-0.5
    cap = trial.SOFTCAP if spec.softcap else None
    logits = trial.logits_of(heads * spec.group) if spec.learned_sinks else None
    error, is_packed = 0.0, spec.packed is not None
    tables = decode.Tables.stack(
        [
            decode.tables_of(a, a.block(a.ring.tokens, a.end), rotation, packed=is_packed)
            for a in layouts
        ]
    )
    try:
        run: Callable[..., mx.array] = functools.partial(decode.decode, q, k, v, tables)
        if spec.packed is not None:
            k_bits, v_bits, size = spec.packed
            rows = packed(k, trial.SINKS, k_bits, size), packed(v, trial.SINKS, v_bits, size)
            run = functools.partial(decode_packed, q, *rows, tables)
            k, v = (x.expanded() for x in rows)
        wanted = trial.by_reference(q, k, v, layouts, rotation, scale, cap, logits)
        for splits in (1, 3):
            out = run(scale=scale, softcap=cap, learned_sinks=logits, splits=splits)
            error = max(error, trial.error_of(out, wanted))
    except (RuntimeError, ValueError) as failure:
        return failed(failure)
    return judged(error, spec.dtype)


def failed(failure: Exception) -> Verdict:
    """Return the verdict on a kernel that could not be run."""
    lines = [line for line in str(failure).splitlines() if line.strip()]
    return Verdict(False, None, f"it failed to run ({' '.join(lines[:3])[:300]})")


def judged(error: float, dtype: mx.Dtype) -> Verdict:
    """Return the verdict on a kernel that was off by so much, in units of the largest output."""
    if not error <= TOLERANCES[dtype]:
        return Verdict(False, error, f"its results are off by {error:.2g}")
    return Verdict(True, error, "")


def forget() -> None:
    """Forget what this process has settled: tests change the machine under it."""
    decode.forget()
    forget_packed()
    prefill.forget()
    is_wanted.cache_clear()
    _is_trusted.cache_clear()


def machine() -> dict[str, str]:
    """Return what a verdict holds for, apart from the specialisation."""
    info = mx.device_info(source.device())
    return {
        "gpu": str(info.get("device_name", "")),
        "architecture": str(info.get("architecture", "")),
        "system": platform.platform(),
        "mlx": version("mlx"),
        "backend": source.backend(),
        "text": source.stamp(*decode.TEXTS, *PACKED_TEXTS, *prefill.TEXTS),
    }


def folder() -> Path:
    """Return where verdicts are kept."""
    given = os.environ.get(FOLDER)
    if given:
        return Path(given)
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Caches" / "mlx_sink"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_sink"


def kept() -> list[dict[str, Any]]:
    """Return the verdicts that use has left in `folder`, of this machine as it is now.

    Returns:
        Dictionaries of ``kernel`` (its name) and the fields of `Verdict`.
    """
    here, found = machine(), list[dict[str, Any]]()
    for path in sorted(folder().glob("*.json")):
        verdict = _read(path)
        if verdict is not None:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if all(facts.get(name) == value for name, value in here.items()):
                found.append({"kernel": str(facts.get("kernel")), **asdict(verdict)})
    return found


def _key(name: str) -> str:
    parts = json.dumps(machine(), sort_keys=True)
    return f"{name}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


def _read(path: Path) -> Verdict | None:
    """Return a verdict that was kept; a file that cannot be read is as good as none."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Verdict(
            bool(kept["passed"]), kept["error"], str(kept["reason"]), kept.get("speedup")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, name: str, verdict: Verdict) -> None:
    """Keep a verdict. The file appears whole or not at all, as processes may check at once."""
    text = json.dumps({"kernel": name, **machine(), **asdict(verdict)}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, delete=False
        ) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError:
        return  # A folder that cannot be written costs a check in every process, no more.
