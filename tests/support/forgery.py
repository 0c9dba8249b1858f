"""Sessions that somebody made up: any value changed, and the sum right all the same."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from mlx_sink.io import tensors as store


def signed(header: bytes, data: bytes) -> bytes:
    """Put a file together whose sum is right, as only its maker could."""
    whole = struct.pack("<Q", len(header)) + header + data
    at, zeros = store.SUM_AT, store.NO_SUM
    if len(header) < 100 or whole[8:at] != store.START:
        return whole
    whole = whole[:at] + zeros + whole[at + 64 :]
    return whole[:at] + hashlib.sha256(whole).hexdigest().encode() + whole[at + 64 :]


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def forged(file: Path, change: Any) -> bytes:
    """Change the header, or the session within it, and sign the result."""
    header, data = parts(file)
    session = json.loads(header["__metadata__"]["session"])
    result = change(header, session)
    data = result if isinstance(result, bytes) else data
    header["__metadata__"]["session"] = json.dumps(session)
    return signed(json.dumps(header, separators=(",", ":")).encode(), data)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value within a JSON value."""
    items: list[Any] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]
