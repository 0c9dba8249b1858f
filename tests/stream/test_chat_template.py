"""Chat templates as they are found: what was said is in the prompt, whole and open at its end."""

from __future__ import annotations

from typing import Any

import mlx_lm.tokenizer_utils
import pytest
from odd_tokenizers import fast

from mlx_sink import InputError
from mlx_sink.stream.text.chat import frame, render, render_again

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"

TEMPLATES = {
    "text": HEAD + "{{ m.content }}" + TAIL,
    "parts": HEAD + PARTS + TAIL,
    "parts, or it fails": HEAD + "{{ m.content[0]['text'] }}" + TAIL,
    "parts, or it says nothing": HEAD
    + "{% if m.content is not string %}{{ m.content[0].text }}{% endif %}"
    + TAIL,
    "either": HEAD
    + "{% if m.content is string %}{{ m.content }}{% else %}"
    + PARTS
    + "{% endif %}"
    + TAIL,
    "a text for the system, parts for others": HEAD
    + "{% if m.role == 'system' %}{{ 'S: ' + m.content }}{% else %}"
    + PARTS
    + "{% endif %}"
    + TAIL,
    "trimmed": HEAD + "{{ m.content | trim }}" + TAIL,
    "lines joined": HEAD + "{{ m.content.replace('\n\n', '\n') }}" + TAIL,
}
SAID = {"system": "be the sea", "user": "the cat and the dog", "response": "the dog went"}


def tokenizer_with(template: str, **options: Any) -> Any:
    return fast("byte-level", chat_template=template, **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_has_what_was_said(name: str):
    tokenizer = tokenizer_with(TEMPLATES[name])
    said = dict(SAID)
    text = tokenizer.decode(render(tokenizer, said.pop("user"), **said).tokens)
    system = "S: be the sea" if name.startswith("a text for") else "be the sea"
    assert text == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nthe cat and the dog<|im_end|>"
        "\n<|im_start|>assistant\nthe dog went"
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_later_turns_have_it_too(name: str):
    tokenizer = tokenizer_with(TEMPLATES[name])
    around = frame(tokenizer, system="be the sea")
    assert "be the sea" in "".join(piece.text for piece in around.before)
    tokens = render_again(tokenizer, "the cat", around, ended=False, response="the")
    expected = "<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nthe"
    assert tokenizer.decode(tokens) == expected


@pytest.mark.parametrize("said", ["a\n\nb", "  a  ", "a\t\nb \n", "a</s>\n\n<|im_start|>b"])
@pytest.mark.parametrize("name", ["text", "trimmed", "lines joined", "parts"])
def test_only_spaces_may_change(name: str, said: str):
    tokenizer = tokenizer_with(TEMPLATES[name])
    text = tokenizer.decode(render(tokenizer, said).tokens)
    assert "".join(said.split()) in "".join(text.split())


LOSSES = {
    "nothing of it": (HEAD + TAIL, "what the user says"),
    "lower case": (HEAD + "{{ m.content | lower }}" + TAIL, "what the user says"),
    "a part of it": (HEAD + "{{ m.content[:9] }}" + TAIL, "what the user says"),
    "the list itself": (
        HEAD
        + "{% if m.content is string %}{{ m.content[:3] }}{% else %}{{ m.content }}{% endif %}"
        + TAIL,
        "what the user says",
    ),
    "no system": (
        "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        "the system prompt",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_template_loses_is_told(name: str):
    template, what = LOSSES[name]
    tokenizer = tokenizer_with(template)
    for run in (render, lambda t, _, **o: frame(t, **o)):
        with pytest.raises(InputError, match=what):
            run(tokenizer, "The Cat and the DOG", system="Be the SEA")
    prompt = render(tokenizer, "The Cat", system="Be the SEA", chat=False)
    assert tokenizer.decode(prompt.tokens) == "Be the SEA\n\nThe Cat"


def test_a_template_that_loses_how_the_answer_begins():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_with(template)
    assert tokenizer.decode(render(tokenizer, "the cat").tokens) == "the cat"
    with pytest.raises(InputError, match="does not appear in the chat"):
        render(tokenizer, "the cat", response="the dog")


REASON = "Only user and assistant roles are supported!\n  This one was: {}"


def test_a_template_s_own_reason_is_shown_whole():
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('" + REASON.replace("{}", "' ~ m.role ~ '") + "') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    tokenizer = tokenizer_with(template.replace("\n", "\\n"))
    for run in (render, lambda t, _, **o: frame(t, **o)):
        with pytest.raises(InputError) as caught:
            run(tokenizer, "the cat", system="be the sea")
        expected = " ".join(REASON.format("system").split())
        assert str(caught.value).endswith(f"refuses the prompt: {expected}")
    assert tokenizer.decode(render(tokenizer, "the cat").tokens) == "the cat"


@pytest.mark.parametrize("bad", ["{% for %}", "{{ nothing.at.all }}", "{{ 1 / 0 }}", "{{ m + }}"])
def test_a_broken_template_is_one_line(bad: str):
    with pytest.raises(InputError) as caught:
        render(tokenizer_with(bad), "the cat")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


# The end.

ENDS = {
    "after the prompt for an answer": (
        HEAD + "{{ m.content }}" + TAIL + "{{ eos_token }}",
        "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n",
    ),
    "twice": (
        HEAD + "{{ m.content }}" + TAIL + "{{ eos_token }} {{ eos_token }}\n",
        "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n",
    ),
    "only before an answer": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if not messages[1] %}{{ eos_token }}{% endif %}",
        "user: the cat",
    ),
    "between turns, as the model was trained": (
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
        "the cat</s>",
    ),
    "after what the user says, a header follows": (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        "[user]the cat</s>[assistant]",
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_does_not_follow_an_end_of_text(name: str):
    """But where the template itself lets every answer follow one."""
    template, expected = ENDS[name]
    tokenizer = tokenizer_with(template)
    assert tokenizer.decode(render(tokenizer, "the cat").tokens) == expected
    if "only before" not in name:
        around = frame(tokenizer)
        pieces = (*around.before, *around.ask)
        assert "".join(p.text for p in pieces) == expected.replace("the cat", "")


@pytest.mark.parametrize("response", ["the dog", "the dog ", "the </s>dog", "Sure: "])
def test_an_answer_goes_on_where_it_was_begun(response: str):
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = tokenizer_with(template)
    tokens = render(tokenizer, "the cat", response=response).tokens
    assert tokenizer.decode(tokens) == "the cat</s>" + response
    eos = tokenizer.eos_token_id
    assert tokens.count(eos) == 1


def test_a_template_in_python_that_knows_of_no_beginning():
    inner = fast("byte-level")._tokenizer
    inner.chat_template = None

    def template(messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"[{m['role']}]{m['content']}</s>" for m in messages)

    tokenizer = mlx_lm.tokenizer_utils.TokenizerWrapper(inner, chat_template=template)
    text = tokenizer.decode(render(tokenizer, "the cat", response="the dog").tokens)
    assert text == "[user]the cat</s>[assistant]the dog"


def test_without_a_template_the_answer_s_beginning_is_read():
    tokenizer = fast("byte-level")
    tokens = render(tokenizer, "the cat", response=" and the dog", chat=False).tokens
    assert tokenizer.decode(tokens) == "the cat and the dog"


def test_what_was_said_may_be_full_of_private_characters():
    tokenizer = fast("byte-level")
    text = "a" + "".join(map(chr, range(0x10F000, 0x10F0FD))) + "</s>"
    assert text in tokenizer.decode(render(tokenizer, text).tokens)
    with pytest.raises(InputError, match="private characters"):
        render(tokenizer, text + "".join(map(chr, range(0x10F0FD, 0x10F100))))


def test_a_control_word_at_which_a_template_cuts():
    """As templates do that drop a model's thoughts: what is lost by it is told."""
    template = (
        "{% for m in messages %}{% for part in m.content.split('<|im_end|>') %}({{ part }})"
        "{% endfor %}{% endfor %}"
    )
    tokenizer = tokenizer_with(template)
    with pytest.raises(InputError, match="what the user says"):
        render(tokenizer, "a<|im_end|>b")
    dropped = "{% for m in messages %}{{ m.content | replace('<|im_end|>', '') }}{% endfor %}"
    with pytest.raises(InputError, match="what the user says"):
        render(tokenizer_with(dropped), "a<|im_end|>b")
