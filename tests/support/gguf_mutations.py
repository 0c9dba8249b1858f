"""Damage a GGUF file in the ways that a header can lie."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from mlx_sink.errors import SinkError
from mlx_sink.models.gguf.source import opened
from mlx_sink.models.load import load_unattached

NUMBERS = [
    0,
    1,
    2,
    31,
    33,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63,
    2**64 - 1,
]


def damaged(data: bytes, seed: int, header: int) -> bytes:
    """Return a damaged copy.

    Args:
        data: The sound file.
        seed: Of the damage.
        header: Bytes of its header, where most of the damage goes.
    """
    draw, out = random.Random(seed), bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        at = draw.randrange(min(len(out), header) if draw.random() < 0.9 else len(out))
        match draw.randrange(8):
            case 0:
                out[at] = draw.randrange(256)
            case 1:
                out[at : at + 8] = struct.pack("<Q", draw.choice(NUMBERS))
            case 2:
                out[at : at + 4] = struct.pack("<I", draw.choice(NUMBERS) % 2**32)
            case 3:
                del out[at : at + draw.choice((1, 4, 8, 100))]
            case 4:
                out[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 4, 8, 50))))
            case 5:
                del out[at:]
            case 6:
                # Counts and lengths stand at multiples of nothing: a text's own bytes move them.
                other = draw.randrange(len(out) or 1)
                out[at : at + 16] = out[other : other + 16]
            case _:
                out[8:16] = struct.pack("<Q", draw.choice(NUMBERS))
        if not out:
            break
    return bytes(out)


def outcome(path: Path) -> str:
    """Load a file: ``loaded``, or the one line that refuses it.

    Raises:
        Exception: Whatever is not one of our errors: a finding.
    """
    opened.cache_clear()
    try:
        load_unattached(str(path))
    except SinkError as error:
        line = str(error)
    else:
        line = "loaded"
    assert "\n" not in line, line
    return line
