"""A comparison that was stopped, in a file, and gone on with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sink.errors import InputError, SessionError
from mlx_sink.io import tensors as store
from mlx_sink.io.tensors import pack, unpack
from mlx_sink.measure.comparison import Arm, Comparison

PLAIN = ("sampled", "at", "seconds", "bucket", "workspace", "stopped", "position")
"""What is saved of an arm beside its losses and caches."""


def save(path: Path, run: Comparison, key: dict[str, Any], recall: list[dict[str, Any]]) -> None:
    """Write where a run stands; see `store.write`.

    Args:
        path: The file.
        run: The run, between two steps.
        key: What the run is of: another run refuses the file.
        recall: What has been asked so far; then the caches are done with.

    Raises:
        OutputError: It cannot be written.
    """
    arrays: dict[str, mx.array] = {}
    held: dict[str, Any] = {}
    for name, arm in run.arms.items():
        arrays[f"losses.{name}"] = mx.array(arm.all_losses())
        held[name] = {part: getattr(arm, part) for part in PLAIN}
        kept = [] if recall else arm.caches
        held[name]["caches"] = [
            pack(cache.state, f"{name}.{i}", arrays) for i, cache in enumerate(kept)
        ]
    store.write(path, {"key": key, "arms": held, "recall": recall}, arrays)


def restore(path: Path, run: Comparison, key: dict[str, Any]) -> list[dict[str, Any]]:
    """Put a new run where one was stopped.

    Returns:
        What had been asked by then.

    Raises:
        InputError: The file is unsound, or of another run.
    """
    try:
        note, arrays = store.read(path)
        if note["key"] != key:
            mine, theirs = key, dict(note["key"])
            differs = [name for name in mine if theirs.get(name) != mine[name]]
            raise InputError(
                f"{str(path)!r} is of another run ({', '.join(differs)} differ): "
                "remove it, or name another --output"
            )
        for name, arm in run.arms.items():
            _restore(arm, note["arms"][name], arrays, f"losses.{name}")
        return list(note["recall"])
    except InputError:
        raise
    except (SessionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"cannot go on from {str(path)!r}, remove it: {error}") from None


def _restore(arm: Arm, held: dict[str, Any], arrays: dict[str, mx.array], losses: str) -> None:
    for part in PLAIN:
        setattr(arm, part, held[part])
    arm.losses = [np.array(arrays[losses])]
    for cache, state in zip(arm.caches, held["caches"], strict=False):
        cache.state = unpack(state, arrays)


def key_of(settings: Any, **more: Any) -> dict[str, Any]:
    """Return what a run is of, JSON-ready."""
    plain = asdict(settings)
    return {**plain, "arms": list(plain["arms"]), "lengths": list(plain["lengths"]), **more}
