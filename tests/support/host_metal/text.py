"""Kernel text as text: comments, tokens, and which file and line each line comes from."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LINE_MARKER = re.compile(r'^\s*#line\s+(\d+)(?:\s+"([^"]*)")?')


@dataclass(frozen=True)
class Place:
    """One line of kernel text in the file that it was read from."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def without_comments(text: str) -> str:
    """Blank out comments; every other character keeps its offset and line."""
    return _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def identifiers(text: str) -> set[str]:
    """All identifiers and keywords that code, not comments, mentions."""
    return set(re.findall(r"[A-Za-z_]\w*", without_comments(text)))


def line_marker(place: Place) -> str:
    """A directive after which compilers count lines from `place`."""
    return f'#line {place.line} "{place.file}"\n'


def places(marked: str) -> list[Place]:
    """The origin of each line of a text that `with_line_markers` made."""
    place, found = Place("?", 1), []
    for line in marked.split("\n"):
        found.append(place)
        marker = _LINE_MARKER.match(line)
        if marker:
            place = Place(marker[2] or place.file, int(marker[1]))
        else:
            place = Place(place.file, place.line + 1)
    return found


def with_line_markers(text: str, name: str, files: Mapping[str, str]) -> str:
    """Insert #line markers, so that compilers name the files which hold the text.

    A kernel's text may be several files in a row, or one with its comments taken out: each line is
    looked up in the files, and a marker stands wherever the numbering would go wrong.

    Args:
        text: The text as it is compiled.
        name: The file to name where no file holds the text.
        files: Text of each file by its name.
    """
    lines = text.split("\n")
    origin = _origins(lines, files)
    out, expected = [], None
    for index, line in enumerate(lines):
        place = origin.get(index) or expected or Place(name, 1)
        # A marker inside a macro that goes on would end it.
        if place != expected and not (index and lines[index - 1].endswith("\\")):
            out.append(line_marker(place).rstrip("\n"))
            expected = place
        out.append(line)
        expected = Place(expected.file, expected.line + 1)
    return "\n".join(out)


def _origins(lines: list[str], files: Mapping[str, str]) -> dict[int, Place]:
    """Match lines with files, the file that holds most of them first."""
    wanted = _comparable("\n".join(lines))
    matches = []
    for name, content in files.items():
        matcher = difflib.SequenceMatcher(None, wanted, _comparable(content), autojunk=False)
        # Blank lines and lone brackets match anywhere: only runs that hold code count.
        blocks = [b for b in matcher.get_matching_blocks() if _weight(wanted, b.a, b.size) > 8]
        matches.append((sum(block.size for block in blocks), name, blocks))
    origin: dict[int, Place] = {}
    for _, name, blocks in sorted(matches, key=lambda match: -match[0]):
        for block in blocks:
            for k in range(block.size):
                origin.setdefault(block.a + k, Place(name, block.b + k + 1))
    return origin


def _comparable(text: str) -> list[str]:
    return [" ".join(line.split()) for line in without_comments(text).split("\n")]


def _weight(lines: list[str], start: int, size: int) -> int:
    return sum(len(line) for line in lines[start : start + size])


def read_metal_files(folder: Path) -> dict[str, str]:
    """Text of every .metal file in a folder, by file name."""
    return {path.name: path.read_text() for path in sorted(folder.glob("*.metal"))}
