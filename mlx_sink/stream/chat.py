"""From what a person wrote to the tokens a model reads."""

from __future__ import annotations

from typing import Any, NamedTuple

from mlx_sink.errors import InputError


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
) -> Prompt:
    """Render a prompt as mlx-lm does: through the chat template if there is one.

    Without a template the system prompt is a paragraph of its own before the text.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        text: What the user says.
        system: The system prompt.
        chat: Use the chat template, if the tokenizer has one.
        response: How the answer begins.
        template_options: Further variables of the template.

    Raises:
        InputError: There is nothing to read, or the template refuses.
    """
    if not text.strip():
        raise InputError("the prompt is empty")
    if not (chat and tokenizer.has_chat_template):
        bos = tokenizer.bos_token
        head = f"{system}\n\n" if system else ""
        special = bos is None or not (head + text).startswith(bos)
        if not head:
            return Prompt(tokenizer.encode(text, add_special_tokens=special), 0)
        first = list(tokenizer.encode(head, add_special_tokens=special))
        return Prompt(first + list(tokenizer.encode(text, add_special_tokens=False)), len(first))

    def chat_tokens(user: str) -> list[int]:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": user})
        if response is not None:
            messages.append({"role": "assistant", "content": response})
        rendered = _from_template(
            tokenizer,
            messages,
            template_options,
            continue_final_message=response is not None,
            add_generation_prompt=response is None,
        )
        return list(tokenizer.encode(rendered, add_special_tokens=False))

    tokens = chat_tokens(text)
    # What the template puts before the user's words is what two different users share.
    shared = _common_prefix(chat_tokens("A"), chat_tokens("0")) if system else 0
    return Prompt(tokens, min(shared, len(tokens)))


class Frame(NamedTuple):
    """What a chat template writes around what is said; without one, next to nothing.

    Attributes:
        before: From the beginning of the text to the user's first words.
        ask: From the user's words to the answer.
        again: From an answer to the user's next words.
        special: The tokenizer's special tokens go before `before`, which has none itself.
    """

    before: str
    ask: str
    again: str
    special: bool


def frame(
    tokenizer: Any,
    *,
    system: str | None = None,
    chat: bool = True,
    template_options: dict[str, Any] | None = None,
) -> Frame:
    """Return what stands around the turns of an endless conversation; arguments as in `render`.

    Raises:
        InputError: The template refuses, or changes the words that it is given.
    """
    if not (chat and tokenizer.has_chat_template):
        return Frame(f"{system}\n\n" if system else "", "", "\n", special=True)
    words = [("user", "QUESTION-1"), ("assistant", "ANSWER-1"), ("user", "QUESTION-2")]
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": content} for role, content in words]
    first = _from_template(tokenizer, messages[:-2], template_options, add_generation_prompt=True)
    all_three = _from_template(tokenizer, messages, template_options)
    before, found, ask = first.partition("QUESTION-1")
    _, answered, rest = all_three.partition("ANSWER-1")
    again, next_found, _ = rest.partition("QUESTION-2")
    if not (found and answered and next_found):
        raise InputError(
            "the model's chat template changes what it is given: use --ignore-chat-template"
        )
    return Frame(before, ask, again, special=False)


def render_again(tokenizer: Any, text: str, around: Frame, ended: bool) -> list[int]:
    """Return the tokens of a later turn.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        text: What the user says; empty for the beginning of what comes in pieces.
        around: What stands around it. After `Frame.ask` comes the answer.
        ended: The answer before ended with an end-of-text token, which the template writes too.
    """
    tokens = list(tokenizer.encode(around.again + text, add_special_tokens=False))
    return tokens[1:] if ended and tokens[:1] and tokens[0] in tokenizer.eos_token_ids else tokens


def _from_template(
    tokenizer: Any, messages: list[dict[str, str]], options: dict[str, Any] | None, **more: bool
) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **more, **(options or {}))
    except Exception as error:  # a template is a program of the model's, and may raise anything
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"the model's chat template refuses the prompt: {lines[0]}") from error


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
