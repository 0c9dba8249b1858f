"""Two streams on one session file: what one has saved there the other does not overwrite."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folder import make_folder
from holder import held_elsewhere

import mlx_sink
from mlx_sink import OutputError, SessionError, SinkConfig, Stream

LOST = "saved by another stream since this one was saved or resumed"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return mlx_sink.load(folder, SinkConfig(num_sinks=4, window=20, epoch=32))


@pytest.fixture
def file(loaded: tuple[Any, Any], tmp_path: Path) -> Path:
    """A session of 5 tokens or so."""
    stream = Stream(*loaded, seed=5)
    stream.feed("the cat")
    stream.save(tmp_path / "s")
    return tmp_path / "s"


def test_the_second_of_two_resumed_streams_is_refused(file: Path, loaded: tuple[Any, Any]):
    first, second = Stream.resume(file, *loaded), Stream.resume(file, *loaded)
    second.feed("the sea")
    second.save(file)
    kept = file.read_bytes()
    first.feed("a dog went")
    with pytest.raises(SessionError, match=LOST) as refused:
        first.save(file)
    assert "\n" not in str(refused.value)
    assert repr(str(file)) in str(refused.value)
    assert file.read_bytes() == kept
    assert os.listdir(file.parent) == ["s"]
    second.feed("the sea")
    second.save(file)
    assert Stream.resume(file, *loaded).position == second.position


def test_saving_elsewhere_does_not_make_it_right(file: Path, loaded: tuple[Any, Any]):
    """The message names another file as a way out: the next save is to the first one again."""
    first, second = Stream.resume(file, *loaded), Stream.resume(file, *loaded)
    second.feed("the sea")
    second.save(file)
    other = file.with_name("other")
    first.save(other)
    first.feed("a dog")
    first.save(other)
    with pytest.raises(SessionError, match=LOST):
        first.save(file)
    file.unlink()
    first.save(file)
    assert Stream.resume(file, *loaded).position == first.position


def test_a_fork_knows_what_its_stream_knew(file: Path, loaded: tuple[Any, Any]):
    stream = Stream.resume(file, *loaded)
    fork, other = stream.fork(), stream.fork()
    fork.feed("the sea")
    fork.save(file)
    stream.feed("a dog")
    for late in (stream, other, stream.fork()):
        with pytest.raises(SessionError, match=LOST):
            late.save(file)
    fork.save(file)
    fork.fork().save(file)


def test_a_stream_that_knows_nothing_of_a_file_replaces_it(file: Path, loaded: tuple[Any, Any]):
    """As ever: whoever names a file for a new stream wants it there."""
    other = Stream(*loaded, seed=1)
    other.feed("the sea")
    other.save(file)
    other.save(file)
    assert Stream.resume(file, *loaded).position == other.position


CHANGES: dict[str, Callable[[Path], object]] = {
    "another program": lambda file: file.write_bytes(b"{}"),
    "emptied": lambda file: file.write_bytes(b""),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:40]),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_became_something_else_is_kept(
    change: str, file: Path, loaded: tuple[Any, Any]
):
    stream = Stream.resume(file, *loaded)
    CHANGES[change](file)
    before = file.stat()
    with pytest.raises((SessionError, OutputError)):
        stream.save(file)
    after = file.stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)


def test_names_of_one_file(file: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    """It is the file that counts, not how it is spelled."""
    monkeypatch.chdir(file.parent)
    Path("link").symlink_to("s")
    first, second = Stream.resume("link", *loaded), Stream.resume("./s", *loaded)
    second.save(file)  # the same as before: nothing is lost
    first.feed("the sea")
    first.save("s")
    second.feed("a dog")
    for name in ("link", "s", f"../{file.parent.name}/s"):
        with pytest.raises(SessionError, match=LOST):
            second.save(name)
    assert Path("link").is_symlink()
    first.save("link")


def test_a_failed_save_changes_nothing_that_is_known(
    file: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    stream = Stream.resume(file, *loaded)
    stream.feed("the sea")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
        with pytest.raises(OutputError, match="broken"):
            stream.save(file)
    stream.save(file)
    assert Stream.resume(file, *loaded).position == stream.position


def test_of_many_threads_one_saves(file: Path, loaded: tuple[Any, Any]):
    """Looking and replacing is one step: none of them slips in between."""
    streams = [Stream.resume(file, *loaded) for _ in range(6)]
    for i, stream in enumerate(streams):
        stream.feed([3] * (i + 1))
        stream.save(file.with_name(f"warm-{i}"))
    at_once, outcomes = threading.Barrier(len(streams)), list[str]()

    def save(stream: Stream) -> None:
        at_once.wait()
        try:
            stream.save(file)
            outcomes.append("saved")
        except SessionError:
            outcomes.append("refused")

    threads = [threading.Thread(target=save, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused"] * 5 + ["saved"]


def test_no_save_while_a_command_runs_on_the_file(file: Path, loaded: tuple[Any, Any]):
    """Its own next save would replace this one."""
    stream, before = Stream.resume(file, *loaded), file.read_bytes()
    stream.feed("the sea")
    with held_elsewhere(file) as command:
        in_use = f"session .* is in use by process {command.pid} since"
        with pytest.raises(OutputError, match=in_use):
            stream.save(file)
    assert file.read_bytes() == before
    stream.save(file)
    assert os.listdir(file.parent) == ["s"]
