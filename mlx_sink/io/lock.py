"""Advisory locks: one process at a time works on a file that each save replaces.

The lock is on a file of its own, ``.NAME.lock`` beside the target, since the target is another
file after every save. It belongs to the open file (``flock``), so the system takes it back when
the process ends, however that ends: what a killed process leaves behind locks nothing. The holder
removes the lock file when it is done. Who holds it stands in the file, for a message and no more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from mlx_sink.errors import OutputError

TRIES = 100
"""Times to try again where another process removes the lock file that was opened."""


@dataclass
class _Held:
    """A lock of this process: its open file, if there can be a lock, and its users."""

    file: Path
    descriptor: int | None
    users: int = 1


_guard = Lock()
_held: dict[Path, _Held] = {}


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@contextlib.contextmanager
def holding(
    path: Path, what: str, *, nested: bool = False, warn: Callable[[str], None] = _warn
) -> Generator[None]:
    """Keep other processes off a file, or a folder, while the block runs.

    Where the file system has no locks, this says so and goes on.

    Args:
        path: The target, which need not exist; a symbolic link is followed.
        what: What it is, for messages: ``session 'story'``.
        nested: Go on where this process holds the lock already.
        warn: Takes the message that there are no locks.

    Raises:
        OutputError: Another process, or this one, is at it; or nothing can be written there.
    """
    target = Path(os.path.realpath(path))
    with _guard:
        held = _held.get(target)
        if held is None:
            held = _held[target] = _take(target, what, warn)
        elif nested:
            held.users += 1
        else:
            raise _in_use(what, f"process {os.getpid()} already")
    try:
        yield
    finally:
        with _guard:
            held.users -= 1
            if not held.users:
                del _held[target]
                _release(held)


def _take(target: Path, what: str, warn: Callable[[str], None]) -> _Held:
    file = target.parent / f".{target.name}.lock"
    try:
        for _ in range(TRIES):
            descriptor = _locked(file, what)
            if _is_at(file, descriptor):
                _sign(descriptor)
                return _Held(file, descriptor)
            os.close(descriptor)  # Its holder has removed it since.
        reason = "its file keeps changing"
    except OSError as error:
        reason = _reason(error)
    warn(f"{what} cannot be locked ({reason}): see to it that no other process works on it")
    return _Held(file, None)


def _locked(file: Path, what: str) -> int:
    """Open a lock file and lock it.

    Raises:
        OutputError: It is locked already, or there can be no file.
        OSError: The file system has no locks, or is full.
    """
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # A save writes another file in the same folder, and would fail later.
        raise OutputError(f"cannot save {what}: {_reason(error)}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(descriptor)
        os.close(descriptor)
        raise _in_use(what, holder) from None
    except OSError:
        _release(_Held(file, descriptor))
        raise
    return descriptor


def _sign(descriptor: int) -> None:
    """Write into a lock file who holds it."""
    text = f"{os.getpid()} {time.strftime('%Y-%m-%d %H:%M:%S')} {socket.gethostname()}\n"
    # A full disk costs the message its process, and no more.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _release(held: _Held) -> None:
    if held.descriptor is None:
        return
    # Removed before it is released: who has opened it meanwhile finds it gone, and tries again.
    if _is_at(held.file, held.descriptor):
        held.file.unlink(missing_ok=True)
    os.close(held.descriptor)


def _is_at(file: Path, descriptor: int) -> bool:
    """Tell whether an open file is still the one of its name."""
    try:
        return os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(descriptor))
    except OSError:
        return False


def _holder(descriptor: int) -> str:
    """Return in words who has written an open lock file."""
    text = os.pread(descriptor, 400, 0).decode(errors="replace")
    match = re.fullmatch(r"(\d{1,10}) (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ([\w.-]{1,255})\n", text)
    if match is None:
        return "another process"
    pid, since, host = match.groups()
    where = "" if host == socket.gethostname() else f" on {host}"
    return f"process {pid}{where} since {since}"


def _in_use(what: str, holder: str) -> OutputError:
    return OutputError(f"{what} is in use by {holder}: wait until it ends, or name another")


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
