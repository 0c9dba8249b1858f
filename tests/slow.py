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
        stays: A pattern of those among them that stay; a number n for each n-th, from the first;
            None if none does.
    """

    file: str
    tests: str = ""
    stays: str | int | None = None

    def left_out(self, names: Sequence[str]) -> list[str]:
        """Return which of a file's tests are slow.

        Raises:
            pytest.UsageError: The pattern matches none of them, or nothing or all would stay.
        """
        matched = [name for name in names if re.search(self.tests, name)]
        if isinstance(self.stays, int):
            staying = matched[:: self.stays]
        else:
            staying = [n for n in matched if self.stays and re.search(self.stays, n)]
        if not matched or len(staying) == len(matched) or (self.stays and not staying):
            raise pytest.UsageError(
                f"the table of slow tests is out of date: of {len(matched)} tests that match "
                f"{self.tests!r} in {self.file}, {len(staying)} match {self.stays!r}, which stay"
            )
        kept = set(staying)
        return [name for name in matched if name not in kept]


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
                raise pytest.UsageError(f"the table of slow tests names no file: {entry.file}")
            continue
        slow = set(entry.left_out([item.name for item in present]))
        for item in present:
            if item.name in slow:
                item.add_marker("slow")
