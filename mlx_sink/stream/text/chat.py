"""From what a person wrote to the tokens a model reads."""

from __future__ import annotations

from typing import Any, NamedTuple

from mlx_sink.errors import InputError
from mlx_sink.stream.text.encode import Encoder, Piece
from mlx_sink.stream.text.template import Message, Template


class Prompt(NamedTuple):
    """A rendered prompt.

    Attributes:
        tokens: Token ids.
        system: How many of the first tokens are the rendered system prompt; 0 without one.
    """

    tokens: list[int]
    system: int


def render(
    tokenizer: Any,
    text: str,
    *,
    system: str | None = None,
    chat: bool = True,
    response: str | None = None,
    template_options: dict[str, Any] | None = None,
    special: bool = False,
) -> Prompt:
    """Render a prompt as mlx-lm does: through the chat template if there is one.

    Without a template the system prompt is a paragraph of its own before the text, and the
    answer's beginning follows it.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        text: What the user says.
        system: The system prompt.
        chat: Use the chat template, if the tokenizer has one.
        response: How the answer begins.
        template_options: Further variables of the template.
        special: Control tokens count in what is said, too; by default they are text there.

    Raises:
        InputError: There is nothing to read, or the template refuses, or leaves out or changes
            what is said.
    """
    if not text.strip():
        raise InputError("the prompt is empty")
    encoder = Encoder(tokenizer)
    if not (chat and tokenizer.has_chat_template):
        said = Piece(text + (response or ""), special)
        if not system:
            return Prompt(encoder.encode(said, first=True), 0)
        first = encoder.encode(Piece(f"{system}\n\n", special), first=True)
        return Prompt(first + encoder.encode(said), len(first))

    template = Template(tokenizer, encoder, template_options, special=special)

    def tokens(user: str) -> list[int]:
        messages = [Message("system", system)] if system else []
        messages.append(Message("user", user))
        if response is not None:
            messages.append(Message("assistant", response))
        return encoder.encode(*template.render(messages).pieces())

    whole = tokens(text)
    # What the template puts before the user's words is what two different users share.
    shared = _common_prefix(tokens("A"), tokens("0")) if system else 0
    return Prompt(whole, min(shared, len(whole)))


class Frame(NamedTuple):
    """What a chat template writes around what is said; without one, next to nothing.

    Attributes:
        before: From the beginning of the text to the user's first words.
        ask: From the user's words to the answer.
        again: From an answer to the user's next words.
        first: `before` begins a stream that has no template: the tokenizer's own tokens go
            first.
    """

    before: tuple[Piece, ...]
    ask: tuple[Piece, ...]
    again: tuple[Piece, ...]
    first: bool


def frame(
    tokenizer: Any,
    *,
    system: str | None = None,
    chat: bool = True,
    template_options: dict[str, Any] | None = None,
    special: bool = False,
) -> Frame:
    """Return what stands around the turns of an endless conversation; arguments as in `render`.

    Raises:
        InputError: The template refuses, or changes the words that it is given.
    """
    if not (chat and tokenizer.has_chat_template):
        before = (Piece(f"{system}\n\n", special),) if system else ()
        return Frame(before, (), (Piece("\n"),), first=True)
    template = Template(tokenizer, Encoder(tokenizer), template_options, special=special)
    messages = [Message("system", system)] if system else []
    messages += [Message("user", "QUESTION-1"), Message("assistant", "ANSWER-1")]
    first = template.render(messages[:-1])
    whole = template.render([*messages, Message("user", "QUESTION-2")], answer=False)
    before, _, ask = first.text.partition("QUESTION-1")
    again = whole.text.partition("ANSWER-1")[2].partition("QUESTION-2")[0]
    return Frame(
        tuple(first._replace(text=before).pieces()),
        tuple(first._replace(text=ask).pieces()),
        tuple(whole._replace(text=again).pieces()),
        first=False,
    )


def render_again(
    tokenizer: Any,
    text: str,
    around: Frame,
    ended: bool,
    *,
    response: str | None = None,
    special: bool = False,
) -> list[int]:
    """Return the tokens of a later turn.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        text: What the user says; empty for the beginning of what comes in pieces.
        around: What stands around it.
        ended: The answer before ended with an end-of-text token, which the template writes too.
        response: How the answer begins, after what the template writes before it; ``None`` if
            that is still to come.
        special: As in `render`.
    """
    pieces = [*around.again, Piece(text, special)]
    if response is not None:
        pieces += [*around.ask, Piece(response, special)]
    tokens = Encoder(tokenizer).encode(*pieces)
    return tokens[1:] if ended and tokens[:1] and tokens[0] in tokenizer.eos_token_ids else tokens


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
