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
    """Show on stderr, while the block runs, how many bytes and shards have been written.

    Complete shards are flushed to the disk meanwhile, so that the sync at the end is short.

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
        # A new shard updates the bar also where stderr is not a terminal.
        if len(sizes) > shown:
            shown = len(sizes)
            bar.set_postfix_str(f"shard {shown} of {shards}", refresh=True)
        bar.update(min(sum(sizes), bar.total) - bar.n)


def _sync(folder: Path, stop: Event) -> None:
    synced: set[Path] = set()
    while not stop.wait(INTERVAL):
        # The last shard, by name, may still be growing.
        for file in sorted(folder.glob("*.safetensors"))[:-1]:
            if file not in synced and not stop.is_set():
                synced.add(file)
                # The sync at the end tries again, and reports what fails.
                with contextlib.suppress(OSError):
                    atomic.sync_file(file)
