"""Locks: one process at a time, who it is, and nothing left behind that keeps anyone out."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from holder import held_elsewhere, holder

from mlx_sink.errors import OutputError
from mlx_sink.io import lock


def test_the_other_one_is_told_who_holds_it(tmp_path: Path):
    file, since = tmp_path / "s", time.strftime("%Y-%m-%d %H:")
    with held_elsewhere(file) as process:
        with pytest.raises(OutputError) as refused, lock.holding(file, "session 's'"):
            pass
        assert str(refused.value).startswith(
            f"session 's' is in use by process {process.pid} since {since}"
        )
        assert "\n" not in str(refused.value)
        assert os.listdir(tmp_path) == [".s.lock"]
    assert process.returncode == 0
    with lock.holding(file, "it"):
        assert os.listdir(tmp_path) == [".s.lock"]
    assert not os.listdir(tmp_path)


def test_a_killed_process_locks_nothing(tmp_path: Path):
    file = tmp_path / "s"
    with held_elsewhere(file) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert os.listdir(tmp_path) == [".s.lock"]
    with lock.holding(file, "it"):
        pass
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "text", [b"", b"4711", b"-1 2026-01-01 00:00:00 host\n", b"1 2026-01-01 00:00:00 \x1b[2J\n"]
)
def test_what_the_lock_file_says_is_not_believed(text: bytes, tmp_path: Path):
    file = tmp_path / "s"
    with held_elsewhere(file):
        (tmp_path / ".s.lock").write_bytes(text)
        with pytest.raises(OutputError, match=r"^it is in use by another process: "):
            lock.holding(file, "it").__enter__()


def test_another_machine_is_named(tmp_path: Path):
    with held_elsewhere(tmp_path / "s"):
        (tmp_path / ".s.lock").write_text("12 2026-01-01 00:00:00 mac.local\n")
        with pytest.raises(
            OutputError, match=r"by process 12 on mac\.local since 2026-01-01 00:0"
        ):
            lock.holding(tmp_path / "s", "it").__enter__()


def test_a_link_and_a_relative_name_are_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "s")
    monkeypatch.chdir(tmp_path)
    with held_elsewhere(tmp_path / "link"):
        assert os.listdir(tmp_path / "far") == [".s.lock"]
        for name in ("link", "far/s", "far/../far/./s"):
            with pytest.raises(OutputError, match="is in use by process"):
                lock.holding(Path(name), "it").__enter__()
        with lock.holding(tmp_path / "s", "another"):
            pass


def test_one_process_holds_it_once_unless_it_says_so(tmp_path: Path):
    """A command saves its session within its own lock; a second command may be a thread."""
    file = tmp_path / "s"
    with lock.holding(file, "it"):
        with lock.holding(file, "it", nested=True):
            pass
        with pytest.raises(OutputError, match=f"in use by process {os.getpid()} already"):
            lock.holding(file, "it").__enter__()
        done = subprocess.run(holder(file), capture_output=True, text=True, input="")
        assert f"in use by process {os.getpid()} since" in done.stderr
    assert not os.listdir(tmp_path)
    with lock.holding(file, "it", nested=True):
        assert os.listdir(tmp_path) == [".s.lock"]
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_without_locks_it_says_so_and_goes_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    told: list[str] = []
    with lock.holding(tmp_path / "s", "session 's'", warn=told.append):
        assert not os.listdir(tmp_path)
        with lock.holding(tmp_path / "s", "session 's'", nested=True, warn=told.append):
            pass
    (message,) = told
    assert message == (
        f"session 's' cannot be locked ({os.strerror(number)}): see to it that no other process "
        "works on it"
    )
    with pytest.warns(RuntimeWarning, match="cannot be locked"), lock.holding(tmp_path / "t", "t"):
        pass
    assert not os.listdir(tmp_path)


def test_a_full_disk_does_not_keep_anyone_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whether a save fits is for the save to find out: a running command goes on meanwhile."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    told: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(lock.os, "open", fail)
        with lock.holding(tmp_path / "s", "it", warn=told.append):
            pass
    assert len(told) == 1
    with monkeypatch.context() as patch:
        patch.setattr(lock.os, "pwrite", fail)
        with lock.holding(tmp_path / "s", "it"):
            assert (tmp_path / ".s.lock").read_bytes() == b""
    assert not os.listdir(tmp_path)


def test_where_nothing_can_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / ".s.lock").symlink_to(tmp_path / "elsewhere")
    for name, reason in (
        ("nowhere/s", "No such file or directory"),
        ("file/s", "Not a directory"),
        ("s", "symbolic links|Symbolic link|Too many levels"),
        ("x" * 300, "name too long"),
    ):
        with pytest.raises(OutputError, match=rf"^cannot save it: .*({reason})"):
            lock.holding(tmp_path / name, "it").__enter__()
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_file_that_its_holder_has_just_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It was opened before, and locks nothing that the next process would see."""
    plain, tries = fcntl.flock, [0]

    def flock(*args: Any) -> None:
        plain(*args)
        tries[0] += 1
        if tries[0] < 3:
            (tmp_path / ".s.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.holding(tmp_path / "s", "it"):
        assert tries == [3]
        monkeypatch.undo()
        done = subprocess.run(holder(tmp_path / "s"), capture_output=True, text=True, input="")
        assert "is in use by" in done.stderr
    assert not os.listdir(tmp_path)


COUNT = """
import sys
from pathlib import Path
from mlx_sink.errors import OutputError
from mlx_sink.io import lock
counter, n = Path(sys.argv[1]), 0
while n < 60:
    try:
        with lock.holding(counter, "it"):
            counter.write_text(str(int(counter.read_text()) + 1))
            n += 1
    except OutputError as error:
        assert "in use by" in str(error), error
"""


def test_many_processes_take_turns(tmp_path: Path):
    """Each adds to a number in a file: two at once would lose an addition."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNT, str(counter)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert counter.read_text() == "180"
    assert os.listdir(tmp_path) == ["counter"]


def test_no_warning_where_there_are_locks(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lock.holding(tmp_path / "s", "it"):
            pass
