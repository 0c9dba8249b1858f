"""Files and folders that appear whole or not at all, and what killed writers left behind.

What is being written lies beside its target as ``.NAME.PID.tmp``, is synced, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from mlx_sink.errors import OutputError


def temporary(path: Path) -> Path:
    """Return where this process writes what is to become ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def clean(path: Path) -> None:
    """Remove what earlier writers of a file or folder left behind when they were killed."""
    path = Path(os.path.realpath(path))
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.tmp")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            match = pattern.fullmatch(name)
            if match and not _is_other_process(int(match[1])):
                _remove(path.with_name(name))


@contextlib.contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Generator[BinaryIO]:
    """Yield an open file that takes the place of ``path`` when the block ends without an error.

    The file before stays whole until this one is on the disk. A link is followed.

    Args:
        path: Where it goes.
        mode: Its permissions, less the umask.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(os.path.realpath(path))
    clean(path)
    beside = temporary(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(beside, flags, mode), "wb") as file:
            yield file
            file.flush()
            sync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in the place of the one before, which stays until this one is on the disk.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OutputError(f"cannot write {str(path)!r}: {reason}") from None


@contextlib.contextmanager
def whole_folder(path: Path) -> Generator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends without an error.

    Args:
        path: A folder that does not exist, in one that does.

    Raises:
        OSError: It cannot be written, or something else has taken the name meanwhile.
    """
    path = Path(os.path.realpath(path))
    clean(path)
    folder = temporary(path)
    folder.mkdir()
    try:
        yield folder
        for file in folder.rglob("*"):
            if file.is_file():
                sync_file(file)
        sync_folder(folder)
        # A folder may take the place of an empty one; of a file, or of anything more, it cannot.
        os.rename(folder, path)
        sync_folder(path.parent)
    except BaseException:
        _remove(folder)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_other_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sync_file(path: Path) -> None:
    """Put a file's data on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Put an open file's data on the disk."""
    os.fsync(descriptor)
    # On a Mac fsync leaves the data in the drive's own memory.
    if (whole := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        fcntl.fcntl(descriptor, whole)


def sync_folder(path: Path) -> None:
    """Put a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder, and order renames by themselves.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
