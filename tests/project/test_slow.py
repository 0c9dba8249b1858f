"""The table of slow tests: what it names, and that no entry of it can rot."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import slow
from checkout import ROOT
from slow import Slow

NAMES = ["test_a[1-x]", "test_a[2-x]", "test_a[3-y]", "test_b", "test_c"]


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        (Slow("test_f.py"), NAMES),
        (Slow("test_f.py", "test_a"), NAMES[:3]),
        (Slow("test_f.py", "test_a", ("-x",)), NAMES[2:3]),
        (Slow("test_f.py", "test_a", 2), NAMES[1:2]),
        (Slow("test_f.py", "_[ac]", (r"\[1", "-y")), [NAMES[1], "test_c"]),
        (Slow("test_g.py"), []),
    ],
)
def test_what_an_entry_names(entry: Slow, named: list[str]):
    assert slow.among([entry], "test_f.py", NAMES) == set(named)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (Slow("test_f.py", "test_d"), "no test of test_f.py matches 'test_d'"),
        (Slow("test_f.py", "test_a", ("-x", "-z")), "no test of test_f.py matches '-z'"),
        (Slow("test_f.py", "test_a", ("test_",)), "all tests of test_f.py that match 'test_a'"),
        (Slow("test_f.py", "test_b", 4), "all tests of test_f.py that match 'test_b'"),
    ],
)
def test_an_entry_that_is_out_of_date(entry: Slow, says: str):
    with pytest.raises(slow.OutOfDateError, match=says):
        slow.among([entry], "test_f.py", NAMES)


def test_a_file_that_is_gone():
    assert slow.gone([Slow("test_slow.py")]) == ""
    assert (
        slow.gone([Slow("test_slow.py"), Slow("test_no.py"), Slow("a.py")]) == "a.py, test_no.py"
    )


def test_files_are_known_by_their_names():
    names = [path.name for path in ROOT.joinpath("tests").rglob("test_*.py")]
    assert len(set(names)) == len(names)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with our settings and three tests, of which one is slow."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tests = tmp_path / "tests"
    tests.mkdir()
    (tmp_path / "torch_tests").mkdir()
    for name in ("conftest.py", "slow.py", "checkout.py"):
        shutil.copy(next(ROOT.joinpath("tests").rglob(name)), tests)
    text = (tests / "conftest.py").read_text()
    table = 'SLOW = [Slow("test_f.py", "test_[ab]", ("test_a",))]\n\n\ndef pytest_configure'
    (tests / "conftest.py").write_text(text.replace("def pytest_configure", table, 1))
    (tests / "test_f.py").write_text("def test_a(): ...\ndef test_b(): ...\ndef test_c(): ...\n")
    return tmp_path


def run(project: Path, *arguments: str) -> str:
    """Run its tests; return what pytest says."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize(("arguments", "passed"), [([], 2), (["tests/test_f.py::test_b"], 1)])
def test_what_runs(arguments: list[str], passed: int, project: Path):
    assert f"{passed} passed" in run(project, "-n", "0", *arguments)


@pytest.mark.parametrize(
    ("file", "processes", "says"),
    [
        ("test_f.py", "1", "no test of test_f.py matches 'test_a'"),
        ("test_g.py", "0", "names test_f.py, which is not there"),
    ],
)
def test_a_run_stops_where_the_table_is_out_of_date(
    file: str, processes: str, says: str, project: Path
):
    (project / "tests" / "test_f.py").unlink()
    (project / "tests" / file).write_text("def test_b(): ...\ndef test_c(): ...\n")
    said = run(project, "-n", processes)
    assert says in said
    assert "SLOW in tests/conftest.py" in said
    assert "passed" not in said
