"""The file that an interrupted comparison is resumed from.

The keys in it are older than the names here: ``arms`` are the methods, ``recall`` the scores of
the needle tests. Files of earlier versions are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_sink.errors import InputError, SessionError
from mlx_sink.io import records, tensors
from mlx_sink.measure.comparison.results import Measurement, Score
from mlx_sink.measure.comparison.run import Comparison, ComparisonSettings, MethodRun


@dataclass(frozen=True, slots=True)
class _State:
    """What is saved of a `MethodRun` beside its losses and caches; attributes as there."""

    sampled: tuple[int, ...]
    at: tuple[Measurement, ...]
    seconds: float
    bucket: tuple[float, ...]
    workspace: int
    stopped: str | None
    position: int

    @classmethod
    def of(cls, run: MethodRun) -> _State:
        return cls(
            sampled=tuple(run.sampled),
            at=tuple(run.at),
            seconds=run.seconds,
            bucket=(run.bucket_tokens, run.bucket_seconds),
            workspace=run.workspace,
            stopped=run.stopped,
            position=run.position,
        )


def key_of(settings: ComparisonSettings, **more: Any) -> dict[str, Any]:
    """Return what tells one comparison from another, JSON-ready: its settings, and more."""
    values = asdict(settings) | {"config": settings.config.to_dict()}
    values["arms"] = list(values.pop("methods"))
    return {**values, "lengths": list(settings.lengths), **more}


def save(path: Path, comparison: Comparison, key: dict[str, Any], scores: Sequence[Score]) -> None:
    """Save a comparison; see `tensors.write`.

    Args:
        path: The file.
        comparison: The comparison, between two steps.
        key: From `key_of`.
        scores: Of the needle tests so far. They come last: the caches are then left out.

    Raises:
        OutputError: It cannot be written.
    """
    arrays: dict[str, mx.array] = {}
    states: dict[str, Any] = {}
    for name, run in comparison.runs.items():
        arrays[f"losses.{name}"] = mx.array(run.all_losses())
        caches = [] if scores else run.caches
        packed = [
            tensors.pack(cache.state, f"{name}.{i}", arrays) for i, cache in enumerate(caches)
        ]
        states[name] = {**records.to_dict(_State.of(run)), "caches": packed}
    recall = [records.to_dict(score) for score in scores]
    tensors.write(path, {"key": key, "arms": states, "recall": recall}, arrays)


def restore(path: Path, comparison: Comparison, key: dict[str, Any]) -> list[Score]:
    """Put a new comparison where a saved one stood.

    Args:
        path: The file.
        comparison: The comparison, which has not made a step yet.
        key: From `key_of`.

    Returns:
        The scores of the needle tests so far.

    Raises:
        InputError: The file is damaged, or of another comparison.
    """
    problem = f"cannot resume from {str(path)!r}, remove it"
    try:
        note, arrays = tensors.read(path)
    except SessionError as error:
        raise InputError(f"{problem}: {error}") from None
    saved = note.get("key")
    if saved != key:
        other = cast("dict[str, Any]", saved) if isinstance(saved, dict) else {}
        differing = [name for name in key if other.get(name) != key[name]]
        raise InputError(
            f"{str(path)!r} is of another run ({', '.join(differing)} differ): "
            "remove it, or name another --output"
        )
    try:
        for name, run in comparison.runs.items():
            _restore(run, note["arms"][name], arrays)
        return [records.from_dict(Score, score) for score in note["recall"]]
    except InputError as error:
        raise InputError(f"{problem}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        # The file is sound, but somebody else has made it.
        raise InputError(f"{problem}: it holds no comparison") from None


def _restore(run: MethodRun, values: dict[str, Any], arrays: dict[str, mx.array]) -> None:
    state = records.from_dict(_State, values)
    losses = np.array(arrays[f"losses.{run.name}"])
    if losses.shape != (state.position,):
        raise InputError(f"it has {losses.size} losses of {run.name}, not {state.position}")
    run.losses, run.position = [losses], state.position
    run.sampled, run.at = list(state.sampled), list(state.at)
    run.seconds, run.workspace, run.stopped = state.seconds, state.workspace, state.stopped
    run.bucket_tokens, run.bucket_seconds = state.bucket
    if values["caches"]:
        for cache, packed in zip(run.caches, values["caches"], strict=True):
            cache.state = tensors.unpack(packed, arrays)
