"""Two commands on one file: the second is told in a line, before it does any work."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from folder import make_folder
from holder import held_elsewhere

from mlx_sink.commands.compare.command import main as compare
from mlx_sink.commands.convert.command import main as convert
from mlx_sink.commands.generate.command import main as generate
from mlx_sink.errors import OutputError, SessionError
from mlx_sink.io import tensors
from mlx_sink.models import load
from mlx_sink.stream.stream import Stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "plain")


def command(name: str, *argv: object) -> list[str]:
    return [sys.executable, "-m", f"mlx_sink.{name}", *map(str, argv)]


@contextmanager
def endless(folder: Path, session: Path) -> Iterator[subprocess.Popen[str]]:
    """Run `generate` on a session, for ever; it has begun to write when the block begins."""
    argv = ["--model", folder, "--session", session, "-p", "the cat", "-m", -1, "--ignore-eos"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command("generate", *argv, "--window", 20), stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdout is not None
    assert process.stdout.read(5)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def refused(main: Any, *argv: object) -> str:
    """Return how a command refuses to begin: without looking for a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "find", lambda *_: pytest.fail("it looked for the model"))
        with pytest.raises(OutputError) as caught:
            main(list(map(str, argv)))
    return str(caught.value)


def test_a_session_is_one_commands_at_a_time(folder: Path, tmp_path: Path):
    file = tmp_path / "s"
    with endless(folder, file) as first:
        argv = ["--model", folder, "--session", file, "-p", "the dog", "-m", 5]
        message = refused(generate, *argv)
        second = subprocess.run(command("generate", *argv), capture_output=True, text=True)
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr == f"python -m mlx_sink.generate: error: {message}\n"
        since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        assert re.match(f"session '.*' is in use by process {first.pid} since {since}: ", message)
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)
        assert first.returncode == 130
    assert os.listdir(tmp_path) == ["s"]
    held = tensors.read(file)[0]["position"]
    again = subprocess.run(command("generate", *argv), capture_output=True, text=True)
    assert again.returncode == 0
    assert f"going on at token {held}," in again.stderr
    assert os.listdir(tmp_path) == ["s"]


def test_a_killed_command_keeps_nobody_out(folder: Path, tmp_path: Path):
    file = tmp_path / "s"
    with endless(folder, file) as first:
        first.kill()
        first.wait()
    assert ".s.lock" in os.listdir(tmp_path)
    assert (
        generate(["--model", str(folder), "--session", str(file), "-p", "a dog", "-m", "5"]) == 0
    )
    assert os.listdir(tmp_path) == ["s"]


def test_the_lock_is_held_to_the_end_of_a_failing_run(folder: Path, tmp_path: Path):
    """And no longer."""
    (tmp_path / "s").write_bytes(b"not a session")
    with pytest.raises(SessionError, match="not a session"):
        generate(["--model", str(folder), "--session", str(tmp_path / "s"), "-p", "a"])
    assert os.listdir(tmp_path) == ["s"]


def test_without_locks_the_command_says_so_and_goes_on(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """As on some network drives. A lost turn is still noticed: by the save."""

    def flock(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    file = tmp_path / "s"
    argv = ["--model", str(folder), "--session", str(file), "-m", "5", "--save-every", "1"]
    assert generate([*argv, "-p", "the cat"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "lock" in line]
    why = os.strerror(errno.EOPNOTSUPP)
    assert told == [
        f"warning: session {str(file)!r} cannot be locked ({why}): see to it that no other "
        "process works on it"
    ]
    save, saves = Stream.save, [0]

    def saved_by_another(self: Stream, path: Path, note: Any = None) -> None:
        saves[0] += 1
        if saves[0] == 2:
            Stream.resume(path, self.model, self.tokenizer).save(path, {"of": "another"})
        save(self, path, note)

    monkeypatch.setattr(Stream, "save", saved_by_another)
    with pytest.raises(SessionError, match="saved by another stream"):
        generate([*argv, "-p", "the dog"])
    assert tensors.read(file)[0]["note"] == {"of": "another"}


def test_a_session_where_nothing_can_be_written(folder: Path, tmp_path: Path):
    """Said before the model is loaded."""
    argv = ["--model", folder, "--session", tmp_path / "nowhere" / "s", "-p", "a"]
    message = refused(generate, *argv)
    assert message.startswith("cannot save session ")
    assert message.endswith("No such file or directory")


def test_a_comparison_is_one_commands_at_a_time(folder: Path, tmp_path: Path):
    text, output = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("the cat and the dog went to the sea " * 20)
    argv = ["--model", folder, "--text", text, "--output", output, "--lengths", 64, "--window", 8]
    with held_elsewhere(output) as other:
        message = refused(compare, *argv, "--trials", 0, "--arms", "ours", "full")
        assert message.startswith(
            f"comparison {str(output)!r} is in use by process {other.pid} since"
        )
        (tmp_path / "other.json").write_text("{}")
        assert "in use by" in refused(compare, "--from", tmp_path / "other.json", *argv[4:6])
    assert sorted(os.listdir(tmp_path)) == ["other.json", "text.txt"]
    options = ["--trials", "0", "--arms", "ours", "full"]
    assert compare([*map(str, argv), *options]) == 0
    names = ["other.json", "run.html", "run.json", "run.png", "text.txt"]
    assert sorted(os.listdir(tmp_path)) == names


def test_a_folder_is_made_by_one_command_at_a_time(folder: Path, tmp_path: Path):
    """An hour of work is not done twice, nor found to be too late."""
    target = tmp_path / "made"
    argv = ["--model", folder, "--mlx-path", target]
    with held_elsewhere(target) as other:
        message = refused(convert, *argv)
        assert message.startswith(f"folder {str(target)!r} is in use by process {other.pid} since")
    assert not os.listdir(tmp_path)
    assert convert(list(map(str, argv))) == 0
    assert os.listdir(tmp_path) == ["made"]
    with pytest.raises(OutputError, match="exists: remove it"):
        convert(list(map(str, argv)))


def test_a_folder_that_was_made_while_it_waited_for_the_lock(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The other process has just finished."""
    target, plain = tmp_path / "made", fcntl.flock

    def flock(*args: Any) -> None:
        target.mkdir(exist_ok=True)
        plain(*args)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match="exists: remove it"):
        convert(["--model", str(folder), "--mlx-path", str(target)])
    assert os.listdir(tmp_path) == ["made"]
