"""Read and write a file of tensors and JSON: written atomically, verified before it is used.

The format is safetensors, so that any tool can read it. Its ``__metadata__`` holds the JSON, after
a SHA-256 of the whole file (computed with zeros in the place of the sum itself). Nothing in a file
is executed, and nothing is allocated before the file has been verified.

`pack` and `unpack` convert a tree of arrays and plain values, such as a cache's state, to JSON and
back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, cast

import mlx.core as mx

from mlx_sink.errors import CacheError, OutputError, SessionError
from mlx_sink.io import atomic

FORMAT = "mlx_sink session 1"
START = b'{"__metadata__":{"sha256":"'
NO_SUM = b"0" * 64
SUM_AT = 8 + len(START)

MAX_HEADER = 1 << 20
"""Largest header, in bytes; hundreds of layers take a tenth of it."""

BLOCK = 1 << 20

DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F64": mx.float64,
    "C64": mx.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_writing = Lock()


Known = dict[str, str]
"""The sums that files had when they were last read or written, by their resolved paths."""


def write(
    path: Path,
    note: Mapping[str, Any],
    arrays: Mapping[str, mx.array],
    known: Known | None = None,
) -> None:
    """Write a file; the old one stays until the new one is on the disk.

    Args:
        path: The file.
        note: Values that JSON can hold, stored in the header.
        arrays: The tensors.
        known: What the writer knows of files; the new one is noted. One that is known is replaced
            only while it still holds the same, or is gone.

    Raises:
        OutputError: It cannot be written, or its header would be too long to be read again.
        SessionError: Somebody else has written the file since.
    """
    header = _header(note, arrays)
    known, target = {} if known is None else known, os.path.realpath(path)
    with _writing:
        try:
            if target in known and _sum_of(target) not in (None, known[target]):
                raise SessionError(
                    f"session {str(path)!r} has been saved by another stream since this one was "
                    "saved or resumed: resume it again, or save this one under another name"
                )
            with atomic.whole_file(path, 0o600) as file:
                digest = _write(file, header, arrays)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise OutputError(f"cannot save session {str(path)!r}: {reason}") from None
        known[target] = digest


def _sum_of(path: str) -> str | None:
    """Return the sum that a file says it has: ``""`` if it says none, ``None`` without a file.

    Raises:
        OSError: It cannot be read.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            start = file.read(SUM_AT + len(NO_SUM))
    except FileNotFoundError:
        return None
    return start[SUM_AT:].decode(errors="replace") if start[8:SUM_AT] == START else ""


def _header(note: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> bytes:
    metadata = {"sha256": NO_SUM.decode(), "format": FORMAT, "session": json.dumps(note)}
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, array in arrays.items():
        end = at + array.nbytes
        entries[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise OutputError(f"a session's header is limited to {MAX_HEADER} bytes, not {len(text)}")
    return struct.pack("<Q", len(text)) + text


def _write(file: BinaryIO, header: bytes, arrays: Mapping[str, mx.array]) -> str:
    digest = hashlib.sha256(header)
    file.write(header)
    for array in arrays.values():
        data = memoryview(cast("Any", mx.reshape(array, (-1,)).view(mx.uint8)))
        digest.update(data)
        file.write(data)
    file.seek(SUM_AT)
    file.write(digest.hexdigest().encode())
    return digest.hexdigest()


def read(path: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Read a file that `write` wrote.

    Returns:
        The note and the tensors.

    Raises:
        SessionError: It is missing, damaged, or not such a file.
    """
    note, arrays, _ = read_known(path)
    return note, arrays


def read_known(path: Path) -> tuple[dict[str, Any], dict[str, mx.array], Known]:
    """Read a file as `read` does, and return what is then known of it, too."""
    try:
        # Opening a pipe would block until it has a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise SessionError(f"session {str(path)!r} is not a file")
            try:
                note, arrays, digest = _read(file, status.st_size)
                return note, arrays, {os.path.realpath(path): digest}
            except _UnsoundError as error:
                raise SessionError(f"session {str(path)!r} is {error}") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SessionError(f"cannot read session {str(path)!r}: {reason}") from None


class _UnsoundError(Exception):
    """What is wrong with a file, as the end of the message "session ... is"."""


_FOREIGN = "not a session of mlx_sink"
_DAMAGED = "damaged: it does not hold what was written"


def _read(file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, mx.array], str]:
    start = file.read(SUM_AT + len(NO_SUM))
    if start[8:SUM_AT] != START or len(start) < SUM_AT + len(NO_SUM):
        raise _UnsoundError(_FOREIGN)
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER or 8 + length > size:
        raise _UnsoundError(_DAMAGED)
    file.seek(0)
    header = file.read(8 + length)
    digest = hashlib.sha256(header[:SUM_AT] + NO_SUM + header[SUM_AT + len(NO_SUM) :])
    while block := file.read(BLOCK):
        digest.update(block)
    if digest.hexdigest().encode() != start[SUM_AT:]:
        raise _UnsoundError(_DAMAGED)
    # The sum is right, but another program may have made the file.
    try:
        entries: dict[str, Any] = json.loads(header[8:])
        metadata = entries.pop("__metadata__")
        if metadata["format"] != FORMAT:
            raise _UnsoundError(f"of another version: {str(metadata['format'])[:40]!r}")
        note = json.loads(metadata["session"])
        tensors = _tensors(entries, size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _UnsoundError(_FOREIGN) from None
    if not isinstance(note, dict):
        raise _UnsoundError(_FOREIGN)
    arrays: dict[str, mx.array] = {}
    for name, (dtype, shape, begin, end) in tensors.items():
        file.seek(8 + length + begin)
        data = file.read(end - begin)
        if len(data) != end - begin:
            raise _UnsoundError(_DAMAGED)
        flat = mx.array(cast("Any", memoryview(data))).view(dtype)
        arrays[name] = mx.reshape(flat, shape)
    return cast("dict[str, Any]", note), arrays, digest.hexdigest()


def _tensors(
    entries: dict[str, Any], room: int
) -> dict[str, tuple[mx.Dtype, list[int], int, int]]:
    """Check that the tensors lie one after the other and fill the data exactly.

    Raises:
        ValueError: They do not. Values of other types raise other errors.
    """
    tensors: dict[str, tuple[mx.Dtype, list[int], int, int]] = {}
    at = 0
    for name, entry in entries.items():
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**31 for n in shape) or len(shape) > 8:
            raise ValueError(shape)
        if begin != at or end - begin != math.prod(shape) * dtype.size:
            raise ValueError(name)
        tensors[name] = dtype, shape, begin, end
        at = end
    if at != room:
        raise ValueError(at)
    return tensors


class Omitted:
    """A part of a list or tuple that `pack` leaves out: it is there for others to see."""

    __slots__ = ()


def pack(value: Any, name: str, arrays: dict[str, mx.array]) -> Any:
    """Convert a tree to JSON; its arrays go into ``arrays`` under names.

    Raises:
        CacheError: The tree holds something that is neither an array nor JSON.
    """
    if isinstance(value, mx.array):
        arrays[name] = value
        return {"array": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        parts = [part for part in cast("list[Any]", value) if not isinstance(part, Omitted)]
        items = [pack(part, f"{name}.{i}", arrays) for i, part in enumerate(parts)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, dict):
        named = cast("dict[str, Any]", value)
        return {"dict": {k: pack(v, f"{name}.{k}", arrays) for k, v in named.items()}}
    raise CacheError(f"a cache holds a {type(value).__name__}, which cannot be saved")


def unpack(value: Any, arrays: Mapping[str, mx.array]) -> Any:
    """Convert what `pack` returned back to the tree.

    Raises:
        ValueError: It is not what `pack` returns. Values of other types raise other errors.
    """
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError(cast("object", value))
        return value
    ((kind, content),) = cast("dict[str, Any]", value).items()
    if kind == "array":
        return arrays[content]
    if kind == "list":
        return [unpack(v, arrays) for v in content]
    if kind == "tuple":
        return tuple(unpack(v, arrays) for v in content)
    if kind == "dict":
        return {name: unpack(v, arrays) for name, v in content.items()}
    raise ValueError(kind)


def plain(value: Any) -> Any:
    """Return a tree as it comes back from `pack` and `unpack`, with the same arrays."""
    arrays: dict[str, mx.array] = {}
    return unpack(pack(value, "", arrays), arrays)


def copied(value: Any) -> Any:
    """Return a deep copy of a tree: writing into its arrays does not change the original."""
    arrays: dict[str, mx.array] = {}
    packed = pack(value, "", arrays)
    return unpack(packed, {name: mx.array(array) for name, array in arrays.items()})
