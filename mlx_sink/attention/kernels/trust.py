"""A kernel serves on a machine only after it has matched the plain operations there.

At first use, each variant of a kernel runs once on random data (`sample`) and is compared with
`reference`, computed on the CPU. That takes a few milliseconds beside the time of the compiler.
The verdict is kept in a file, for this GPU, system, version of MLX and kernel text.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import NoneType
from typing import Any, cast

import mlx.core as mx

from mlx_sink.attention.kernels import source
from mlx_sink.errors import ConfigError, KernelError, OutputError
from mlx_sink.io.atomic import write_whole

SWITCH = "MLX_SINK_KERNEL"
"""``auto``: a kernel serves where it is trusted. ``on``: it is an error where it would serve and
cannot. ``off``: plain operations serve everywhere."""
FOLDER = "MLX_SINK_CACHE"
"""The folder of the verdicts, if not the user's cache folder."""

TOLERANCES = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 2e-2}
"""Largest error in units of the largest output: rounding of the result, and fast::exp2."""


def name_of(
    kernel: str,
    heads: tuple[int, int],
    rows: str,
    rotation: tuple[int, bool],
    options: tuple[bool, bool],
) -> str:
    """Put a variant of a kernel in one word: ``decode-float16-d64-gqa4-n1-rope64-halves-softcap``.

    Args:
        kernel: The kernel and the dtype.
        heads: head_dim of keys and of values.
        rows: What a variant of the kernel says about its rows, or nothing.
        rotation: Rotated dimensions, and whether pairs are interleaved.
        options: Whether there are a softcap and learned sinks.
    """
    head_dim, v_head_dim = heads
    dims = f"d{head_dim}" + ("" if v_head_dim == head_dim else f"v{v_head_dim}")
    pairs = "interleaved" if rotation[1] else "halves"
    extras = "-softcap" * options[0] + "-learned" * options[1]
    return f"{kernel.replace('mlx.core.', '')}-{dims}-{rows}rope{rotation[0]}-{pairs}{extras}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a check.

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

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return asdict(self)


def failure(error: Exception) -> Verdict:
    """Return the verdict on a kernel that could not be compiled or run."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return Verdict(False, None, f"it failed to run ({' '.join(lines[:3])[:300]})")


def judge(error: float, dtype: mx.Dtype) -> Verdict:
    """Return the verdict on a kernel by its largest error, in units of the largest output."""
    if not math.isfinite(error):
        return Verdict(False, None, "its results are not finite")
    if error > TOLERANCES[dtype]:
        return Verdict(False, error, f"its results are off by {error:.2g}")
    return Verdict(True, error, "")


@functools.cache
def is_wanted() -> bool:
    """Tell whether kernels are to be used at all; decided once a process.

    Raises:
        KernelError: `SWITCH` is ``on``, and MLX has no GPU.
        ConfigError: `SWITCH` is none of its three words.
    """
    mode = os.environ.get(SWITCH, "auto")
    if mode not in ("auto", "on", "off"):
        raise ConfigError(f"{SWITCH} must be auto, on or off, got {mode!r}")
    if mode == "on" and not source.is_available():
        raise KernelError(f"{SWITCH} is on, but MLX has no Metal and no CUDA on this machine")
    return mode != "off" and source.is_available()


def is_forced() -> bool:
    """Tell whether `SWITCH` is ``on``."""
    return os.environ.get(SWITCH) == "on"


def accepts(name: str, verdict: Verdict) -> bool:
    """Tell whether a kernel passed; warn if it did not.

    Raises:
        KernelError: It did not pass, and `SWITCH` is ``on``.
    """
    if verdict.passed:
        return True
    message = f"the kernel {name} is not used on this machine: {verdict.reason}"
    if is_forced():
        raise KernelError(message)
    warnings.warn(
        f"{message}. Results stay right, and come more slowly. Please report this with the file "
        "that `python -m mlx_sink.doctor --report FILE` writes.",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def verdict_of(name: str, check: Callable[[], Verdict]) -> Verdict:
    """Return the verdict on a kernel on this machine: the one in the store, or a new one.

    Args:
        name: The kernel's variant.
        check: Makes a new verdict, which is then stored.
    """
    path = folder() / f"{_key(name)}.json"
    verdict = _verdict_in(_read(path))
    if verdict is None:
        verdict = check()
        _write(path, name, verdict)
    return verdict


def machine() -> dict[str, str]:
    """Return what a verdict holds for, apart from the kernel's variant."""
    info = mx.device_info(source.device())
    return {
        "gpu": str(info.get("device_name", "")),
        "architecture": str(info.get("architecture", "")),
        "system": platform.platform(),
        "mlx": version("mlx"),
        "backend": source.backend(),
        "text": source.stamp(*source.names()),
    }


def folder() -> Path:
    """Return the folder of the verdicts."""
    if chosen := os.environ.get(FOLDER):
        return Path(chosen)
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Caches" / "mlx_sink"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_sink"


def stored() -> dict[str, Verdict]:
    """Return the verdicts in `folder` that hold for this machine as it is now, by kernel."""
    here, verdicts = machine(), dict[str, Verdict]()
    for path in sorted(folder().glob("*.json")):
        facts = _read(path)
        verdict = _verdict_in(facts)
        if verdict and all(facts.get(name) == value for name, value in here.items()):
            verdicts[str(facts.get("kernel"))] = verdict
    return verdicts


def _key(name: str) -> str:
    parts = json.dumps(machine(), sort_keys=True)
    return f"{name}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


def _read(path: Path) -> dict[str, Any]:
    """Return what a file of the store says; nothing if it is missing or damaged."""
    try:
        facts: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", facts) if isinstance(facts, dict) else {}


def _verdict_in(facts: Mapping[str, Any]) -> Verdict | None:
    passed, reason = facts.get("passed"), facts.get("reason")
    error, speedup = facts.get("error"), facts.get("speedup")
    if type(passed) is not bool or type(reason) is not str:
        return None
    if any(type(number) not in (int, float, NoneType) for number in (error, speedup)):
        return None
    return Verdict(passed, error, reason, speedup)


def _write(path: Path, name: str, verdict: Verdict) -> None:
    """Store a verdict. The file appears whole or not at all, as processes may check at once."""
    text = json.dumps({"kernel": name, **machine(), **verdict.to_dict()}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except (OSError, OutputError):
        return  # A folder that cannot be written costs a check in every process, no more.
