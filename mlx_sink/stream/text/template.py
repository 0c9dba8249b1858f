"""A model's chat template, which must say what it was given and end where the answer begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

from mlx_sink.errors import InputError
from mlx_sink.stream.text.encode import Encoder, Piece

MARKS = "".join(map(chr, range(0x10F000, 0x10F100)))
"""Private characters: two that nobody has written stand around control words that were said."""

LONGEST_REASON = 500
"""Characters of an error of a template that are shown."""

ROLES = {
    "system": "the system prompt",
    "user": "what the user says",
    "assistant": "how the answer begins",
}


class Message(NamedTuple):
    """What is said, and by whom: ``"system"``, ``"user"`` or ``"assistant"``."""

    role: str
    content: str


class Rendered(NamedTuple):
    """What a template writes.

    Attributes:
        text: The text; control words that were said stand between two marks.
        marks: The two.
    """

    text: str
    marks: tuple[str, str]

    def pieces(self) -> list[Piece]:
        """Return the text as pieces: what was said has no control tokens, the rest may."""
        before, after = self.marks
        parts = re.split(f"{before}([^{before}{after}]*){after}", self.text)
        pieces = [Piece(part, special=n % 2 == 0) for n, part in enumerate(parts)]
        # A template may have cut what was said at a control word: half a pair of marks is left.
        lone = str.maketrans("", "", before + after)
        return [p._replace(text=p.text.translate(lone)) for p in pieces if p.text]


class Template:
    """The chat template of a tokenizer.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``, which has one.
        encoder: Its encoder.
        options: Further variables of the template.
        special: Control tokens count in what is said, too.
    """

    def __init__(
        self,
        tokenizer: Any,
        encoder: Encoder,
        options: dict[str, Any] | None = None,
        *,
        special: bool = False,
    ):
        self._tokenizer, self._encoder = tokenizer, encoder
        self._options = options or {}
        self._special = special
        ends = {tokenizer.convert_ids_to_tokens(i) for i in tokenizer.eos_token_ids}
        self._ends = tuple(str(word) for word in ends if word)

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> Rendered:
        """Render a conversation.

        Args:
            messages: What is said. If the last one is an answer's beginning, it goes on there.
            answer: An answer follows: the template writes what stands before it, and no end of
                text.

        Raises:
            InputError: The template refuses, or leaves out or changes what is said.
        """
        said = "".join(message.content for message in messages)
        unused = [mark for mark in MARKS if mark not in said]
        if len(unused) < 2:
            raise InputError("the text is full of private characters of Unicode: take them out")
        marks = (unused[0], unused[1])
        if not self._special:
            mark = self._encoder.mark
            messages = [m._replace(content=mark(m.content, *marks)) for m in messages]
        begun = answer and messages[-1].role == "assistant"
        flags = {"continue_final_message": begun, "add_generation_prompt": answer and not begun}
        text = self._said(messages, flags)
        if begun:
            text = _until(text, messages[-1].content)
        elif answer:
            text = self._open(text, messages)
        return Rendered(text, marks)

    def _said(self, messages: Sequence[Message], flags: dict[str, bool]) -> str:
        """Render in the first form in which nothing that is said is lost.

        Some templates take what is said as text, some as a list of parts, and some one as text
        and the other in parts.
        """
        everyone = {message.role for message in messages}
        problem: InputError | None = None
        for in_parts in (set[str](), everyone, everyone - {"system"}):
            try:
                text = self._apply(messages, in_parts, flags)
            except InputError as error:
                problem = problem or error
                continue
            lost = _lost(messages, text)
            if not lost:
                return text
            what = " and ".join(ROLES[role] for role in ROLES if role in lost)
            problem = problem or InputError(
                f"the model's chat template leaves out or changes {what}: use "
                "--ignore-chat-template, or other words"
            )
        assert problem is not None
        raise problem

    def _apply(
        self, messages: Sequence[Message], in_parts: set[str], flags: dict[str, bool]
    ) -> str:
        def content(message: Message) -> object:
            text = message.content
            return [{"type": "text", "text": text}] if message.role in in_parts else text

        conversation = [{"role": m.role, "content": content(m)} for m in messages]
        try:
            return cast(
                "str",
                self._tokenizer.apply_chat_template(
                    conversation, tokenize=False, **flags, **self._options
                ),
            )
        except Exception as error:  # a template is a program of the model's: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            if len(reason) > LONGEST_REASON:
                reason = reason[:LONGEST_REASON] + " ..."
            raise InputError(f"the model's chat template refuses the prompt: {reason}") from error

    def _open(self, text: str, messages: Sequence[Message]) -> str:
        """Take off an end of text after which no answer can follow."""
        if not text.rstrip().endswith(self._ends):
            return text
        # Some templates do put one before each answer: that is how their models know it.
        with suppress(InputError):
            answered = self._said([*messages, Message("assistant", "ANSWER-1")], {})
            if answered.rpartition("ANSWER-1")[0].rstrip().endswith(self._ends):
                return text
        while text.rstrip().endswith(self._ends):
            end = max((e for e in self._ends if text.rstrip().endswith(e)), key=len)
            text = text.rstrip().removesuffix(end)
        return text


def _until(text: str, last: str) -> str:
    """Take off what a template writes after an answer that is to go on."""
    words = last.strip()
    end = text.rfind(words) + len(words)
    return text[:end] if words and text[end:].strip() else text


def _lost(messages: Sequence[Message], text: str) -> set[str]:
    """Return who said something that a text does not have; its spaces may be others."""
    words = "".join(text.split())
    if "{'type':'text'," in words:  # a list of parts, printed as Python writes it
        return {message.role for message in messages}
    return {m.role for m in messages if "".join(m.content.split()) not in words}
