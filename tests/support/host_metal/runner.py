"""Run a compiled kernel over buffers, in a process of its own, and read what it reports.

In a process of its own, because a wrong kernel may crash or hang: that must be an exception in one
test. See cpp/runtime/main.cpp for the other side.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .build import place_of_address
from .errors import RunError, ToolError
from .text import Place


@dataclass
class Buffer:
    """Memory that is bound to a kernel."""

    name: str
    kind: str  # "input", "output", or "filled" for an output with an init_value
    data: np.ndarray  # flat; outputs are written into it


@dataclass(frozen=True)
class Options:
    """How to run, beyond what a launch says."""

    seed: int = 0
    misalign: bool = False
    cpu_seconds: float = 30.0
    threadgroup_limit: int = 32768


@dataclass(frozen=True)
class Traffic:
    """Bytes that one buffer moved.

    Attributes:
        loaded: Summed over all loads of all threads, whether or not a GPU would merge them.
        stored: The same for stores.
        distinct: Bytes that were loaded at least once: `loaded / distinct` says how often the
            kernel reads the same memory.
    """

    loaded: int
    stored: int
    distinct: int


@dataclass
class Report:
    """What one launch did; machine-independent, so it measures the kernel.

    Attributes:
        buffers: Traffic of device memory by parameter name, `k` or `k_shape`.
        simd: Simd operations by name, each counted once per simdgroup that executes it.
        counts: Sums over the launch: `threads`, `threadgroups`, `threadgroup_barriers` (once per
            threadgroup that meets there), `simdgroup_barriers` (once per simdgroup),
            `threadgroup_bytes` (size of the threadgroup variables), `threadgroup_loaded` and
            `threadgroup_stored` (bytes, over all threads).
    """

    buffers: dict[str, Traffic] = field(default_factory=dict)
    simd: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def loaded(self) -> int:
        """Bytes loaded from device memory."""
        return sum(traffic.loaded for traffic in self.buffers.values())

    @property
    def stored(self) -> int:
        """Bytes stored to device memory."""
        return sum(traffic.stored for traffic in self.buffers.values())

    @property
    def simd_operations(self) -> int:
        """All simd operations, once per simdgroup that executes one."""
        return sum(self.simd.values())

    @property
    def fragment_products(self) -> int:
        """Products of 8x8 fragments, 512 multiply-adds each."""
        names = ("simdgroup_multiply", "simdgroup_multiply_accumulate")
        return sum(self.simd.get(name, 0) for name in names)


def run(
    runner: Path,
    grid: Sequence[int],
    threadgroup: Sequence[int],
    buffers: Sequence[Buffer],
    options: Options,
    first_mention: Callable[[str], Place],
) -> Report:
    """Run a kernel; outputs are written into their buffers.

    Args:
        runner: The program that `build_runner` made.
        grid: Threads in all, as MLX counts.
        threadgroup: Threads of one threadgroup.
        buffers: In binding order.
        options: How to run.
        first_mention: Where the text first names a buffer, for mistakes that are in no line.

    Raises:
        RunError: The kernel did something that a GPU does not allow or define.
    """
    offsets = np.cumsum([0] + [-(-b.data.nbytes // 64) * 64 for b in buffers])
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.NamedTemporaryFile(dir=folder, prefix="host-metal-") as file:
        memory = np.memmap(file.name, np.uint8, "w+", shape=(max(int(offsets[-1]), 64),))
        for buffer, offset in zip(buffers, offsets, strict=False):
            memory[offset : offset + buffer.data.nbytes] = buffer.data.view(np.uint8)
        job = _job(grid, threadgroup, buffers, offsets, options)
        command = [str(runner), file.name]
        result = subprocess.run(command, input=job, capture_output=True, text=True)
        report = _read(result, runner, first_mention)
        for buffer, offset in zip(buffers, offsets, strict=False):
            if buffer.kind != "input":
                buffer.data.view(np.uint8)[:] = memory[offset : offset + buffer.data.nbytes]
    return report


def _job(
    grid: Sequence[int],
    threadgroup: Sequence[int],
    buffers: Sequence[Buffer],
    offsets: Sequence[int],
    options: Options,
) -> str:
    lines = [
        f"grid {grid[0]} {grid[1]} {grid[2]}",
        f"threadgroup {threadgroup[0]} {threadgroup[1]} {threadgroup[2]}",
        f"seed {options.seed} misalign {int(options.misalign)} "
        f"limit {options.threadgroup_limit} seconds {options.cpu_seconds}",
        f"buffers {len(buffers)}",
    ]
    for b, offset in zip(buffers, offsets, strict=False):
        lines.append(f"{b.kind} {b.name} {b.data.itemsize} {b.data.nbytes} {offset}")
    return "\n".join(lines) + "\n"


def _read(
    result: subprocess.CompletedProcess[str], runner: Path, first_mention: Callable[[str], Place]
) -> Report:
    report, done = Report(), False
    for line in result.stdout.splitlines():
        match line.split("\t"):
            case ["fault", *fields]:
                raise _run_error(fields, runner, first_mention)
            case ["buffer", name, loaded, stored, distinct]:
                report.buffers[name] = Traffic(int(loaded), int(stored), int(distinct))
            case ["simd", name, count]:
                report.simd[name] = int(count)
            case [name, count]:
                report.counts[name] = int(count)
            case ["done"]:
                done = True
    if not done:
        raise ToolError(f"the runner ended with {result.returncode}: {result.stderr.strip()}")
    return report


def _run_error(fields: list[str], runner: Path, first_mention: Callable[[str], Place]) -> RunError:
    kind, file, line, address, thread, threadgroup, message = fields
    if int(address, 16):
        place = place_of_address(runner, int(address, 16))
    elif line == "0":  # a buffer's name stands in for a file
        place = first_mention(file)
    else:
        place = Place(os.path.basename(file), int(line))
    who = f" (thread {thread} of threadgroup {threadgroup})" if thread != "-1" else ""
    return RunError(kind, str(place or "?"), message + who)
