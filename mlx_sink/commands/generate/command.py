"""``python -m mlx_sink.generate``: read a text of any length, stream text for ever."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from mlx_sink.commands.generate.options import PROG, parse, parser
from mlx_sink.io import lock, terminal

__all__ = ["PROG", "main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0, or 130 after Ctrl-C, which is no more than the end of `--follow`; errors are raised.
    """
    args, stated = parse(argv)
    with terminal.notes_as_json(args.json), _locked(args.session):
        # Only now: these import mlx-lm and transformers, which takes seconds.
        from mlx_sink.commands.generate.run import Run
        from mlx_sink.commands.generate.statistics import summary

        run = Run(args, stated)
        with terminal.Interrupt() as interrupt:
            try:
                run.go(interrupt)
            finally:
                run.close()
        statistics = run.statistics()
    print(json.dumps(statistics) if args.json else summary(statistics, PROG), file=sys.stderr)
    ended = args.follow is not None and interrupt.status == terminal.STATUS_INTERRUPTED
    return 0 if ended else interrupt.status


def _locked(session: str | None) -> AbstractContextManager[None]:
    """Keep other processes off the session, if there is one, while the command runs."""
    if session is None:
        return nullcontext()
    return lock.holding(Path(session), f"session {session!r}", warn=terminal.warn)
