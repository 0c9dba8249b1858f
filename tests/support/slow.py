"""Which tests are slow: what an entry of the table in ``conftest.py`` names, and what stays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from checkout import ROOT


class OutOfDateError(Exception):
    """An entry of the table names what is not there."""


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

    def among(self, names: Sequence[str]) -> list[str]:
        """Return which of all the tests of its file are slow.

        Raises:
            OutOfDateError: A pattern matches none of them, or nothing is left out.
        """
        matched = self._matching(self.tests, names)
        if isinstance(self.stays, int):
            staying = set(matched[:: self.stays])
        else:
            staying = {name for p in self.stays for name in self._matching(p, matched)}
        if len(staying) == len(matched):
            raise OutOfDateError(f"all tests of {self.file} that match {self.tests!r} stay")
        return [name for name in matched if name not in staying]

    def _matching(self, pattern: str, names: Sequence[str]) -> list[str]:
        matching = [name for name in names if re.search(pattern, name)]
        if not matching:
            raise OutOfDateError(f"no test of {self.file} matches {pattern!r}")
        return matching


def among(table: Iterable[Slow], file: str, names: Sequence[str]) -> set[str]:
    """Return which of all the tests of a file are slow.

    Raises:
        OutOfDateError: An entry for the file is out of date.
    """
    return {name for entry in table if entry.file == file for name in entry.among(names)}


def gone(table: Iterable[Slow]) -> str:
    """Return the files that the table names and that are not there, or nothing."""
    there = {path.name for path in ROOT.joinpath("tests").rglob("test_*.py")}
    return ", ".join(sorted({entry.file for entry in table} - there))
