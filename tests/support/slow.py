"""Which tests are slow: what an entry of the table in ``conftest.py`` marks, and what stays."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
from checkout import ROOT


class Item(Protocol):
    """What is asked of a test."""

    name: str
    path: Path

    def add_marker(self, marker: str) -> None:
        """Mark it."""


@dataclass(frozen=True)
class Slow:
    """Some tests of one file that the default set leaves out.

    Attributes:
        file: The file's name, in whatever folder.
        tests: A pattern, searched for in the name of a test with its parameters.
        stays: Patterns of those among them that stay; or a number n, for each n-th from the first.
    """

    file: str
    tests: str = ""
    stays: tuple[str, ...] | int = ()

    def left_out(self, names: Sequence[str]) -> list[str]:
        """Return which of a file's tests are slow.

        Raises:
            pytest.UsageError: A pattern matches none of them, or nothing is left out.
        """
        matched = _matching(self.tests, names, self.file)
        if isinstance(self.stays, int):
            staying = set(matched[:: self.stays])
        else:
            staying = {n for p in self.stays for n in _matching(p, matched, self.file)}
        if len(staying) == len(matched):
            raise _out_of_date(f"all tests that match {self.tests!r} in {self.file} stay")
        return [name for name in matched if name not in staying]


def _matching(pattern: str, names: Sequence[str], file: str) -> list[str]:
    matching = [name for name in names if re.search(pattern, name)]
    if not matching:
        raise _out_of_date(f"no test of {file} matches {pattern!r}")
    return matching


def _out_of_date(reason: str) -> pytest.UsageError:
    return pytest.UsageError(f"the table of slow tests is out of date: {reason}")


def mark(table: Sequence[Slow], items: Sequence[Item]) -> None:
    """Mark the tests of a table as slow.

    Args:
        table: Which are.
        items: The tests that pytest has found: of each file all or none.

    Raises:
        pytest.UsageError: An entry's file is not there, or none of its tests.
    """
    files: dict[str, list[Item]] = {}
    for item in items:
        files.setdefault(item.path.name, []).append(item)
    for entry in table:
        present = files.get(entry.file)
        if present is None:
            if not any(ROOT.joinpath("tests").rglob(entry.file)):
                raise _out_of_date(f"no file is called {entry.file}")
            continue
        slow = set(entry.left_out([item.name for item in present]))
        for item in present:
            if item.name in slow:
                item.add_marker("slow")
