"""What every measurement shares: the machine it ran on, and how time is taken."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, NamedTuple

import mlx.core as mx

import mlx_sink
from mlx_sink.io import records

FAST_GFLOPS = 10.0
"""A core of this century reaches more than this with a tuned BLAS, and less with a plain one."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What figures were measured on; ``print(machine)`` shows it in a line.

    Attributes:
        platform: System, release and architecture.
        processor: The GPU where MLX runs on Metal, otherwise the CPU.
        cores: Of the CPU; ``None`` if the system does not say.
        device: ``"gpu"`` or ``"cpu"``, as MLX uses by default.
        matmul_gflops_float32: Speed of a matrix product, in 1e9 operations a second.
        fast_blas: That speed is one of a tuned library: ratios of times can be believed.
        python: Version.
        memory: Bytes of main memory.
        mlx_sink: Version, and so on.
    """

    platform: str
    processor: str
    cores: int | None
    device: str
    matmul_gflops_float32: float
    fast_blas: bool
    python: str
    memory: int
    mlx_sink: str = field(metadata={"key": "mlx-sink"})
    mlx: str
    mlx_lm: str = field(metadata={"key": "mlx-lm"})

    def to_dict(self) -> dict[str, Any]:
        """Return the machine as a JSON-ready dictionary."""
        return records.to_dict(self)

    def __str__(self) -> str:
        blas = "" if self.fast_blas else ", SLOW: preload a tuned BLAS before believing ratios"
        return (
            f"{self.platform}, {self.processor}, {self.cores} cores, device {self.device}, "
            f"mlx {self.mlx}, mlx-lm {self.mlx_lm}, python {self.python}, "
            f"{self.matmul_gflops_float32} GFLOP/s{blas}"
        )


def machine() -> Machine:
    """Describe this machine, and measure its matrix product."""
    gflops = matmul_gflops()
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    packages = versions()
    return Machine(
        platform=platform.platform(),
        processor=processor(),
        cores=os.cpu_count(),
        device="gpu" if on_gpu else "cpu",
        matmul_gflops_float32=round(gflops, 1),
        fast_blas=on_gpu or gflops > FAST_GFLOPS,
        python=platform.python_version(),
        memory=memory(),
        mlx_sink=packages["mlx-sink"],
        mlx=packages["mlx"],
        mlx_lm=packages["mlx-lm"],
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on.

    Of this one it is that of the code which runs: a checkout on ``PYTHONPATH`` need not be
    installed, and another one may be.
    """
    others = {package: _installed(package) for package in ("mlx", "mlx-lm")}
    return {"mlx-sink": mlx_sink.__version__, **others}


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Return the name of the GPU where MLX runs on Metal, otherwise of the CPU."""
    if mx.metal.is_available():
        return str(mx.device_info().get("device_name"))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def matmul_gflops(n: int = 512) -> float:
    """Return the speed of a float32 matrix product: it tells a tuned BLAS from a plain one."""
    a = mx.random.normal((n, n), key=mx.random.key(0))
    mx.eval(a @ a)
    best = min(timed(lambda: mx.eval(a @ a)).wall for _ in range(3))
    return 2 * n**3 / best / 1e9


class Side(NamedTuple):
    """One measurement, in seconds: by the clock, and of all the process's threads on the CPU."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Pair:
    """Two things measured in turns."""

    ours: list[Side]
    theirs: list[Side]

    def to_dict(self) -> dict[str, Any]:
        """Return medians in ms and how many times faster ours is.

        The speed-up is the median over the rounds: what slows a shared machine down for a
        moment slows both sides of a round. CPU time is what stays steady on a busy machine;
        on a GPU it is the host's share.
        """
        rounds = list(zip(self.ours, self.theirs, strict=True))
        median = statistics.median
        return {
            "rounds": len(rounds),
            "ours_ms": round(median(side.wall for side in self.ours) * 1e3, 4),
            "theirs_ms": round(median(side.wall for side in self.theirs) * 1e3, 4),
            "speedup": round(median(b.wall / a.wall for a, b in rounds), 4),
            "ours_cpu_ms": round(median(side.cpu for side in self.ours) * 1e3, 4),
            "theirs_cpu_ms": round(median(side.cpu for side in self.theirs) * 1e3, 4),
            "cpu_speedup": round(median(b.cpu / a.cpu for a, b in rounds), 4),
        }


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int, warmup: int
) -> Pair:
    """Time two functions in turns, the one that goes first changing every round.

    Args:
        ours: Runs one measurement to its end (`mx.eval` included).
        theirs: Likewise.
        rounds: Measurements of each that count.
        warmup: Measurements of each before those.
    """
    pair = Pair([], [])
    for i in range(-warmup, rounds):
        sides = [(ours, pair.ours), (theirs, pair.theirs)]
        for run, times in sides if i % 2 else reversed(sides):
            side = timed(run)
            if i >= 0:
                times.append(side)
    return pair


def evaluate_caches(caches: Sequence[Any]) -> None:
    """Finish what is pending on the caches, so that no later measurement pays for it."""
    mx.eval([cache.state for cache in caches])


def as_json(result: dict[str, Any], indent: int | None = None) -> str:
    """Write a result as strict JSON: a figure that is no number is an error, not a token.

    Raises:
        ValueError: A figure is NaN or infinite.
    """
    return json.dumps(result, allow_nan=False, indent=indent)


def timed(run: Callable[[], object]) -> Side:
    """Return how long a function runs."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Side(time.perf_counter() - wall, time.process_time() - cpu)


def memory() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
