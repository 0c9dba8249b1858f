"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from mlx_sink.errors import OutputError


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in the place of the one before, which stays until this one is on disk.

    Raises:
        OutputError: It cannot be written.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
