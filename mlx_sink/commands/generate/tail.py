"""Lines of a file as they are appended, or of a pipe, in bounded memory."""

from __future__ import annotations

import os
import re
import select
import stat
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mlx_sink.errors import InputError
from mlx_sink.io.text import UTF8, Encoding, encoding_of, may_be_marked, with_plain_ends

LONGEST = 4096
"""Bytes of a line that are waited for; a longer one comes in pieces of about this size."""

BLOCK = 1 << 16
"""Bytes read at once."""

MARK = 64
"""Bytes before the place in a file by which it is known again."""

PAUSE = 0.1
"""Seconds between two looks at a file that has nothing new."""


class Piece(NamedTuple):
    r"""A line, whose end is ``\n`` whatever it was, or a part of one that is too long.

    Attributes:
        text: The text; bytes that are none are replaced.
        whole: It is a whole line.
    """

    text: str
    whole: bool


class Tail:
    """Read what is there and what comes.

    A file that is replaced (a rotated log) is read to its end, and then the new one from its
    beginning. One that is cut off or written anew in place is read from its beginning: its first
    bytes, and those before the place, are compared at every look. (A text that repeats itself
    every few bytes, cut off and grown again between two looks, can pass for the old one.)

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
        self._middle = self._replaced_bytes = self._changed = False
        self.ended = False
        self._begin()
        self._open()
        if place is not None:
            self._go_on(place)

    def _begin(self) -> None:
        """Stand at the beginning: nothing taken, nothing seen, in no known encoding."""
        self._taken, self._mark, self._head, self._seen = 0, b"", b"", b""
        self._encoding: Encoding | None = None

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

    @property
    def place(self) -> dict[str, Any]:
        """Where the pieces handed out so far end, JSON-ready."""
        head = self._head[: self._taken]
        return {"offset": self._taken, "mark": self._mark.hex(), "head": head.hex()}

    def _go_on(self, place: dict[str, Any]) -> None:
        if self._inode is None:
            return
        offset, mark = place["offset"], bytes.fromhex(place["mark"])
        head = bytes.fromhex(place.get("head", ""))
        if type(offset) is not int or not len(mark) <= offset < 2**63:
            raise ValueError(offset)
        before = os.pread(self._fd, len(mark), offset - len(mark))
        if before == mark and os.pread(self._fd, len(head), 0) == head:
            self._taken, self._mark, self._seen = offset, mark, mark
            self._head = head
            if offset:
                self._encoding = encoding_of(os.pread(self._fd, 4, 0))
            self._middle = bool(mark) and not mark.endswith(tuple(self._ends()))
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
            if end := self._line_end():
                return self._cut(end)
            if len(self._buffer) > LONGEST:
                return self._cut(_boundary(self._buffer, self._unit))
            data = None if self._changed else self._data()
            if data:
                self._buffer += data
                self._head = (self._head + data)[:MARK]
                self._seen = (self._seen + data)[-MARK:]
            elif not self._changed and (data is None or not self._over()):
                return None
            elif self._buffer:
                return self._cut(len(self._buffer), last=True)
            elif self._changed:
                self._changed = False
                self._begin()
            elif self.ended:
                return None

    @property
    def _unit(self) -> int:
        return self._encoding.unit if self._encoding else 1

    def _ends(self) -> list[bytes]:
        """Return what ends a line, as bytes: the two characters of Windows first."""
        codec = self._encoding.codec if self._encoding else "utf-8"
        return [end.encode(codec) for end in ("\r\n", "\n", "\r")]

    def _line_end(self) -> int:
        """Return where the first line of the buffer ends; 0 if it does not, or not yet."""
        if self._encoding is None and not may_be_marked(bytes(self._buffer[:4])):
            self._encoding = encoding_of(bytes(self._buffer[:4]))
        if self._encoding is None:
            return 0
        pattern = re.compile(b"|".join(map(re.escape, self._ends())))
        at = 0
        while (match := pattern.search(self._buffer, at)) and match.start() < LONGEST:
            at = match.start() + 1
            if match.start() % self._unit:
                continue  # the end of one character and the beginning of the next
            # A carriage return may be half of an end of which the rest is still to come.
            half = match.end() + self._unit > len(self._buffer) and match[0] == self._ends()[-1]
            return 0 if half else match.end()
        return 0

    def _cut(self, end: int, *, last: bool = False) -> Piece:
        data = bytes(self._buffer[:end])
        del self._buffer[:end]
        encoding = self._encoding or UTF8
        marked = self._taken == 0 and data.startswith(encoding.mark)
        self._taken += end
        self._mark = (self._mark + data)[-MARK:]
        text = with_plain_ends(self._decoded(data[len(encoding.mark) * marked :], encoding))
        ends = text.endswith("\n")
        if last and not ends and not self.ended:
            text += "\n"  # what follows is of another file
        piece = Piece(text, not self._middle and (ends or last))
        self._middle = not (ends or last)
        return piece

    def _decoded(self, data: bytes, encoding: Encoding) -> str:
        try:
            return data.decode(encoding.codec)
        except UnicodeDecodeError as error:
            if not self._replaced_bytes:
                self._replaced_bytes = True
                at = self._taken - len(data) + error.start
                label = encoding.codec.upper()
                self._say(
                    f"{self._name} is not {label} text throughout, see byte {at}: what is not is "
                    "read as U+FFFD"
                )
            return data.decode(encoding.codec, "replace")

    def _data(self) -> bytes | None:
        """Return what can be read now: nothing at the end, ``None`` if it may still come."""
        try:
            if self._inode is not None:
                return self._data_of_file()
            if self._source == "-" and not select.select([self._fd], [], [], 0)[0]:
                return None
            return os.read(self._fd, BLOCK)
        except BlockingIOError:
            return None
        except OSError as error:
            raise InputError(f"cannot read {self._name}: {error.strerror or error}") from None

    def _data_of_file(self) -> bytes:
        """Read on behind what was seen, if that still stands there."""
        seen, position = self._seen, self._taken + len(self._buffer)
        data = os.pread(self._fd, len(seen) + BLOCK, position - len(seen))
        if data.startswith(seen) and os.pread(self._fd, len(self._head), 0) == self._head:
            return data[len(seen) :]
        cut = os.fstat(self._fd).st_size < position
        what = "was cut off" if cut else "was written anew"
        self._say(f"{self._name} {what}: reading it from its beginning")
        self._changed = True
        return b""

    def _over(self) -> bool:
        """At the end of the data: tell whether an unfinished line in the buffer is all it gets."""
        if self._source == "-":
            self.ended = True
            return True
        if self._inode is None:
            return False
        try:
            now = os.stat(self._source)
        except OSError:
            return False  # it is gone, and may come back
        if (now.st_dev, now.st_ino) == self._inode:
            return False
        if late := self._data():
            self._buffer += late
            self._seen = (self._seen + late)[-MARK:]
            return False
        if not self._buffer:
            old = self._fd
            self._open()
            os.close(old)
            self._begin()
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


def _boundary(data: bytearray, unit: int) -> int:
    """Return the last place up to `LONGEST` that is within no character and no end of a line."""
    for end in range(LONGEST, LONGEST - 8, -unit):
        inside = {1: data[end] & 0xC0 == 0x80, 2: False, 4: False}[unit]
        if unit == 2:  # the second half of a surrogate pair
            inside = any(byte & 0xFC == 0xDC for byte in data[end : end + 2])
        if not inside and b"\r" not in data[end - unit : end]:
            return end
    return LONGEST
