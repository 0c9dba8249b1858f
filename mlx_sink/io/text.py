r"""Text that comes in, whoever wrote it: in UTF-8, or marked as UTF-16 or UTF-32.

A byte order mark is no part of the text: read as characters it would be among the sinks. Windows
ends a line with ``\r\n``, and a model that has seldom seen ``\r`` reads such a text worse.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mlx_sink.errors import InputError


class Encoding(NamedTuple):
    """How characters are written as bytes.

    Attributes:
        codec: Python's name of it, for text without a mark.
        mark: The byte order mark that tells it; UTF-8 needs none.
        unit: Bytes of a code unit.
    """

    codec: str
    mark: bytes
    unit: int


UTF8 = Encoding("utf-8", codecs.BOM_UTF8, 1)

# The mark of UTF-16 begins that of UTF-32: the longer one is asked first.
MARKED = (
    Encoding("utf-32-le", codecs.BOM_UTF32_LE, 4),
    Encoding("utf-32-be", codecs.BOM_UTF32_BE, 4),
    UTF8,
    Encoding("utf-16-le", codecs.BOM_UTF16_LE, 2),
    Encoding("utf-16-be", codecs.BOM_UTF16_BE, 2),
)


def encoding_of(head: bytes) -> Encoding:
    """Return the encoding of a text by its first four bytes; UTF-8 where no mark says another."""
    return next((e for e in MARKED if head.startswith(e.mark)), UTF8)


def may_be_marked(head: bytes) -> bool:
    """Tell whether so few first bytes may be the beginning of a mark."""
    return any(len(head) < len(e.mark) and e.mark.startswith(head) for e in MARKED)


def with_plain_ends(text: str) -> str:
    r"""Return a text whose lines all end in ``\n``."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode(data: bytes, name: str) -> str:
    """Return the text that a whole file holds.

    Args:
        data: The file.
        name: What it is, for the error.

    Raises:
        InputError: It is not text; the message names the byte.
    """
    encoding = encoding_of(data[:4])
    start = len(encoding.mark) if data.startswith(encoding.mark) else 0
    label = encoding.codec.upper().removesuffix("-LE").removesuffix("-BE")
    try:
        text = data[start:].decode(encoding.codec)
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not {label} text: see byte {start + error.start}") from None
    if (at := text.find("\0")) >= 0:
        byte = start + len(text[:at].encode(encoding.codec))
        raise InputError(
            f"{name} is not {label} text: byte {byte} is NUL; save it as UTF-8, or as UTF-16 with "
            "a byte order mark"
        )
    return with_plain_ends(text)


def read(source: str | Path | BinaryIO, name: str) -> str:
    """Read a text from a file or from standard input.

    Args:
        source: A path, or an open binary file.
        name: What it is, for the error.

    Raises:
        InputError: It does not exist, cannot be read, or is not text.
    """
    try:
        data = Path(source).read_bytes() if isinstance(source, str | Path) else source.read()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"cannot read {name}: {reason}") from None
    return decode(data, name)
