"""Run a command and watch the memory of its process: does it grow?

    python scripts/bench/watch_memory.py --json memory.json -- \\
        python -m mlx_sink.generate --prompt-file BOOK --max-tokens 1000 --ignore-eos

Prints the resident memory at every tenth of the run, and how far it strays between the first
tenth, which is warm-up, and the end. The command's own output goes where it always goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil


def main(argv: list[str] | None = None) -> int:
    """Watch the command and print what was seen; return the command's status."""
    parser = argparse.ArgumentParser(description="Run a command and watch its memory.")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between looks (1)")
    parser.add_argument("--json", type=Path, help="write all samples here")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command to run")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command to run")
    status, samples = watch(command, args.every)
    if len(samples) < 20:
        print("the command ended too soon to say anything", file=sys.stderr)
        return status
    result = summary(samples)
    if args.json:
        args.json.write_text(json.dumps(result | {"command": command, "samples": samples}))
    for tenth, rss in enumerate(result["tenths_mb"], start=1):
        print(f"{tenth * 10:>4} %  {rss:8.1f} MB", file=sys.stderr)
    print(
        f"from 10 % to 100 % of {result['seconds']:.0f} s: median {result['median_mb']:.1f} MB, "
        f"highest {result['above_percent']:+.2f} %, last against first tenth "
        f"{result['growth_percent']:+.2f} %",
        file=sys.stderr,
    )
    return status


def watch(command: list[str], every: float) -> tuple[int, list[tuple[float, int]]]:
    """Run a command; return its status and pairs of seconds and resident bytes."""
    process = subprocess.Popen(command)
    watched, began = psutil.Process(process.pid), time.monotonic()
    samples: list[tuple[float, int]] = []
    while process.poll() is None:
        try:
            samples.append((time.monotonic() - began, watched.memory_info().rss))
        except psutil.NoSuchProcess:
            break
        time.sleep(every)
    return process.wait(), samples


def summary(samples: list[tuple[float, int]]) -> dict[str, object]:
    """Return the course of the memory by tenths of the time, and its growth after the first."""
    end = samples[-1][0]
    tenths: list[list[int]] = [[] for _ in range(10)]
    for seconds, rss in samples:
        tenths[min(9, int(10 * seconds / end))].append(rss)
    medians = [statistics.median(t) for t in tenths]
    settled = [rss for t in tenths[1:] for rss in t]
    middle = statistics.median(settled)
    return {
        "seconds": end,
        "tenths_mb": [m / 1e6 for m in medians],
        "median_mb": middle / 1e6,
        "above_percent": 100 * (max(settled) / middle - 1),
        "growth_percent": 100 * (medians[9] / medians[1] - 1),
    }


if __name__ == "__main__":
    sys.exit(main())
