"""Progress bar and early fsync while mlx-lm writes shards, which does neither."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

from mlx_sink.io import atomic, terminal

INTERVAL = 0.1
"""Seconds between two looks at the folder."""


@contextlib.contextmanager
def progress(folder: Path, nbytes: int, shards: int) -> Generator[None]:
    """Show on stderr how many bytes, and which shard, have been written while the block runs.

    Meanwhile shards that are complete go to the disk, so that the sync at the end has little to
    wait for.

    Args:
        folder: Where the weight files appear.
        nbytes: Bytes they will have.
        shards: How many there will be.
    """
    bar = terminal.bar(nbytes, "writing", "B", unit_scale=True)
    stop = Event()
    threads = [
        Thread(target=_watch, args=(bar, folder, shards, stop), daemon=True),
        Thread(target=_sync, args=(folder, stop), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
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


def _sync(folder: Path, stop: Event) -> None:
    synced: set[Path] = set()
    while not stop.wait(INTERVAL):
        # The last one, in the order of their names, may still be growing.
        for file in sorted(folder.glob("*.safetensors"))[:-1]:
            if file not in synced and not stop.is_set():
                synced.add(file)
                # What cannot be synced now is tried again, and reported, at the end.
                with contextlib.suppress(OSError):
                    atomic.sync_file(file)
