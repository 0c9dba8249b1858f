"""The table of slow tests: what it marks, and that no entry of it can rot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import slow
from checkout import ROOT
from slow import Slow

NAMES = ["test_a[1-x]", "test_a[2-x]", "test_a[3-y]", "test_b", "test_c"]


@dataclass
class Found:
    """A test of this file, as pytest finds it."""

    name: str
    path: Path = Path(__file__)
    markers: list[str] = field(default_factory=list)

    def add_marker(self, marker: str) -> None:
        self.markers.append(marker)


@pytest.mark.parametrize(
    ("entry", "marked"),
    [
        (Slow("test_slow.py"), NAMES),
        (Slow("test_slow.py", "test_a"), NAMES[:3]),
        (Slow("test_slow.py", "test_a", ("-x",)), NAMES[2:3]),
        (Slow("test_slow.py", "test_a", 2), NAMES[1:2]),
        (Slow("test_slow.py", "_[ac]", (r"\[1", "-y")), [NAMES[1], "test_c"]),
        (Slow("test_signals.py", "no such test"), []),  # None of its tests are there.
    ],
)
def test_marks_what_an_entry_names(entry: Slow, marked: list[str]):
    items = [Found(name) for name in NAMES]
    slow.mark([entry], items)
    assert [item.name for item in items if item.markers] == marked
    assert all(item.markers in ([], ["slow"]) for item in items)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (Slow("test_slow.py", "test_d"), "no test of test_slow.py matches 'test_d'"),
        (Slow("test_slow.py", "test_a", ("-x", "-z")), "matches '-z'"),
        (Slow("test_slow.py", "test_a", ("test_",)), "all tests that match 'test_a'"),
        (Slow("test_slow.py", "test_b", 4), "all tests that match 'test_b'"),
        (Slow("test_gone.py"), "no file is called test_gone.py"),
    ],
)
def test_an_entry_that_is_out_of_date_stops_the_run(entry: Slow, says: str):
    with pytest.raises(pytest.UsageError, match=says):
        slow.mark([entry], [Found(name) for name in NAMES])


def test_files_are_known_by_their_names():
    names = [path.name for path in ROOT.joinpath("tests").rglob("test_*.py")]
    assert len(set(names)) == len(names)
