"""From what a person wrote to the tokens a model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mlx_sink.errors import InputError


class Prompt(NamedTuple):
    """A rendered prompt.

    Attributes:
        tokens: Token ids.
        system: How many of the first tokens are the rendered system prompt; 0 without one.
    """

    tokens: list[int]
    system: int


def read_text(source: str | Path | BinaryIO, name: str) -> str:
    """Read a prompt from a file or from standard input.

    Raises:
        InputError: It does not exist, cannot be read, or is not UTF-8.
    """
    try:
        data = Path(source).read_bytes() if isinstance(source, str | Path) else source.read()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"cannot read {name}: {reason}") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text: see byte {error.start}") from None


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
        try:
            rendered = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=response is not None,
                add_generation_prompt=response is None,
                **(template_options or {}),
            )
        except (
            Exception
        ) as error:  # a template is a program of the model's, and may raise anything
            lines = str(error).splitlines() or [type(error).__name__]
            raise InputError(
                f"the model's chat template refuses the prompt: {lines[0]}"
            ) from error
        return list(tokenizer.encode(rendered, add_special_tokens=False))

    tokens = chat_tokens(text)
    # What the template puts before the user's words is what two different users share.
    shared = _common_prefix(chat_tokens("A"), chat_tokens("0")) if system else 0
    return Prompt(tokens, min(shared, len(tokens)))


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
