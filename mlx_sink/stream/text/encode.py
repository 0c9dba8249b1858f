"""Text to tokens, so that a control token comes from a template and never from what is read.

A text in which the tokenizer sees no control token is encoded as it always was. In any other, the
words that look like one are encoded as the text that they are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

from tokenizers import AddedToken

from mlx_sink.errors import InputError
from mlx_sink.stream.text.control import Control, control_of

SAMPLES = ("a", "the", "1", "A", ".")
"""Text before and after which the tokens that a tokenizer adds to every text are looked for."""

RARE = "\u2603\u0f00\U0001f9ff"
"""Characters that few vocabularies have: do they become an unknown token?"""

STAND_IN = "\U00100000"
"""Private character around the number that stands for a control token of a template."""

ANCHORS = ("\n", "a", ".")
"""What a piece from the middle of a text is encoded after: no space is put before it then."""


class Piece(NamedTuple):
    """A part of a text.

    Attributes:
        text: The part.
        special: Control tokens count in it: a template wrote it, or someone who may.
    """

    text: str
    special: bool = False


class Encoder:
    """Text to tokens with one tokenizer.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``.

    Attributes:
        control: Its control tokens.
    """

    def __init__(self, tokenizer: Any):
        self.control: Control = control_of(tokenizer)
        self._tokenizer = tokenizer
        self._words = words_of(self.control)
        self._ids = self._told_apart()
        self._before, self._after = self._around(add_special_tokens=False)
        self._first, _ = self._around(add_special_tokens=True)

    def encode(self, *pieces: Piece, first: bool = False) -> list[int]:
        """Return the tokens of a text.

        Args:
            pieces: Its parts.
            first: It is the beginning of a stream: the tokens that the tokenizer puts before a
                text come first. Those that it puts after one do not: the text goes on.

        Raises:
            InputError: A word of a piece that is not special stays a control token whatever
                is tried.
        """
        text = "".join(piece.text for piece in pieces)
        ids = self._plain(text)
        if not all(piece.special for piece in pieces):
            wanted: Counter[int] = Counter()
            for piece in pieces:
                if piece.special:
                    wanted += self._count(self._plain(piece.text))
            written = any(self.mentions(piece.text) for piece in pieces if not piece.special)
            if written or self._count(ids) != wanted:
                ids = self._apart(pieces, wanted)
        bos = self._tokenizer.bos_token
        has_one = bos is not None and pieces[:1] and pieces[0].special and text.startswith(bos)
        return [*self._first, *ids] if first and not has_one else ids

    def mentions(self, text: str) -> re.Match[str] | None:
        """Return the first control word that stands in a text."""
        return self._words.search(text)

    def controls(self, text: str) -> bool:
        """Tell whether the tokenizer would see a control token in a text, spelled as it may be."""
        return self.mentions(text) is not None or bool(self._count(self._plain(text)))

    def mark(self, text: str, before: str, after: str) -> str:
        """Return a text with each control word in it between two marks."""
        marked = self._words.sub(lambda word: before + word[0] + after, text)
        # Where a normalised spelling counts too, the word cannot be told: all of it is marked.
        return before + text + after if marked == text and self.controls(text) else marked

    def _plain(self, text: str) -> list[int]:
        """Encode a text, and take off what a tokenizer adds although it is asked not to."""
        ids = self._raw(text) if text else []
        before, after = len(self._before), len(self._after)
        if before and ids[:before] == self._before:
            ids = ids[before:]
        if after and ids[-after:] == self._after:
            ids = ids[:-after]
        return ids

    def _raw(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text has half a character (a surrogate) at place {error.start}: take it out"
            ) from None
        encode = self._tokenizer.encode
        return list(cast("Iterable[int]", encode(text, add_special_tokens=add_special_tokens)))

    def _around(self, *, add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """Return the control tokens that the tokenizer puts before and after a text."""
        for sample in SAMPLES:
            ids = self._raw(sample, add_special_tokens=add_special_tokens)
            text = [i for i, token in enumerate(ids) if token not in self._ids]
            if text:
                return ids[: text[0]], ids[text[-1] + 1 :]
        return [], []

    def _told_apart(self) -> frozenset[int]:
        """Return the ids that no ordinary text has: not that of unknown characters."""
        unknown = set(self._raw(RARE)) - set(self._raw(""))
        return frozenset(self.control.words.values()) - unknown

    def _count(self, ids: Iterable[int]) -> Counter[int]:
        return Counter(i for i in ids if i in self._ids)

    def _apart(self, pieces: Sequence[Piece], wanted: Counter[int]) -> list[int]:
        """Encode pieces whose control words, but for the special ones', are text.

        Raises:
            InputError: One stays a control token.
        """
        twin = _twin_of(self._tokenizer, self.control)
        for way in [*([twin.encode] if twin else []), self._cut, self._spelled]:
            ids = way(pieces)
            if ids is not None and self._count(ids) == wanted:
                return ids
        words = (self.mentions(piece.text) for piece in pieces if not piece.special)
        word = next((word[0] for word in words if word), "a control token")
        raise InputError(
            f"this tokenizer cannot read {word!r} as plain text: take it out, or allow special "
            "tokens"
        )

    def _cut(self, pieces: Sequence[Piece]) -> list[int]:
        """Encode in parts, which begin within the control words that are to be text."""
        parts = [""]
        for text, special in pieces:
            begin = 0
            for word in () if special else self._words.finditer(text):
                parts[-1] += text[begin : word.start() + 1]
                parts.append("")
                begin = word.start() + 1
            parts[-1] += text[begin:]
        return [i for n, part in enumerate(parts) for i in self._part(part, first=n == 0)]

    def _spelled(self, pieces: Sequence[Piece]) -> list[int]:
        """Encode pieces that have control words, however they are written, letter by letter."""
        parts: list[str] = []
        for text, special in pieces:
            parts += [text] if special or not self.controls(text) else list(text)
        return [i for n, part in enumerate(parts) for i in self._part(part, first=n == 0)]

    def _part(self, text: str, *, first: bool) -> list[int]:
        """Encode a part of a text; one from the middle without a space before it."""
        for anchor in () if first else ANCHORS:
            before, ids = self._plain(anchor), self._plain(anchor + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._plain(text)


class _Twin:
    """A copy of a fast tokenizer to which every control word is text.

    Those that a template wrote go in as stand-ins, which take the same part in normalising and
    splitting a text as the words that they stand for. So all other tokens are what the tokenizer
    itself gives, and no setting of a tokenizer that other threads use is touched.
    """

    def __init__(self, tokenizer: Any, control: Control):
        self._tokenizer = deepcopy(tokenizer)
        self._tokenizer.split_special_tokens = True
        backend = self._tokenizer.backend_tokenizer
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        self._stand_ins = {word: f"{STAND_IN}{i}{STAND_IN}" for word, i in control.words.items()}
        for word, stand_in in self._stand_ins.items():
            # Special ones are passed over, as the setting above says.
            backend.add_special_tokens([_like(added.get(word), word, special=True)])
            backend.add_tokens([_like(added.get(word), stand_in, special=False)])
        self._ids = {
            backend.token_to_id(stand_in): control.words[word]
            for word, stand_in in self._stand_ins.items()
        }
        self._words = words_of(control)

    def encode(self, pieces: Sequence[Piece]) -> list[int] | None:
        """Encode pieces; ``None`` if stand-ins and text cannot be told from each other."""
        text = "".join(
            self._words.sub(lambda word: self._stand_ins[word[0]], piece.text)
            if piece.special
            else piece.text
            for piece in pieces
        )
        ids = cast("list[int]", self._tokenizer.encode(text, add_special_tokens=False))
        # A word that the tokenizer does not see at its place is seen by no other name either, and
        # someone may have written what stands in for one.
        if 2 * sum(i in self._ids for i in ids) != text.count(STAND_IN):
            return None
        return [self._ids.get(i, i) for i in ids]


def words_of(control: Control) -> re.Pattern[str]:
    """Return what matches a control word, the longest one at a place."""
    longest_first = sorted(control.words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _like(token: Any, word: str, *, special: bool) -> AddedToken:
    """Return a word to add that takes part in splitting a text as another one does."""
    names = ("single_word", "lstrip", "rstrip", "normalized")
    options = {name: bool(getattr(token, name, False)) for name in names}
    return AddedToken(word, special=special, **options)


_twins: WeakKeyDictionary[Any, tuple[dict[str, int], _Twin | None]] = WeakKeyDictionary()


def _twin_of(tokenizer: Any, control: Control) -> _Twin | None:
    """Return the twin of a tokenizer, made when it is first needed; ``None`` if it has none."""
    words, twin = _twins.get(tokenizer, (None, None))
    if words != control.words:
        inner = getattr(tokenizer, "_tokenizer", tokenizer)
        try:
            twin = _Twin(inner, control)
        except Exception:  # no fast tokenizer, or one with parts that cannot be copied
            twin = None
        _twins[tokenizer] = (dict(control.words), twin)
    return twin
