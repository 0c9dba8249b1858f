"""Options that several commands share, and a parser whose errors are one line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn, cast

from mlx_sink.commands.numbers import add_integer
from mlx_sink.config import (
    ASKED,
    BITS,
    DEFAULT_GROUP_SIZE,
    DEFAULT_NUM_SINKS,
    DEFAULT_RECALL_BLOCK,
    DEFAULT_WINDOW,
    GROUP_SIZES,
    NUM_DRAFT_TOKENS,
    RECALL_BITS,
    RECALL_BLOCKS,
    RECALL_MODES,
)
from mlx_sink.io.terminal import STATUS_ERROR
from mlx_sink.io.units import parse_bytes


def program(command: str) -> str:
    """Return how a command was called, as its messages name it."""
    script = Path(sys.argv[0]).name if sys.argv else ""
    return f"mlx-sink {command}" if script == "mlx-sink" else f"python -m mlx_sink.{command}"


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with status 2."""
        line = " ".join(message.split())
        self.exit(STATUS_ERROR, f"{self.prog}: error: {line} (see {self.prog} --help)\n")

    def value_of(self, name: str, value: Any) -> Any:
        """Return an option's value that a file holds, if the command line could have given it.

        Args:
            name: The option, as `parse_args` names it.
            value: From JSON.

        Raises:
            ValueError: It is of another type, or out of range.
            KeyError: There is no such option.
        """
        option = {action.dest: action for action in self._actions}[name]
        if value is None and option.default is None:
            return None
        if option.nargs == 0 and type(value) is bool:
            return value
        if option.nargs == "+" and type(value) is list:
            return [text_of(item) for item in cast("list[object]", value)]
        if callable(option.type) and type(value) in (int, float):
            try:
                return option.type(repr(value))
            except argparse.ArgumentTypeError as error:
                raise ValueError(str(error)) from None
        raise ValueError(value)


def text_of(value: object) -> str:
    """Return a value that is text.

    Raises:
        ValueError: It is none. Bytes that are no UTF-8 come as halves of pairs: nobody can write
            them.
    """
    if type(value) is not str:
        raise ValueError(value)
    value.encode()
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model to load, spelled as mlx-lm spells them."""
    parser.add_argument(
        "--model",
        default="demo",
        help="a model folder, a file of GGUF, a Hugging Face repository, or 'demo' (default) for "
        "the small model inside this package",
    )
    parser.add_argument("--adapter-path", help="a folder with trained adapter weights")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the model or its tokenizer (default: never)",
    )


def add_sink_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the stream keeps."""
    add_integer(
        parser,
        "--num-sinks",
        least=0,
        usual=f"as the model's config.json says, or {DEFAULT_NUM_SINKS}",
        help="first tokens that are never evicted",
    )
    add_integer(
        parser,
        "--window",
        least=1,
        usual=f"as the model's config.json says, or {DEFAULT_WINDOW}, or as many as its trained "
        "context holds",
        help="newest tokens that stay visible",
    )


def add_kv_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of quantised rings, spelled as mlx-lm spells them."""
    kinds = (("kv", "keys and values"), ("k", "keys alone"), ("v", "values alone"))
    for name, what in kinds:
        parser.add_argument(
            f"--{name}-bits",
            type=int,
            choices=BITS,
            help=f"bits to quantise the cache's {what} to, 8 or 4 (default: the model's dtype)",
        )
    parser.add_argument(
        "--kv-group-size",
        type=int,
        choices=GROUP_SIZES,
        default=DEFAULT_GROUP_SIZE,
        help=f"elements that share a scale: 32, 64 or 128 ({DEFAULT_GROUP_SIZE})",
    )


def kv_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options say, as `SinkConfig` takes it."""
    return {name: getattr(args, name) for name in ("kv_bits", "k_bits", "v_bits", "kv_group_size")}


def add_recall_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what of the evicted tokens can be looked up."""
    add_integer(
        parser,
        "--recall",
        least=0,
        default=0,
        help="evicted tokens that a token may look up beside what it sees, such as 256: what "
        "leaves the window is then kept in an archive",
    )
    parser.add_argument(
        "--recall-memory",
        metavar="BYTES",
        help="what the archive may hold, 2GB by default; the oldest goes when it is full",
    )
    parser.add_argument(
        "--recall-mode",
        choices=RECALL_MODES,
        default=ASKED,
        help="who looks up: 'asked', the tokens of --prompt and of the answers (default), or "
        "'always', those of files too",
    )
    parser.add_argument(
        "--recall-bits",
        type=_bits,
        default=RECALL_BITS,
        metavar="{8,4,none}",
        help=f"bits to quantise the archive to ({RECALL_BITS})",
    )
    parser.add_argument(
        "--recall-block",
        type=int,
        choices=RECALL_BLOCKS,
        default=DEFAULT_RECALL_BLOCK,
        help=f"tokens that are looked up together ({DEFAULT_RECALL_BLOCK})",
    )
    parser.add_argument(
        "--recall-layers",
        type=_layers,
        metavar="N,N,...",
        help="layers that look up (default: as the model's config.json says, or all)",
    )


def recall_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the options say, as `SinkConfig` takes it.

    Raises:
        ConfigError: ``--recall-memory`` is no number of bytes.
    """
    names = ("recall", "recall_mode", "recall_bits", "recall_block", "recall_layers")
    settings: dict[str, Any] = {name: getattr(args, name) for name in names}
    if args.recall_memory is not None:
        settings["recall_memory"] = parse_bytes(args.recall_memory, "--recall-memory")
    return settings


def _bits(text: str) -> int | None:
    if text == "none":
        return None
    if text not in map(str, BITS):
        raise argparse.ArgumentTypeError(f"must be 8, 4 or none, got {text!r}")
    return int(text)


def _layers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be layers such as 6,7,14, got {text!r}")
    return tuple(map(int, parts))


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of speculative decoding, spelled as mlx-lm spells them."""
    parser.add_argument(
        "--draft-model",
        help="a smaller model of the same family that guesses tokens ahead: the same text, sooner",
    )
    usual = str(NUM_DRAFT_TOKENS)
    what = "tokens guessed at once"
    add_integer(parser, "--num-draft-tokens", least=1, usual=usual, help=what)
