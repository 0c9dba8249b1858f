"""A session is believed value by value: one that is made up is refused, or can be gone on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folder import make_folder
from forgery import forged, places

import mlx_sink
from mlx_sink import SinkConfig, SinkError, Stream
from mlx_sink.commands.generate import command
from mlx_sink.commands.generate import run as generate_run
from mlx_sink.commands.generate.tail import Tail
from mlx_sink.io import tensors as store
from mlx_sink.io import terminal
from mlx_sink.models.load import Loaded, load_unattached

VALUES: list[Any] = [
    None, True, -1, 0, 3, 1.5, 1 << 80, float("nan"), "x", "\ud800", [], [1], ["x"], {}, {"a": 1},
]  # fmt: skip
"""In the place of any other."""

OPTIONS = ["--window", "20", "--temp", "0.9", "--min-p", "0.1", "--repetition-penalty", "1.2"]
OPTIONS += ["--seed", "3", "--stop", "zzz", "--extra-eos-token", "q", "-m", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    """A model that does not say what it was trained on, so that any window goes."""
    loaded: Any = load_unattached(folder)
    loaded.model.args.max_position_embeddings = None
    return loaded._replace(context=None)


@pytest.fixture
def run(loaded: Loaded, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the command in this process; the model is loaded once for all."""
    monkeypatch.setattr(generate_run, "load_unattached", lambda *_, **__: loaded)

    def run(*argv: str) -> None:
        assert command.main(["--model", str(folder), *argv]) in (0, 130)

    return run


def put(place: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Return what puts a value at a place of a session."""

    def change(_: dict[str, Any], held: Any) -> None:
        *way, last = place
        for key in way:
            held = held[key]
        held[last] = value

    return change


def forge_all(
    good: Path,
    bad: Path,
    within: tuple[str, ...],
    go_on: Callable[[], None],
    below: tuple[Any, ...] = (),
) -> dict[bool, int]:
    """Go on from every forgery; return how many were refused, and how many were not.

    Anything but a `SinkError` of one line is an error.

    Args:
        good: A session.
        bad: Where its forgeries go.
        within: The parts of it to change.
        go_on: Goes on from a forgery.
        below: The way to what is changed, if that is not all of them.
    """
    refused, lines = {True: 0, False: 0}, list[str]()
    everywhere = [place for place in places(store.read(good)[0])[1:] if place[0] in within]
    for place in [place for place in everywhere if place[: len(below)] == below]:
        for value in VALUES:
            bad.write_bytes(forged(good, put(place, value)))
            try:
                go_on()
            except SinkError as error:
                lines.append(str(error))
                refused[True] += 1
            except BaseException as error:
                error.add_note(f"{value!r} at {place}")
                raise
            else:
                refused[False] += 1
    assert not any("\n" in line for line in lines)
    return refused


HEAD = ("whose", "config", "position", "recent", "penalty_window", "text", "note")


def test_a_turn(run: Callable[..., None], tmp_path: Path):
    """Settings, the place, the turn: each value of what the command notes."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    run("--session", str(good), "-p", "the cat", *OPTIONS)
    assert {"settings", "place"} == set(store.read(good)[0]["note"])
    again = ["--session", str(bad), "-p", "the cat", "-m", "5"]
    run("--session", str(good), "-p", "the cat", "-m", "5")
    counts = forge_all(good, bad, HEAD, lambda: run(*again))
    assert counts[True] > 500
    assert counts[False] > 50


class Asked:
    """An interrupt that comes when it is asked for the n-th time, or nothing is left to read."""

    left = 0
    status = 0

    def __call__(self) -> bool:
        Asked.left -= 1
        self.status = 130 if Asked.left < 0 else 0
        return self.status != 0

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_followed_file(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The place in the file, and an answer under way."""
    monkeypatch.setattr(terminal, "Interrupt", Asked)
    monkeypatch.setattr(Tail, "wait", lambda _: setattr(Asked, "left", 0))
    log, good, bad = tmp_path / "log", tmp_path / "good", tmp_path / "bad"
    log.write_text("the cat\n@\nthe dog\n@\n")
    follow = ["--follow", str(log), "--marker", "@", "-m", "8", "--ignore-eos"]
    Asked.left = 5
    run("--session", str(good), *OPTIONS, *follow)
    place = store.read(good)[0]["note"]["place"]
    assert place["follow"]["answering"]
    assert 0 < place["made"] < 8

    def go_on() -> None:
        Asked.left = 50
        run("--session", str(bad), *follow)

    counts = forge_all(good, bad, ("note",), go_on, below=("note", "place"))
    assert counts[True] > 80
    assert counts[False] > 8


def test_caches(loaded: Loaded, tmp_path: Path):
    """The state of a ring: its integers and its arrays."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    model, tokenizer = loaded.model, loaded.tokenizer
    mlx_sink.attach(model, SinkConfig(4, 20, epoch=32, rollback=2))
    stream = Stream(model, tokenizer, seed=1)
    stream.feed("the cat and the dog went to the sea " * 2)
    stream.rollback(1)
    stream.save(good)

    def go_on() -> None:
        stream = Stream.resume(bad, model, tokenizer)
        assert len(list(stream.generate(3, ignore_eos=True))) == 3

    counts = forge_all(good, bad, ("caches",), go_on, below=("caches", 0))
    assert counts[True] > 200
    assert counts[False] > 3
