"""Thousands of damaged GGUF files: refused in one line or loaded, no crash, no memory taken.

    python scripts/dev/fuzz_gguf.py --cases 2000

A child process loads some hundreds one after the other and says what came of each; one that dies
is a finding, and a new one goes on behind it. Memory is the
child's peak over that before the first.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import _checkout  # noqa: F401  (finds the tests' support)
from gguf_mutations import damaged, outcome
from gguf_writer import random_model, write

NAMES = (("llama", "Q4_0"), ("qwen2", "Q8_0"), ("gemma3", "F16"), ("phi3, longrope", "Q4_1"))
CASES_OF_A_CHILD = 500
"""A process that loads thousands of models keeps a little of each."""

MOST = 100_000_000
"""Bytes that a case may take above the file."""


def _peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _child(jobs: Connection, folder: Path) -> None:
    files = [write(folder / f"{i}.gguf", *_model(i)) for i in range(len(NAMES))]
    sound = [(file.read_bytes(), _header(file)) for file in files]
    for file in files:
        assert outcome(file) == "loaded", file
    before, path = _peak(), folder / "case.gguf"
    jobs.send(before)
    while (seed := jobs.recv()) is not None:
        data, header = sound[seed % len(sound)]
        path.write_bytes(damaged(data, seed, header))
        try:
            said = outcome(path)
        except BaseException as error:
            said = f"FINDING {type(error).__name__}: {error}"
        jobs.send((said, _peak() - before))


def _model(i: int):
    name, kind = NAMES[i]
    return name, random_model(name), kind


def _header(file: Path) -> int:
    from mlx_sink.io import gguf

    return min(tensor.offset for tensor in gguf.read(file).tensors.values())


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--cases", type=int, default=2000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    outcomes, findings, most, began = Counter[str](), list[str](), 0, time.time()
    seed, last = args.seed, args.seed + args.cases
    with tempfile.TemporaryDirectory() as folder:
        while seed < last:
            ours, theirs = mp.get_context("spawn").Pipe()
            child = mp.get_context("spawn").Process(target=_child, args=(theirs, Path(folder)))
            child.start()
            theirs.close()
            ours.recv()
            try:
                end = min(last, seed + CASES_OF_A_CHILD)
                while seed < end:
                    ours.send(seed)
                    said, taken = ours.recv()
                    if taken > most + 5_000_000:
                        print(f"seed {seed}: {taken / 1e6:.0f} MB; {said}", flush=True)
                    most = max(most, taken)
                    outcomes["loaded" if said == "loaded" else "refused"] += 1
                    if said.startswith("FINDING"):
                        findings.append(f"seed {seed}: {said}")
                    seed += 1
                ours.send(None)
            except EOFError:
                findings.append(f"seed {seed}: the process died")
                seed += 1
            child.join(5)
    print(f"{args.cases} cases in {time.time() - began:.0f} s: {dict(outcomes)}")
    print(
        f"memory: at most {most / 1e6:.0f} MB above that of sound files (limit {MOST / 1e6:.0f})"
    )
    print(f"{len(findings)} findings")
    print("\n".join(findings[:20]))
    return 1 if findings or most > MOST else 0


if __name__ == "__main__":
    sys.exit(main())
