"""Read a GGUF file's header: its fields, and where its tensors lie. No tensor is read.

The layout (version 2 and 3, little endian)::

    "GGUF"  version u32  tensors u64  fields u64
    fields:  name, type u32, value             a name is a length u64 and UTF-8
    tensors: name, dims u32, dim u64 ..., type u32, offset u64
    padding to `general.alignment`, then the tensors' data, each offset from here

Nothing is believed before it has been held against the size of the file: counts and lengths before
a list is made, shapes and offsets before anybody maps a tensor.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np

from mlx_sink.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32

MAX_FIELDS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_STRINGS = 1 << 21
"""Strings of an array at most: vocabularies have some 260,000, their merges twice as many."""
MAX_NAME = 1 << 16
MAX_DIMS = 4
LEAST_STRING = 8
"""Bytes of the shortest string: its length."""

_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8",
    12: "<f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9

TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Name, elements and bytes of a block of each type of tensor, by its number in the file."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        name: Its name.
        shape: Rows first, as numpy has it; a row's elements are neighbours.
        kind: Its type, as GGUF names it.
        offset: Byte of the file at which it begins.
        nbytes: Its bytes.
        path: The file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int
    path: Path

    def data(self) -> np.ndarray:
        """Map the tensor's bytes, ``[rows, bytes of a row]`` uint8; nothing is read yet."""
        shape = (math.prod(self.shape[:-1]), -1) if self.shape else (1, -1)
        flat = np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))
        return cast("np.ndarray", flat).reshape(shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself.

    Attributes:
        path: The file.
        fields: Its metadata: numbers, truths, texts, lists of texts and numpy arrays of numbers.
        tensors: Its tensors by name.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def is_gguf(path: Path) -> bool:
    """Tell whether a file begins as GGUF does, whatever it is called."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(path: Path) -> Header:
    """Read and check a header.

    Raises:
        ModelError: The file cannot be read, or is not a sound GGUF file.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise ModelError(f"{str(path)!r} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelError(f"cannot read {str(path)!r}: {reason}") from None


class _Reader:
    """A place in the mapped file; every step is checked against its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self._path, self._data = path, data
        self._at, self._size = 0, len(data)

    def header(self) -> Header:
        if self._bytes(4) != MAGIC:
            raise ModelError(f"{str(self._path)!r} is not a GGUF file")
        version = self._integer(4)
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "is big-endian" if swapped else f"has version {version}"
            raise ModelError(f"{str(self._path)!r} {what}: GGUF 2 and 3, little-endian, are read")
        n_tensors = self._count("tensors", MAX_TENSORS, 24)
        n_fields = self._count("fields", MAX_FIELDS, 13)
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            name = self._string(MAX_NAME)
            if name in fields:
                self._unsound(f"it has two fields {name!r}")
            fields[name] = self._value(name, self._integer(4))
        infos = [self._info() for _ in range(n_tensors)]
        return Header(self._path, fields, self._placed(infos, self._alignment(fields)))

    def _alignment(self, fields: Mapping[str, Any]) -> int:
        value = fields.get("general.alignment", ALIGNMENT)
        if not isinstance(value, int) or not 1 <= value <= 1 << 20 or value & (value - 1):
            self._unsound(f"its alignment is {value!r}")
        return value

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n = self._string(MAX_NAME), self._integer(4)
        if n > MAX_DIMS:
            self._unsound(f"tensor {name!r} has {n} dimensions")
        shape = tuple(self._integer(8) for _ in range(n))[::-1]
        return name, shape, self._integer(4), self._integer(8)

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, Tensor]:
        """Return the tensors, each within the file and after the one before."""
        start, tensors, spans = -(-self._at // alignment) * alignment, dict[str, Tensor](), []
        for name, shape, number, offset in infos:
            if number not in TYPES:
                self._unsound(f"tensor {name!r} is of type {number}, which is not known")
            kind, elements, nbytes = TYPES[number]
            count = math.prod(shape)
            if not count or (shape[-1] if shape else 1) % elements:
                self._unsound(f"tensor {name!r} of type {kind} has the shape {shape}")
            size = count // elements * nbytes
            if offset % alignment or start + offset + size > self._size:
                self._unsound(f"tensor {name!r} does not lie within its {self._size} bytes")
            if name in tensors:
                self._unsound(f"it has two tensors {name!r}")
            tensors[name] = Tensor(name, shape, kind, start + offset, size, self._path)
            spans.append((offset, offset + size, name))
        end = 0
        for low, high, name in sorted(spans):
            if low < end:
                self._unsound(f"tensor {name!r} lies over another")
            end = high
        return tensors

    def _value(self, name: str, kind: int) -> Any:
        if kind in _SCALARS:
            return np.frombuffer(self._bytes(np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind])[
                0
            ].item()
        if kind == _BOOL:
            return self._truth(name, self._integer(1))
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(name)
        self._unsound(f"field {name!r} is of type {kind}, which is not known")

    def _array(self, name: str) -> Any:
        kind = self._integer(4)
        if kind == _STRING:
            n = self._count(f"strings of {name!r}", MAX_STRINGS, LEAST_STRING)
            return [self._string() for _ in range(n)]
        if kind == _BOOL:
            kind = 0
        if kind not in _SCALARS:
            self._unsound(f"field {name!r} is an array of type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        n = self._count(f"numbers of {name!r}", self._size, dtype.itemsize)
        return np.frombuffer(self._bytes(n * dtype.itemsize), dtype)

    def _truth(self, name: str, value: int) -> bool:
        if value > 1:
            self._unsound(f"field {name!r} is neither true nor false")
        return bool(value)

    def _string(self, most: int | None = None) -> str:
        n = self._integer(8)
        if most is not None and n > most:
            self._unsound(f"a name has {n} bytes")
        try:
            return self._bytes(n).decode()
        except UnicodeDecodeError:
            self._unsound("a text of it is not UTF-8")

    def _count(self, what: str, most: int, least_bytes: int) -> int:
        """Read a number of things, of which each has at least so many bytes."""
        n = self._integer(8)
        if n > most or n * least_bytes > self._size - self._at:
            self._unsound(f"it says that it has {n} {what}")
        return n

    def _integer(self, nbytes: int) -> int:
        return int.from_bytes(self._bytes(nbytes), "little")

    def _bytes(self, n: int) -> bytes:
        if n > self._size - self._at:
            self._unsound(f"it is cut off: {self._size} bytes do not hold its header")
        start, self._at = self._at, self._at + n
        return self._data[start : self._at]

    def _unsound(self, reason: str) -> NoReturn:
        raise ModelError(f"{str(self._path)!r} is not a sound GGUF file: {reason}")
