"""Options of `generate`, and what can be said of them before a model is loaded.

Nothing heavy is imported here: ``--help`` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from mlx_sink.commands.numbers import MAX_SEED, add_integer, add_real
from mlx_sink.commands.options import (
    Parser,
    add_draft_options,
    add_kv_options,
    add_model_options,
    add_recall_options,
    add_sink_options,
    kv_settings,
    program,
    recall_settings,
)
from mlx_sink.config import DEFAULT_WINDOW, NUM_DRAFT_TOKENS, PREFILL_STEP, SinkConfig
from mlx_sink.errors import ConfigError
from mlx_sink.io.units import parse_bytes

PROG = program("generate")

TEXTS = ("prompt", "system_prompt", "prefill_response", "stop", "extra_eos_token", "marker")
"""Options whose values are text, and not names of files."""

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
"""What a letter behind a backslash stands for in a text; any other stands for itself."""

SAVE_EVERY = 1024
"""Tokens after which a session is saved, unless stated."""

LONGEST_MARKER = 2048
"""Bytes of a marker: a longer line may come in pieces."""

CONTEXT = 20
"""Newest tokens that a penalty looks at unless stated, as in mlx-lm."""

MOST = 2**31 - 1
"""Tokens that a penalty looks at, at the most: MLX counts in 32 bits."""

PENALTIES = {
    "repetition": "logits of tokens that came up are divided by this",
    "presence": "taken from the logits of tokens that came up",
    "frequency": "taken from the logits of tokens for each time they came up",
}


def parser() -> Parser:
    """Return the command's argument parser."""
    p = Parser(
        prog=PROG,
        description="Read a prompt of any length and stream text for as long as you like, in "
        "constant memory. Text goes to stdout, everything else to stderr.",
    )
    add_model_options(p)
    text = p.add_mutually_exclusive_group()
    text.add_argument("--prompt", "-p", help="what to read first; '-' reads standard input")
    text.add_argument("--prompt-file", help="a UTF-8 text file to read first")
    p.add_argument("--system-prompt", help="system prompt for the chat template")
    p.add_argument("--prefill-response", help="how the answer is to begin")
    p.add_argument("--ignore-chat-template", action="store_true", help="use the prompt as it is")
    p.add_argument("--chat-template-config", help="variables of the chat template, as JSON")
    p.add_argument(
        "--allow-special-tokens",
        action="store_true",
        help="read control tokens such as <|im_end|> in the prompt or the followed file as such "
        "(default: as the text that they are)",
    )
    add_sink_options(p)
    add_kv_options(p)
    add_recall_options(p)
    p.add_argument(
        "--memory",
        metavar="BYTES",
        help="take the largest window that fits into so much, weights and workspace included: "
        "2GB, 512MiB",
    )
    p.add_argument(
        "--pin-system-prompt",
        action="store_true",
        help="make the whole rendered system prompt sinks, so that it is never forgotten",
    )
    what = "tokens to generate, -1 for ever"
    add_integer(p, "--max-tokens", "-m", least=1, besides=-1, default=100, help=what)
    p.add_argument(
        "--ignore-eos",
        action="store_true",
        help="write for ever: go on after an end-of-text token; in an answer of a chat model, "
        "never choose one",
    )
    p.add_argument(
        "--extra-eos-token", nargs="+", default=[], help="more tokens that end the text"
    )
    p.add_argument("--stop", nargs="+", default=[], help="strings that end the text")
    p.add_argument(
        "--show-special-tokens",
        action="store_true",
        help="print control tokens too (default: only text)",
    )
    _add_session(p)
    _add_follow(p)
    _add_sampling(p)
    add_draft_options(p)
    usual = "a new one each time"
    add_integer(
        p, "--seed", least=0, most=MAX_SEED, usual=usual, help="seed of the random numbers"
    )
    step = PREFILL_STEP
    add_integer(p, "--prefill-step-size", least=1, default=step, help="tokens read at once")
    p.add_argument(
        "--literal",
        action="store_true",
        help="take texts as they stand; otherwise \\n, \\t and \\\\ in them are a line's end, a "
        "tab and a backslash",
    )
    p.add_argument("--json", action="store_true", help="print the statistics as one JSON object")
    return p


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    r"""Parse a command line.

    In texts ``\n``, ``\t`` and ``\\`` stand for a line's end, a tab and a backslash, unless
    ``--literal`` is given.

    Returns:
        All options, and those that were stated.

    Raises:
        ConfigError: Options contradict each other, or a text is not UTF-8.
    """
    p, unset = parser(), object()
    defaults = vars(p.parse_args([]))
    parsed = p.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset)))
    stated = {name: value for name, value in vars(parsed).items() if value is not unset}
    if not stated.get("literal"):
        stated |= {name: _unescaped(stated[name]) for name in TEXTS if name in stated}
    args = argparse.Namespace(**(defaults | stated))
    check(args)
    return args, stated


def _unescaped(value: str | list[str]) -> str | list[str]:
    if isinstance(value, list):
        return [str(_unescaped(text)) for text in value]
    return re.sub(r"\\([nt\\])", lambda match: ESCAPES[match[1]], value)


def num_draft_tokens(args: argparse.Namespace) -> int:
    """Return the tokens that a draft model guesses at once."""
    return NUM_DRAFT_TOKENS if args.num_draft_tokens is None else args.num_draft_tokens


def check(args: argparse.Namespace) -> None:
    """Raise a `ConfigError` for options that do not go together, or that no model can take."""
    for name in TEXTS:
        _check_text(f"--{name.replace('_', '-')}", getattr(args, name))
    if args.num_draft_tokens is not None and args.draft_model is None:
        raise ConfigError("--num-draft-tokens needs --draft-model")
    SinkConfig(
        num_sinks=0 if args.num_sinks is None else args.num_sinks,
        window=DEFAULT_WINDOW if args.window is None else args.window,
        **kv_settings(args),
        **recall_settings(args),
    )
    if args.memory is not None:
        parse_bytes(args.memory)
    _check_follow(args)


def _check_text(flag: str, value: str | Sequence[str] | None) -> None:
    """Raise for bytes that are no UTF-8: they come as halves of pairs, and cannot be written."""
    for text in [value] if isinstance(value, str) else value or ():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{flag} must be UTF-8, got {text!a}") from None


def _check_follow(args: argparse.Namespace) -> None:
    if args.follow is None:
        if args.marker is not None:
            raise ConfigError("--marker needs --follow")
        return
    marker = args.marker
    if marker is None:
        raise ConfigError("--follow needs --marker LINE: the line at which to answer")
    if not marker.strip() or "\n" in marker or len(marker.encode()) > LONGEST_MARKER:
        raise ConfigError(f"--marker must be one short line that is not blank, got {marker!r}")
    if args.prompt_file is not None or args.prompt == "-" or args.prefill_response is not None:
        raise ConfigError("with --follow, the question is stated by --prompt TEXT")
    if args.max_tokens < 0 and args.ignore_eos:
        raise ConfigError("with --follow, an answer must end: leave --ignore-eos or -m -1 out")


def _add_session(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--session",
        metavar="FILE",
        help="save everything here as it goes, and go on from it if it exists, exactly",
    )
    add_integer(
        p,
        "--save-every",
        least=1,
        default=SAVE_EVERY,
        help="with --session: tokens between two saves",
    )


def _add_follow(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--follow",
        metavar="FILE",
        help="read a file line by line and what is appended to it later, or standard input "
        "('-'), until Ctrl-C; --prompt is then the question",
    )
    p.add_argument("--marker", metavar="LINE", help="with --follow: the line to answer at")


def _add_sampling(p: argparse.ArgumentParser) -> None:
    usual = "0; 0.7 for the demo model"
    add_real(p, "--temp", least=0, usual=usual, help="sampling temperature")
    add_real(p, "--top-p", least=0, most=1, default=1, help="sampling top-p")
    add_real(p, "--min-p", least=0, most=1, default=0, help="sampling min-p")
    add_integer(p, "--top-k", least=0, default=0, help="sampling top-k, 0 for all")
    add_integer(p, "--min-tokens-to-keep", least=1, default=1, help="least tokens for min-p")
    add_real(p, "--xtc-probability", least=0, most=1, default=0, help="probability of XTC")
    add_real(p, "--xtc-threshold", least=0, most=0.5, default=0.1, help="threshold of XTC")
    for name, what in PENALTIES.items():
        flag, is_factor = f"--{name}-penalty", name == "repetition"
        least, most = (0, None) if is_factor else (-100, 100)
        add_real(p, flag, least=least, most=most, above=is_factor, usual="none", help=what)
        add_integer(
            p,
            f"--{name}-context-size",
            least=1,
            most=MOST,
            default=CONTEXT,
            help=f"newest tokens that the {name} penalty looks at",
        )
