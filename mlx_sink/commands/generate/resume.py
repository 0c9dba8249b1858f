"""A command's session: what it was made with, and a turn that a restart goes on with."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_sink.commands.generate.autosave import Runner
from mlx_sink.commands.generate.follow import check_place
from mlx_sink.commands.options import Parser, recall_settings, text_of
from mlx_sink.errors import ConfigError, SessionError
from mlx_sink.stream import session
from mlx_sink.stream.loop import Progress
from mlx_sink.stream.session import Saved, natural

OTHERS = ("seed", "stop", "extra_eos_token", "ignore_eos")
"""Options besides those of sampling on which the text depends."""


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings besides those of sampling on which the text depends, JSON-ready."""
    return {name: getattr(args, name) for name in OTHERS}


def restore(args: argparse.Namespace, stated: dict[str, Any], parser: Parser) -> Saved | None:
    """Read the session, and put the settings that it was made with into the arguments.

    Args:
        args: The parsed arguments; changed.
        stated: Those that were `given`.
        parser: The command's.

    Returns:
        The session; ``None`` if there is no such file yet.

    Raises:
        SessionError: The file is unsound, or not a command's.
        ConfigError: An option contradicts it.
    """
    path = Path(args.session)
    if not path.exists():
        return None
    saved = session.read(path)
    made_with = _checked(saved, parser)
    for name, value in made_with.items():
        if stated.get(name, value) != value:
            _refuse(path, name, value, stated[name])
        setattr(args, name, value)
    stated = stated | {n: v for n, v in recall_settings(args).items() if n in stated}
    for name, value in asdict(saved.config).items():
        pinned = name == "num_sinks" and args.pin_system_prompt
        if stated.get(name, value) != value and not pinned:
            _refuse(path, name, value, stated[name])
    return saved


def _checked(saved: Saved, parser: Parser) -> dict[str, Any]:
    """Return the settings that a session was made with, of which a program's may have none.

    Raises:
        SessionError: They, or the place, are not what a command notes: the sum of the file says
            only that it is whole.
    """
    try:
        _check_place(saved.note.get("place", {}))
        made_with = saved.note.get("settings", {})
        return {name: parser.value_of(name, value) for name, value in made_with.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise SessionError(f"session {str(saved.path)!r} is not one of this command") from None


def _check_place(place: dict[str, Any]) -> None:
    """Raise some kind of error unless it is what `Runner` notes, and its commands with it."""
    checks: dict[str, Callable[[Any], object]] = {
        **dict.fromkeys(("read", "made", "written"), natural),
        "ended": _check_flag,
        "unshown": text_of,
        "turn": _check_turn,
        "follow": check_place,
    }
    for name, value in place.items():
        checks[name](value)


def _check_turn(turn: dict[str, Any]) -> None:
    """Raise some kind of error unless it is a `_turn`."""
    checks: dict[str, Callable[[Any], object]] = {
        "question": lambda value: value is None or text_of(value),
        **dict.fromkeys(("first", "ended", "over"), _check_flag),
        "max_tokens": lambda value: value == -1 or natural(value),
        "total": natural,
    }
    if turn.keys() != checks.keys():
        raise ValueError(turn)
    for name, value in turn.items():
        checks[name](value)


def _check_flag(value: object) -> None:
    if type(value) is not bool:
        raise ValueError(value)


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
    *,
    recall: bool | None = None,
) -> None:
    """Read and answer; go on with the turn that was broken off if it is the same one.

    Args:
        runner: Reads, answers and saves.
        question: Its `name_of`; ``None`` to write on.
        tokens: Renders it, given whether it is the first, and whether an end-of-text token
            stands before it.
        progress: As in `Stream.feed`.
        recall: As in `Stream.feed`.

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
            runner.read(rest, progress, recall=recall)
    elif place["read"] < turn["total"] or stream.position == 0:
        raise ConfigError("the session stopped while it read its prompt: give the prompt again")
    if not runner.interrupted() and runner.answer() is not None:
        turn["over"] = True
