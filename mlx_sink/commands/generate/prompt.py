"""What the arguments ask of a model, as tokens: at the beginning of a stream and later."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, cast

from mlx_sink.commands.generate import resume as turns
from mlx_sink.errors import ConfigError, InputError
from mlx_sink.io import text as text_io
from mlx_sink.models.load import DEMO
from mlx_sink.stream.text.chat import Frame, frame, render, render_again
from mlx_sink.stream.text.encode import Encoder


class Asked:
    """What a person asks.

    Args:
        args: The parsed arguments.
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        fresh: The stream has yet to begin: without a prompt, a default one is asked.

    Attributes:
        text: What is asked; ``None`` for nothing.
        name: A sum by which it is known again; ``None`` for nothing.
        is_chat: A chat template stands around it.
        is_question: It was typed, and does not come out of a file: it may look up evicted tokens.

    Raises:
        InputError: It cannot be read, or is empty.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: Any, *, fresh: bool):
        self._args, self._tokenizer = args, tokenizer
        self._options = _options(args.chat_template_config)
        self.is_chat = bool(tokenizer.has_chat_template and not args.ignore_chat_template)
        self.is_question = args.prompt not in (None, "-")
        self.text = _text(args, fresh and args.follow is None)
        if self.text is not None and not self.text.strip():
            raise InputError("the prompt is empty")
        told = [args.system_prompt, args.prefill_response, args.ignore_chat_template]
        told += [args.allow_special_tokens] if args.allow_special_tokens else []
        same = turns.name_of(self.text, *told, self._options)
        self.name = None if self.text is None else same

    def around(self) -> Frame:
        """Return what the chat template writes around the turns."""
        return frame(
            self._tokenizer,
            system=self._args.system_prompt,
            chat=not self._args.ignore_chat_template,
            template_options=self._options,
            special=self._args.allow_special_tokens,
        )

    def tokens(self, first: bool, ended: bool) -> list[int]:
        """Return the tokens of the turn; arguments as in `turns.take`."""
        assert self.text is not None
        if first:
            return self._first(self.text)[0]
        around = self.around()
        if around.first:  # without a template, text goes on as it is
            around = around._replace(again=())
        args = self._args
        return render_again(
            self._tokenizer,
            self.text,
            around,
            ended,
            response=args.prefill_response or "",
            special=args.allow_special_tokens,
        )

    def pinned(self) -> int:
        """Return how many of the first tokens are the system prompt.

        Raises:
            ConfigError: There is none.
        """
        if not self._args.system_prompt:
            raise ConfigError("--pin-system-prompt needs --system-prompt")
        if self._args.follow is None:
            return self._first(self.text or "hello")[1]
        around = self.around()
        return len(Encoder(self._tokenizer).encode(*around.before, first=around.first))

    def _first(self, text: str) -> tuple[list[int], int]:
        args = self._args
        return render(
            self._tokenizer,
            text,
            system=args.system_prompt,
            chat=not args.ignore_chat_template,
            response=args.prefill_response,
            template_options=self._options,
            special=args.allow_special_tokens,
        )


def _text(args: argparse.Namespace, fresh: bool) -> str | None:
    if args.prompt_file is not None:
        return text_io.read(args.prompt_file, f"prompt file {args.prompt_file!r}")
    if args.prompt == "-":
        return text_io.read(sys.stdin.buffer, "standard input")
    if args.prompt is not None:
        return args.prompt
    if not fresh:
        return None
    return "Once upon a time" if args.model == DEMO else "hello"


def _options(text: str | None) -> dict[str, Any]:
    options: object = {}
    if text is not None:
        try:
            options = json.loads(text)
        except ValueError:
            options = None
    if not isinstance(options, dict):
        raise InputError("--chat-template-config must be a JSON object")
    return cast("dict[str, Any]", options)
