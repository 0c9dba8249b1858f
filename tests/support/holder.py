"""Another process that holds the lock of a file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLD = """
import sys
from pathlib import Path
from mlx_sink.io import lock
with lock.holding(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> list[str]:
    """The command of a process that holds the lock until its standard input ends."""
    return [sys.executable, "-c", HOLD, str(path)]


@contextmanager
def held_elsewhere(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Hold a lock in another process until the block ends."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(holder(path), stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.communicate()
