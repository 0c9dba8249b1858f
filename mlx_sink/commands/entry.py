"""Run a command by its name; nothing heavy is imported before the name is known."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from mlx_sink import __version__
from mlx_sink.commands.options import program
from mlx_sink.io import terminal

COMMANDS = {
    "generate": ("generate.command", "read a text of any length, stream text for ever"),
    "convert": ("convert.command", "convert a Hugging Face checkpoint, measure its settings"),
    "plan": ("plan", "what a model will cost, before it is downloaded"),
    "compare": ("compare.command", "methods side by side on your text and machine"),
    "doctor": ("doctor.command", "are the kernels right on this machine, and how fast"),
}
"""Module below `mlx_sink.commands`, and what it does in a line."""

USAGE = "\n".join(
    [
        "usage: mlx-sink COMMAND [OPTIONS], or python -m mlx_sink COMMAND [OPTIONS]",
        "",
        "Endless generation in constant memory for MLX and mlx-lm.",
        "",
        *(f"  {name:10}{line}" for name, (_, line) in COMMANDS.items()),
        "",
        "mlx-sink COMMAND --help says what a command takes.",
    ]
)


def command(name: str) -> ModuleType:
    """Import and return the module of a command: it has a ``parser`` and a ``main``."""
    return import_module(f"mlx_sink.commands.{COMMANDS[name][0]}")


def run(name: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and leave with its exit status.

    Args:
        name: One of `COMMANDS`.
        argv: Its arguments; those of the process unless stated.
    """

    def main() -> int:
        # Within the guard: the imports take a second, and Ctrl-C may come in it.
        return command(name).main(argv)

    terminal.run(main, program(name))


def main() -> NoReturn:
    """Run ``mlx-sink COMMAND ...``."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        terminal.run(lambda: _say(USAGE), "mlx-sink")
    if name in ("--version", "version"):
        terminal.run(lambda: _say(f"mlx_sink {__version__}"), "mlx-sink")
    if name not in COMMANDS:
        line = f"unknown command {name!r}: use one of {', '.join(COMMANDS)}"
        print(f"mlx-sink: error: {line}", file=sys.stderr)
        sys.exit(terminal.STATUS_ERROR)
    run(name, rest)


def _say(text: str) -> int:
    terminal.write(text + "\n")
    return 0
