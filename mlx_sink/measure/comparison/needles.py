"""Needle tests: questions about a fact in a text, at a chosen distance from the answer.

A question has one right answer, and wrong ones that appear nowhere in the text. A model answers it
right if the right answer has the lowest loss. So a guess is right once in `CHOICES`, and a model
that is too small to copy what it reads does no better than that, whatever its cache keeps.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sink.measure.losses import cross_entropy
from mlx_sink.measure.machine import evaluate_caches

CHOICES = 8
"""Answers to a question, the right one included."""

EDGE = 32
"""Tokens from the window's edge at which a needle lies just inside, or just outside."""

PEOPLE = ("Anna", "Boris", "Clara", "David", "Emma", "Fritz", "Greta", "Henry", "Maria", "Peter")
LINE = "The number of {name} is {number}."
QUESTION = "The number of {name} is"

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Question:
    """A text and a question about it.

    Attributes:
        context: Tokens, the question included.
        choices: Tokens of the possible answers; the first one is right.
    """

    context: list[int]
    choices: list[list[int]]

    def after(self, token: int) -> Question:
        """Return the same question, its text behind a token such as BOS."""
        return Question([token, *self.context], self.choices)


def places(capacity: int, length: int) -> dict[str, int]:
    """Return where needles lie, as tokens between the needle and the answer.

    Args:
        capacity: Tokens that a bounded cache keeps.
        length: Tokens of the whole text.
    """
    return {
        "the start": length,
        "the middle": (length + capacity) // 2,
        f"{EDGE} tokens outside the window": capacity + EDGE,
        f"{EDGE} tokens inside the window": capacity - EDGE,
        "within the window": capacity // 2,
    }


def distances(capacity: int) -> dict[str, int]:
    """Return at what distances lines are queried, in tokens."""
    return {
        f"{n} tokens back": n
        for n in (capacity // 4, capacity // 2, capacity - EDGE, capacity + EDGE, 2 * capacity)
    }


def needle(encode: Encode, hay: Sequence[int], distance: int, seed: str) -> Question:
    """Hide a line in a text, and ask for it at the end.

    Args:
        encode: From text to tokens, without special ones.
        hay: Tokens of the text, without special ones, as many as the whole is to have.
        distance: Tokens between the end of the line and the answer. Where the text is shorter,
            the line stands at its start.
        seed: Of the name and the numbers; another one for each question.
    """
    draw = random.Random(seed)
    name, numbers = draw.choice(PEOPLE), draw.sample(range(1000, 10000), CHOICES)
    line = encode(LINE.format(name=name, number=numbers[0]) + "\n")
    question = encode("\n" + QUESTION.format(name=name))
    room = max(0, len(hay) - len(line) - len(question))
    behind = min(room, max(0, distance - len(question)))
    text = [*hay[: room - behind], *line, *hay[room - behind : room], *question]
    return Question(text, _answers(encode, numbers))


def lines(encode: Encode, length: int, distance: int, seed: str) -> Question:
    """Ask for one line of a text that consists of such lines alone, as StreamEval does.

    Args:
        encode: As in `needle`.
        length: Tokens of the text.
        distance: Tokens between the line that is asked for and the answer.
        seed: As in `needle`.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", section 4.
    """
    draw = random.Random(seed)
    ids: list[list[int]] = []
    people: list[str] = []
    numbers: list[int] = []
    total = 0
    while total < length:
        people.append(f"{draw.choice(PEOPLE)} {draw.randrange(100, 1000)}")
        numbers.append(draw.randrange(1000, 10000))
        ids.append(encode(LINE.format(name=people[-1], number=numbers[-1]) + "\n"))
        total += len(ids[-1])
    behind, chosen = 0, len(ids) - 1
    while chosen > 0 and behind + len(ids[chosen]) < distance:
        behind += len(ids[chosen])
        chosen -= 1
    others = [n for n in range(1000, 10000, 7) if n not in numbers]
    choices = [numbers[chosen], *draw.sample(others, CHOICES - 1)]
    question = encode(QUESTION.format(name=people[chosen]))
    return Question([*chain.from_iterable(ids), *question], _answers(encode, choices))


def _answers(encode: Encode, numbers: Sequence[int]) -> list[list[int]]:
    return [encode(f" {number}") for number in numbers]


def ask(model: nn.Module, caches: list[Any], question: Question, chunk: int) -> bool:
    """Tell whether a model gives the right answer the lowest loss.

    Args:
        model: The model.
        caches: Empty ones, for one stream.
        question: The text is read first, then each answer from there.
        chunk: Tokens of the text that are read at once.
    """
    *context, last = question.context
    for i in range(0, len(context), chunk):
        model(mx.array([context[i : i + chunk]]), cache=caches)
        evaluate_caches(caches)

    def loss(answer: list[int]) -> float:
        inputs = mx.array([[last, *answer[:-1]]])
        logits = model(inputs, cache=copy.deepcopy(caches))
        of_each = np.asarray(cross_entropy(logits, mx.array([answer])), np.float32)
        return float(of_each.mean())

    right, *wrong = map(loss, question.choices)
    return right < min(wrong)
