"""What the commands share: options, one-line errors, exit statuses."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from mlx_sink.config import (
    DEFAULT_GROUP_SIZE,
    DEFAULT_NUM_SINKS,
    DEFAULT_WINDOW,
    NUM_DRAFT_TOKENS,
)
from mlx_sink.errors import OutputError, SinkError

STATUS_ERROR = 2
STATUS_INTERRUPTED = 130
STATUS_CLOSED_PIPE = 141


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        line = " ".join(message.split())
        self.exit(STATUS_ERROR, f"{self.prog}: error: {line} (see {self.prog} --help)\n")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model to load, spelled as mlx-lm spells them."""
    parser.add_argument(
        "--model",
        default="demo",
        help="a model folder, a Hugging Face repository, or 'demo' (default) for the small "
        "model inside this package",
    )
    parser.add_argument("--adapter-path", help="a folder with trained adapter weights")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the model or its tokenizer (default: never)",
    )


def add_sink_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the stream keeps."""
    parser.add_argument(
        "--num-sinks",
        type=int,
        help="first tokens that are never evicted (default: as the model's config.json says, or "
        f"{DEFAULT_NUM_SINKS})",
    )
    parser.add_argument(
        "--window",
        type=int,
        help="newest tokens that stay visible (default: as the model's config.json says, or "
        f"{DEFAULT_WINDOW}, or as many as its trained context holds)",
    )


def add_kv_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of quantised rings, spelled as mlx-lm spells them."""
    kinds = (("kv", "keys and values"), ("k", "keys alone"), ("v", "values alone"))
    for name, what in kinds:
        parser.add_argument(
            f"--{name}-bits",
            type=int,
            help=f"bits to quantise the cache's {what} to, 8 or 4 (default: the model's dtype)",
        )
    parser.add_argument(
        "--kv-group-size",
        type=int,
        default=DEFAULT_GROUP_SIZE,
        help=f"elements that share a scale: 32, 64 or 128 ({DEFAULT_GROUP_SIZE})",
    )


def kv_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options say, as `SinkConfig` takes it."""
    return {name: getattr(args, name) for name in ("kv_bits", "k_bits", "v_bits", "kv_group_size")}


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of speculative decoding, spelled as mlx-lm spells them."""
    parser.add_argument(
        "--draft-model",
        help="a smaller model of the same family that guesses tokens ahead: the same text, sooner",
    )
    parser.add_argument(
        "--num-draft-tokens", type=int, help=f"tokens guessed at once ({NUM_DRAFT_TOKENS})"
    )


def run(main: Callable[[], int], prog: str) -> NoReturn:
    """Run a command and leave with its exit status.

    A `SinkError` becomes one line on stderr and status 2; so does output that cannot be
    written. A closed pipe ends quietly, Ctrl-C with status 130.
    """
    try:
        status = main()
    except SinkError as error:
        line = " ".join(str(error).split())
        print(f"{prog}: error: {line}", file=sys.stderr)
        status = STATUS_ERROR
    except KeyboardInterrupt:
        status = STATUS_INTERRUPTED
    except BrokenPipeError:
        status = STATUS_CLOSED_PIPE
    sys.exit(status)


def write(text: str) -> None:
    """Write to stdout at once.

    Raises:
        BrokenPipeError: The reader is gone.
        OutputError: The output cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Python writes what is left in its buffer once more when it exits: to nowhere, then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputError(f"cannot write the output: {error.strerror or error}") from None


class Interrupt:
    """Ctrl-C, or a polite kill, as a question that is asked between tokens.

    Within the ``with`` block the first one is only noted, so that nothing breaks off half-way;
    the second one interrupts at once.

    Attributes:
        status: The exit status it asks for: 0 while there was none.
    """

    def __init__(self) -> None:
        self.status = 0

    def __call__(self) -> bool:
        """Tell whether there was one."""
        return self.status != 0

    def _note(self, number: int, _: object) -> None:
        if self.status:
            raise KeyboardInterrupt
        self.status = 128 + number

    def __enter__(self) -> Interrupt:
        """Begin to listen."""
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        """Put back what was there."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
