"""Every error that mlx_sink raises; its message is one line that a user can act on."""

from __future__ import annotations

import re
import traceback
from pathlib import Path


class SinkError(ValueError):
    """Base of every error that mlx_sink raises on purpose.

    The message is one line: what was wrong, what it got, what would work. Line ends, which another
    library's message or a file's name may have brought along, become spaces.
    """

    def __init__(self, message: str = ""):
        super().__init__(re.sub(r"\s*[\r\n]\s*", " ", message))


class ConfigError(SinkError):
    """A setting is out of range, or two settings contradict each other."""


class InputError(SinkError):
    """Text, tokens or a file given as input cannot be used."""


class OutputError(SinkError):
    """A result cannot be written to where it should go."""


class SessionError(SinkError):
    """A saved session is damaged, foreign, or of another model or stream."""


class ModelError(SinkError):
    """A model cannot be found, is damaged, or is incomplete."""


class UnsupportedModelError(SinkError):
    """A model loads, but the contract cannot be kept for it."""


class CacheError(SinkError):
    """A cache was used in a way that would give wrong results."""


class KernelError(SinkError):
    """A kernel was called with arrays that it cannot serve."""


LONGEST = 400
"""Characters of another library's message that are shown at the most."""


def one_line(error: BaseException) -> str:
    """Return an error's kind and what it says, all of its lines as one.

    mlx-lm names missing weights, Jinja the place, and the hub's client the remedy, in lines after
    the first. A message that is longer than `LONGEST` is cut between two words; one that says
    nothing is replaced by the place in the code.
    """
    text = " ".join(str(error).split())
    if len(text) > LONGEST:
        text = text[:LONGEST].rpartition(" ")[0].rstrip(",;:") + " ..."
    if not text and (trace := traceback.extract_tb(error.__traceback__)):
        text = f"in line {trace[-1].lineno} of {Path(trace[-1].filename).name}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
