"""Write files and folders atomically: they appear whole or not at all.

A file is written beside its target as ``.NAME.PID.tmp``, synced, and renamed. What killed writers
left behind is removed by the next writer of the same target.
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
from threading import RLock
from typing import BinaryIO

from mlx_sink.errors import OutputError

_writing = RLock()
"""Threads write one after the other: the temporary files are named after the process."""


def temporary(path: Path) -> Path:
    """Return the temporary path at which this process writes what becomes ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def clean(path: Path) -> None:
    """Remove the temporary files that killed writers of a path left behind."""
    path = Path(os.path.realpath(path))
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.tmp")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            match = pattern.fullmatch(name)
            if match and not _is_other_process(int(match[1])):
                _remove(path.with_name(name))


@contextlib.contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Generator[BinaryIO]:
    """Yield an open file that replaces ``path`` when the block ends without an error.

    The old file stays until the new one is on the disk. A symbolic link is followed.

    Args:
        path: Where it goes.
        mode: Its permissions, less the umask.

    Raises:
        OSError: It cannot be written.
    """
    path = Path(os.path.realpath(path))
    beside = temporary(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with _writing:
        clean(path)
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
    """Write a file; the old one stays until the new one is on the disk.

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
        OSError: It cannot be written, or the name has been taken meanwhile.
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
        # A rename replaces an empty folder, but neither a file nor a folder with files.
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
    """Flush a file's data to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Flush an open file's data to the disk."""
    os.fsync(descriptor)
    # On a Mac fsync leaves the data in the drive's cache.
    if (full_sync := getattr(fcntl, "F_FULLFSYNC", None)) is not None:
        fcntl.fcntl(descriptor, full_sync)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder; they order renames by themselves.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
