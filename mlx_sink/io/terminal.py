"""How a command meets its terminal: exit status, errors, output, signals, progress bars."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NoReturn

from tqdm import tqdm

from mlx_sink.errors import OutputError, SinkError

STATUS_ERROR = 2
STATUS_INTERRUPTED = 130
STATUS_CLOSED_PIPE = 141


def run(main: Callable[[], int], prog: str) -> NoReturn:
    """Run a command and leave with its exit status.

    A `SinkError` becomes one line on stderr and status 2; so does output that cannot be
    written. A closed pipe ends quietly, Ctrl-C with status 130.
    """
    if sys.stderr is None:  # closed by whoever called: print would take stdout in its place
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - it stays open until the end
    try:
        if sys.stdout is None:
            raise OutputError("cannot write the output: standard output is closed")
        status = main()
    except SinkError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        status = STATUS_ERROR
    except KeyboardInterrupt:
        status = STATUS_INTERRUPTED
    except BrokenPipeError:
        status = STATUS_CLOSED_PIPE
    sys.exit(status)


def write(text: str) -> None:
    """Write to stdout at once; a character that its encoding lacks becomes a question mark.

    Raises:
        BrokenPipeError: The reader is gone.
        OutputError: The output cannot be written.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except OSError as error:
        # Python writes what is left in its buffer once more when it exits: to nowhere, then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(f"cannot write the output: {error.strerror or error}") from None


class Interrupt:
    """A flag that Ctrl-C, SIGTERM or a closed terminal sets; commands ask for it between tokens.

    Within the ``with`` block the first signal only sets the flag, so that no step is interrupted
    half-way; a second Ctrl-C or SIGTERM interrupts at once. A terminal that closes may send its
    signal twice.

    Attributes:
        status: The exit status to leave with: 0 while no signal has arrived.
    """

    def __init__(self) -> None:
        self.status = 0

    def __call__(self) -> bool:
        """Return whether a signal has arrived."""
        return self.status != 0

    def _note(self, number: int, _: object) -> None:
        if self.status and number != signal.SIGHUP:
            raise KeyboardInterrupt
        self.status = self.status or 128 + number

    def __enter__(self) -> Interrupt:
        """Install the signal handlers."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup wants it ignored
            numbers.append(signal.SIGHUP)
        self._before = {n: signal.signal(n, self._note) for n in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the handlers of before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


_for_machines = False


@contextmanager
def notes_as_json(on: bool) -> Generator[None]:
    """Within the block, if it is on, stderr is for a machine: JSON, an object a line.

    What `say` says is left out: the command's result holds it. A warning is an object of its own.
    """
    global _for_machines
    before, _for_machines = _for_machines, on
    try:
        yield
    finally:
        _for_machines = before


def say(line: str) -> None:
    """Tell the person at the terminal something; output is what goes to stdout."""
    if not _for_machines:
        print(line, file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Say something that does not end the run."""
    text = json.dumps({"warning": line}) if _for_machines else f"warning: {line}"
    print(text, file=sys.stderr, flush=True)


def bar(total: float | None, what: str, unit: str, **options: Any) -> tqdm[Any]:
    """Return a progress bar on stderr that is erased when it is closed.

    Where stderr is not a terminal each update is a line of its own, one every ten seconds.

    Args:
        total: Units in all.
        what: A word for the work.
        unit: What is counted.
        options: Further options of tqdm.
    """
    pace = 0.2 if sys.stderr.isatty() else 10.0
    options = {"disable": _for_machines} | options
    return tqdm(total=total, desc=what, unit=unit, mininterval=pace, leave=False, **options)
