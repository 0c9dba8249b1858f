"""Count what the prefill kernel multiplies, from its tables: no GPU, no arrays.

    python scripts/bench/count_prefill.py

For chunks of L tokens on a ring that has wrapped and whose window spans two epochs, it prints how
many products of 8x8 fragments the kernel makes, in units of the least that the visible pairs of
queries and keys ask for, beside what other ways cost:

- `tiles`: if every fragment of a visited tile were multiplied. The kernel leaves out those that no
  query sees, but the simdgroups of a threadgroup wait for each other, so time lies between.
- `mask`: attention over the whole rectangle of L queries and S + W - 1 + L keys, as an array mask
  makes MLX's own attention do on mlx-lm's rotating cache.
- `blocks`: the plain operations, in blocks of 64 queries against the keys that any of them sees.

`test_kernel_prefill.py` holds the same count against the runner's. Lines are a table in
Markdown.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np

from mlx_sink.attention.dispatch import BLOCK
from mlx_sink.attention.kernels.prefill import Tile
from mlx_sink.attention.kernels.tables import prefill_tables
from mlx_sink.attention.layout import Layout, layout_of
from mlx_sink.attention.ring import Ring
from mlx_sink.attention.rope import Rotation

SHAPES = ((2048, 256), (2048, 1024), (2048, 4096), (512, 1024), (8192, 1024), (8192, 4096))
TILE = Tile(32, 32)
"""That of heads below 128; the fragments are the same with tiles of 16 keys."""


@dataclass(frozen=True)
class Count:
    """Pairs of a query and a key, for one head.

    Attributes:
        visible: Those that the contract asks for: the least.
        fragments: 64 for each fragment that the kernel multiplies.
        tiles: Those of all tiles that it visits.
        blocks: Those that the plain operations multiply.
        mask: The whole rectangle.
    """

    visible: int
    fragments: int
    tiles: int
    blocks: int
    mask: int


def fragments_of(ranges: np.ndarray, n: int, tile: Tile) -> tuple[int, int]:
    """Count fragments of 8 queries and 8 keys, as the kernel's text goes through a table.

    Args:
        ranges: A sequence's table, ``[tiles, 8, 8]``.
        n: Queries of the chunk.
        tile: What the table was made for, and keys of a tile.

    Returns:
        Those that are multiplied, and those of all tiles that are visited.
    """
    met = visited = 0
    for i, table in enumerate(ranges.tolist()):
        rows = min(tile.queries, n - i * tile.queries)
        for _, length, _, token, reach, seen_from, seen_to, _ in table:
            for at in range(0, length, tile.keys):
                visited += tile.queries // 8 * (tile.keys // 8)
                full = at >= seen_from and at + tile.keys <= seen_to
                for row in range(0, rows, 8):
                    last = min(row + 7, rows - 1)
                    for key in range(token + at, token + min(at + tile.keys, length), 8):
                        end = min(key + 7, token + length - 1)
                        met += full or (key <= last and end > row - reach)
    return met, visited


def count(layout: Layout, tile: Tile = TILE) -> Count:
    """Count a whole call."""
    ring, n = layout.ring, layout.n
    tables = prefill_tables(layout, ring.tokens, layout.end, Rotation([]), tile.queries)
    met, visited = fragments_of(np.array(tables.ranges[0]), n, tile)
    queries = range(ring.tokens, layout.end)
    visible = sum(min(t + 1, ring.num_sinks + min(t + 1 - ring.num_sinks, ring.window))
                  for t in queries)  # fmt: skip
    blocks = 0
    for first in range(ring.tokens, layout.end, BLOCK):
        block = layout.block(first, min(first + BLOCK, layout.end))
        blocks += block.n * sum(r.length for r in block.ranges)
    rows = min(ring.tokens, ring.num_sinks + ring.window - 1) + n
    return Count(visible, met * 64, visited * 64, blocks, n * rows)


def wrapped(num_sinks: int, window: int) -> Ring:
    """Return a ring half of whose window lies in the epoch before."""
    epoch = 4 * (num_sinks + window)
    return Ring(num_sinks, window, epoch, 2 * epoch + window // 2, 2 * epoch, epoch)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Count what the prefill kernel multiplies.")
    parser.add_argument("--num-sinks", type=int, default=4)
    given = parser.parse_args(arguments)
    print("| chunk L | window W | kernel | tiles | blocks | mask | mask / kernel |")
    print("|---|---|---|---|---|---|---|")
    for length, window in SHAPES:
        c = count(layout_of(wrapped(given.num_sinks, window), length))
        ratios = [c.fragments, c.tiles, c.blocks, c.mask]
        cells = " | ".join(f"{x / c.visible:.3f}" for x in ratios)
        print(f"| {length} | {window} | {cells} | {c.mask / c.fragments:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
