"""How far a folder of weight files is written, seen from outside: mlx-lm's writer tells nobody."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from pathlib import Path
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

INTERVAL = 0.1
"""Seconds between two looks at the folder."""


@contextlib.contextmanager
def progress(folder: Path, nbytes: int, shards: int) -> Generator[None]:
    """Show on stderr how many bytes, and which shard, have been written while the block runs.

    Args:
        folder: Where the weight files appear.
        nbytes: Bytes they will have.
        shards: How many there will be.
    """
    pace = 0.2 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        total=nbytes, desc="writing", unit="B", unit_scale=True, mininterval=pace, leave=False
    )
    stop = Event()
    thread = Thread(target=_watch, args=(bar, folder, shards, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        bar.close()


def _watch(bar: tqdm[Any], folder: Path, shards: int, stop: Event) -> None:
    shown = 0
    while not stop.wait(INTERVAL):
        sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
        # A new shard is worth a line also where nobody watches a bar.
        if len(sizes) > shown:
            shown = len(sizes)
            bar.set_postfix_str(f"shard {shown} of {shards}", refresh=True)
        bar.update(min(sum(sizes), bar.total) - bar.n)
