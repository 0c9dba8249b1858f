"""``--report FILE``: what the authors need to know of a Mac, and nothing about its owner."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from mlx_sink.attention.kernels import source, trust
from mlx_sink.commands.doctor.examine import Examination
from mlx_sink.commands.doctor.models import Conditions, ShapeResult
from mlx_sink.errors import OutputError
from mlx_sink.io import terminal
from mlx_sink.io.atomic import write_whole
from mlx_sink.measure import machine

FORMAT = 1
"""Version of the report's keys."""

_PATH = re.compile(r"(?<![\w.~/-])~?/(?:[^'\":]*/)?[^\s'\"():]*")
"""An absolute path, whose folders may have spaces in their names."""


def check_path(path: Path) -> None:
    """Raise unless a report can be written to a path: better before the work than after it.

    Raises:
        OutputError: It is a folder, or its folder does not exist or cannot be written.
    """
    if path.is_dir():
        raise OutputError(f"--report must be a file, got the folder {str(path)!r}")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise OutputError(f"--report {str(path)!r}: the folder {str(folder)!r} does not exist")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"--report {str(path)!r}: the folder {str(folder)!r} cannot be written")


def write(
    path: Path, examination: Examination, conditions: Conditions, shapes: list[ShapeResult]
) -> None:
    """Write a report, whole or not at all, and say on stderr where it is.

    Raises:
        OutputError: It cannot be written.
    """
    text = json.dumps(to_dict(examination, conditions, shapes), allow_nan=False)
    facts = json.loads(text, object_hook=_anonymous)
    write_whole(path, (json.dumps(facts, indent=1) + "\n").encode())
    terminal.say(f"wrote {path}: please attach it to an issue; it names no person, host or path")


def to_dict(
    examination: Examination, conditions: Conditions, shapes: list[ShapeResult]
) -> dict[str, Any]:
    """Return a report as a JSON-ready dictionary."""
    results = examination.to_dict()
    return {
        "format": FORMAT,
        "machine": _machine(),
        "kernels_can_run": source.is_available(),
        "note": ""
        if source.is_available()
        else "The kernels cannot run here: MLX has no Metal and no CUDA. The times are those of "
        "the plain operations and of MLX's own attention.",
        "backend": results["backend"],
        "ring": results["ring"],
        "decode": results["kernels"],
        "prefill": results["prefill"],
        "stored_verdicts": results["kept"],
        "models": {
            **conditions.to_dict(),
            "shapes": [shape.to_dict() for shape in shapes],
        },
    }


def _machine() -> dict[str, Any]:
    mac = platform.mac_ver()[0]
    gpu = trust.machine() if source.is_available() else {}
    return {
        "chip": machine.processor(),
        "gpu": gpu.get("gpu", ""),
        "gpu_architecture": gpu.get("architecture", ""),
        "memory_bytes": machine.memory(),
        "cpu_cores": os.cpu_count(),
        "system": f"macOS {mac}" if mac else platform.system(),
        "python": platform.python_version(),
        **machine.versions(),
        "kernel_text": source.stamp(*source.names()),
    }


def _anonymous(facts: dict[str, Any]) -> dict[str, Any]:
    """Return a result whose reason names no path, user or host: messages of MLX may."""
    if "reason" not in facts:
        return facts
    home, node = Path.home(), platform.node()
    reason = _PATH.sub("PATH", facts["reason"].replace(str(home), "~"))
    for name in {home.name, node, node.partition(".")[0]} - {""}:
        reason = re.sub(rf"\b{re.escape(name)}\b", "NAME", reason)
    return {**facts, "reason": reason}
