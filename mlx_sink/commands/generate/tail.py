"""Lines of a file as they are appended, or of a pipe, in bounded memory."""

from __future__ import annotations

import os
import select
import stat
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mlx_sink.errors import InputError

LONGEST = 4096
"""Bytes of a line that are waited for; a longer one comes in pieces of about this size."""

BLOCK = 1 << 16
"""Bytes read at once."""

MARK = 64
"""Bytes before the place in a file by which it is known again."""

PAUSE = 0.1
"""Seconds between two looks at a file that has nothing new."""


class Piece(NamedTuple):
    """A line with its end, or a part of one that is too long.

    Attributes:
        text: The text; bytes that are not UTF-8 are replaced.
        whole: It is a whole line.
    """

    text: str
    whole: bool


class Tail:
    """Read what is there and what comes.

    A file that is replaced (a rotated log) is read to its end, and then the new one from its
    beginning; one that is cut off is read from its beginning.

    Args:
        source: A file, or ``-`` for standard input.
        place: A `place` to go on from. A file that is another one by now is read from its
            beginning.
        say: Takes a line for the person when one of these things happens.

    Attributes:
        ended: No more will come: standard input was closed.

    Raises:
        InputError: The file cannot be read.
    """

    def __init__(
        self,
        source: str,
        place: dict[str, Any] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self._source, self._say = source, say
        self._name = "standard input" if source == "-" else f"file {source!r}"
        self._buffer = bytearray()
        self._taken, self._mark, self._middle = 0, b"", False
        self.ended = False
        self._open()
        if place is not None:
            self._go_on(place)

    def _open(self) -> None:
        if self._source == "-":
            self._fd, self._inode = sys.stdin.fileno(), None
            return
        try:
            # A pipe without a writer would wait for one.
            self._fd = os.open(self._source, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise InputError(f"cannot follow {self._name}: {error.strerror or error}") from None
        status = os.fstat(self._fd)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"cannot follow {self._name}: it is a folder")
        regular = stat.S_ISREG(status.st_mode)
        self._inode = (status.st_dev, status.st_ino) if regular else None
        self._taken, self._mark = 0, b""

    @property
    def place(self) -> dict[str, Any]:
        """Where the pieces handed out so far end, JSON-ready."""
        return {"offset": self._taken, "mark": self._mark.hex()}

    def _go_on(self, place: dict[str, Any]) -> None:
        if self._inode is None:
            return
        offset, mark = place["offset"], bytes.fromhex(place["mark"])
        held = os.pread(self._fd, len(mark), max(0, offset - len(mark)))
        if held == mark:
            os.lseek(self._fd, offset, os.SEEK_SET)
            self._taken, self._mark = offset, mark
            self._middle = bool(mark) and not mark.endswith(b"\n")
        else:
            self._say(f"{self._name} is another one by now: reading it from its beginning")

    def backlog(self) -> int:
        """Return the bytes that a file holds already and that are still to come."""
        if self._inode is None:
            return 0
        return max(0, os.fstat(self._fd).st_size - self._taken)

    def next(self) -> Piece | None:
        """Return the next piece, or ``None`` if there is none yet."""
        while True:
            end = self._buffer.find(b"\n", 0, LONGEST) + 1
            if end:
                return self._cut(end)
            if len(self._buffer) > LONGEST:
                return self._cut(_boundary(self._buffer, LONGEST))
            data = self._data()
            if data:
                self._buffer += data
            elif data is None or not self._over():
                return None
            elif self._buffer:
                return self._cut(len(self._buffer), last=True)
            elif self.ended:
                return None

    def _cut(self, end: int, *, last: bool = False) -> Piece:
        data = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._taken += end
        self._mark = (self._mark + data)[-MARK:]
        ends = data.endswith(b"\n")
        piece = Piece(data.decode("utf-8", "replace"), not self._middle and (ends or last))
        self._middle = not (ends or last)
        return piece

    def _data(self) -> bytes | None:
        """Return what can be read now: nothing at the end, ``None`` if it may still come."""
        if self._source == "-" and not select.select([self._fd], [], [], 0)[0]:
            return None
        try:
            return os.read(self._fd, BLOCK)
        except BlockingIOError:
            return None
        except OSError as error:
            raise InputError(f"cannot read {self._name}: {error.strerror or error}") from None

    def _over(self) -> bool:
        """At the end of the data: tell whether an unfinished line in the buffer is all it gets."""
        if self._source == "-":
            self.ended = True
            return True
        if self._inode is None:
            return False
        read = self._taken + len(self._buffer)
        if os.fstat(self._fd).st_size < read:
            self._say(f"{self._name} was cut off: reading it from its beginning")
            self._buffer.clear()
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._taken, self._mark, self._middle = 0, b"", False
            return True
        try:
            now = os.stat(self._source)
        except OSError:
            return False  # it is gone, and may come back
        if (now.st_dev, now.st_ino) == self._inode:
            return False
        if late := self._data():
            self._buffer += late
            return False
        if not self._buffer:
            old = self._fd
            self._open()
            os.close(old)
            self._middle = False
            self._say(f"{self._name} was replaced: going on with the new one")
        return True

    def wait(self) -> None:
        """Wait a moment for more."""
        if self._source == "-":
            select.select([self._fd], [], [], PAUSE)
        else:
            time.sleep(PAUSE)

    def close(self) -> None:
        """Close the file."""
        if self._source != "-":
            os.close(self._fd)


def _boundary(data: bytearray, end: int) -> int:
    """Return the last place up to ``end`` that is not within a UTF-8 character."""
    return next((at for at in range(end, end - 4, -1) if data[at] & 0xC0 != 0x80), end)
