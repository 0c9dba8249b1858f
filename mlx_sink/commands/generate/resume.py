"""A command's session: what it was made with, and a turn that a restart goes on with."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from mlx_sink.commands.generate.autosave import SAVE_EVERY, Runner
from mlx_sink.commands.numbers import add_integer
from mlx_sink.config import SinkConfig
from mlx_sink.errors import ConfigError, SessionError, SinkError
from mlx_sink.stream import session
from mlx_sink.stream.loop import Progress
from mlx_sink.stream.session import Described

OTHERS = ("seed", "stop", "extra_eos_token", "ignore_eos")
"""Options besides those of sampling on which the text depends."""


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    p.add_argument(
        "--session",
        metavar="FILE",
        help="save everything here as it goes, and go on from it if it exists, exactly",
    )
    add_integer(
        p,
        "--save-every",
        least=1,
        default=SAVE_EVERY,
        help="with --session: tokens between two saves",
    )


def given(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the options that were given, without defaults."""
    unset = object()
    names = vars(p.parse_args([]))
    parsed = p.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name: value for name, value in vars(parsed).items() if value is not unset}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings besides those of sampling on which the text depends, JSON-ready."""
    return {name: getattr(args, name) for name in OTHERS}


def restore(
    args: argparse.Namespace, stated: dict[str, Any], defaults: dict[str, Any]
) -> Described | None:
    """Read what the session says of itself, and put its settings into the arguments.

    Args:
        args: The parsed arguments; changed.
        stated: Those that were `given`.
        defaults: What they are when not given.

    Returns:
        The session; ``None`` if there is no such file yet.

    Raises:
        SessionError: The file is unsound, or not a command's.
        ConfigError: An option contradicts it.
    """
    path = Path(args.session)
    if not path.exists():
        return None
    found = session.described(path)
    config, note, _ = found
    made_with = note.get("settings", {})
    _check(path, config, note, defaults)
    for name, value in made_with.items():
        if stated.get(name, value) != value:
            _refuse(path, name, value, stated[name])
        setattr(args, name, value)
    for name, value in config.items():
        pinned = name == "num_sinks" and args.pin_system_prompt
        if stated.get(name, value) != value and not pinned:
            _refuse(path, name, value, stated[name])
    return found


def _check(
    path: Path, config: dict[str, Any], note: dict[str, Any], defaults: dict[str, Any]
) -> None:
    """Raise unless the note is one of ours: its sum says only that it is whole."""
    made_with, place = note.get("settings", {}), note.get("place", {})
    try:
        SinkConfig.from_dict(config)
        sound = all(_is_like(value, defaults[name]) for name, value in made_with.items())
        counts = [place.get(name, 0) for name in ("read", "made", "written")]
        sound &= all(type(n) is int and n >= 0 for n in counts)
        turn = place.get("turn")
        sound &= turn is None or (turn.keys() == _turn(None, False, False, 1).keys())
    except (SinkError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise SessionError(f"session {str(path)!r} is not one of this command")


def _is_like(value: object, default: object) -> bool:
    if default is None:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    if isinstance(value, list):
        return type(default) is list and all(isinstance(v, str) for v in cast("list[Any]", value))
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def _refuse(path: Path, name: str, made_with: object, stated: object) -> None:
    flag = f"--{name.replace('_', '-')}"
    was = f"with {flag} {made_with}" if made_with not in (None, False) else f"without {flag}"
    raise ConfigError(
        f"session {str(path)!r} was made {was}, not {stated}: leave {flag} out, or name another "
        "session"
    )


def name_of(*parts: object) -> str:
    """Return a sum by which a turn is known again."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _turn(question: str | None, first: bool, ended: bool, max_tokens: int) -> dict[str, Any]:
    """Return a new turn.

    Its keys: which question, whether it begins the stream or follows an end-of-text token, the
    tokens of the answer and those to be read, and whether it is over.
    """
    return {
        "question": question,
        "first": first,
        "ended": ended,
        "max_tokens": max_tokens,
        "total": 0,
        "over": False,
    }


def take(
    runner: Runner,
    question: str | None,
    tokens: Callable[[bool, bool], Sequence[int]],
    progress: Progress,
) -> None:
    """Read and answer; go on with the turn that was broken off if it is the same one.

    Args:
        runner: Reads, answers and saves.
        question: Its `name_of`; ``None`` to write on.
        tokens: Renders it, given whether it is the first, and whether an end-of-text token
            stands before it.
        progress: As in `Stream.feed`.

    Raises:
        ConfigError: There is nothing to write on from.
    """
    place, stream, limit = runner.place, runner.stream, runner.answering.max_tokens
    turn = place.get("turn")
    if (
        turn is None
        or turn["over"]
        or turn["max_tokens"] != limit
        or question not in (None, turn["question"])
    ):
        turn = _turn(question, stream.position == 0, place["ended"], limit)
        if question is not None:
            runner.show(stream.flush())
        place.update(turn=turn, read=0, made=0)
    if question is not None:
        rest = list(tokens(turn["first"], turn["ended"]))
        turn["total"] = len(rest)
        if rest := rest[place["read"] :]:
            runner.read(rest, progress)
    elif place["read"] < turn["total"] or stream.position == 0:
        raise ConfigError("the session stopped while it read its prompt: give the prompt again")
    if not runner.interrupted() and runner.answer() is not None:
        turn["over"] = True
