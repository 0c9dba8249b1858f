"""Tokens to text, one at a time, in bounded memory: the same text as mlx-lm's detokenizers.

mlx-lm's keep every token and the whole text, and look at it again for each token; these keep what
the text to come depends on, and can be saved and restored at any token.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
)

from mlx_sink.errors import InputError

LINE = 128
"""Tokens of one line that are decoded together before its beginning is settled."""

TAIL = 32
"""Tokens that go on being decoded with what follows when the beginning is settled."""

REPLACEMENT = "\ufffd"

SAMPLE = "The quick brown fox: na\u00efve caf\u00e9, \u8a9e \U0001f600\n\tdef f(a):\n    return a"
"""What a detokenizer must give back: words, spaces, lines, and characters of several bytes."""

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""The word of a token that is one byte, in SentencePiece's vocabularies."""

PROOF = 200
"""Words of a vocabulary that are looked at where the sample says nothing."""


class Detokenizer(Protocol):
    """Tokens in, text out."""

    def feed(self, token: int) -> str:
        """Take a token and return the text that it completes."""
        ...

    def finish(self) -> str:
        """Return what is left when no more tokens come."""
        ...

    def state(self) -> list[Any]:
        """Return all that the text to come depends on, JSON-ready."""
        ...

    def restore(self, state: list[Any]) -> None:
        """Go on from a `state`.

        Raises:
            ValueError: It is none. A state may come from anywhere.
        """
        ...


def detokenizer_for(tokenizer: Any) -> Detokenizer:
    """Return a detokenizer: of the kind that mlx-lm chose, if that one gives text back.

    mlx-lm goes by the decoder that the tokenizer's file names, and some files name one that does
    not fit their vocabulary. So the choice is put to the proof, once for a tokenizer.

    Args:
        tokenizer: mlx-lm's ``TokenizerWrapper``.

    Raises:
        InputError: mlx-lm's detokenizer is of a kind that is not known here.
    """
    make = _makers.get(tokenizer)
    if make is None:
        make = _makers[tokenizer] = _proven(tokenizer)
    return make()


_makers: WeakKeyDictionary[Any, Callable[[], Detokenizer]] = WeakKeyDictionary()


def _proven(tokenizer: Any) -> Callable[[], Detokenizer]:
    """Return what makes the first detokenizer that gives a sample back as it was."""
    theirs = _chosen_by_mlx_lm(tokenizer)
    ids = list(cast("Iterable[int]", tokenizer.encode(SAMPLE, add_special_tokens=False)))
    if _text(theirs, ids) == SAMPLE:
        return theirs
    inner = tokenizer._tokenizer
    named = cast("list[str | None]", inner.convert_ids_to_tokens(list(range(len(tokenizer)))))
    words = [word or "" for word in named]  # an id may have no word
    byte_level = partial(ByteLevel, words)
    trim_space = not str(inner.decode(ids)).startswith(" ")
    pieces = [bytes.fromhex(w[3:5]) if BYTE.fullmatch(w) else w.encode() for w in words]
    spaced = partial(SentencePiece, pieces, trim_space=trim_space)
    by_decode = partial(AnyTokenizer, inner, clean_spaces=False)
    for make in (byte_level, spaced, by_decode):
        if _text(make, ids) == SAMPLE:
            return make
    # The sample is nothing to this tokenizer: its own words must do.
    after_space = [n for n, word in enumerate(words) if word.startswith(ByteLevel.SPACE)]
    if len(after_space) > sum(word.startswith("\u2581") for word in words):
        printed = _text(theirs, after_space[:PROOF])
        return byte_level if ByteLevel.SPACE in printed else theirs
    added = cast("dict[int, Any]", inner.added_tokens_decoder)
    plain = [n for n in range(len(words)) if n not in added and words[n]]
    few = plain[:: max(1, len(plain) // PROOF)]
    # A byte of a character alone says nothing.
    known = [n for n in few if REPLACEMENT not in str(inner.decode([n]))]
    same = _text(theirs, known) == str(inner.decode(known)).removeprefix(" ")
    return theirs if same or theirs.func is AnyTokenizer else by_decode


def _text(make: Callable[[], Detokenizer], ids: Sequence[int]) -> str:
    """Return the text of tokens, without the space that some put before one."""
    detokenizer = make()
    text = "".join(map(detokenizer.feed, ids)) + detokenizer.finish()
    return text.removeprefix(" ")


def _chosen_by_mlx_lm(tokenizer: Any) -> partial[Detokenizer]:
    theirs: Any = tokenizer.detokenizer
    kind = cast("type[object]", type(theirs))
    if kind is BPEStreamingDetokenizer:
        return partial(ByteLevel, theirs.tokenmap)
    if kind is SPMStreamingDetokenizer:
        return partial(SentencePiece, theirs.tokenmap, trim_space=bool(theirs.trim_space))
    if kind is NaiveStreamingDetokenizer:
        clean_spaces = bool(theirs._clean_spaces)
        return partial(AnyTokenizer, theirs._tokenizer, clean_spaces=clean_spaces)
    name = type(theirs).__name__
    raise InputError(f"the tokenizer has a {name}, whose text mlx_sink cannot bound")


def check(state: list[Any], *types: type) -> None:
    """Check what a saved state holds, which may come from anywhere.

    Raises:
        ValueError: Its values are not of these types, one for each, or a text is none.
    """
    if [type(value) for value in state] != list(types):
        raise ValueError(state)
    for value in state:
        if isinstance(value, str):
            value.encode()  # half of a surrogate pair could not be shown


class _Bytes:
    """Bytes to characters, and mlx-lm's rule for the space at the very start of a text.

    While the text is empty, a leading space is dropped from whatever comes out first. Until that
    is known one space is held back; afterwards only the bytes of an unfinished character are.
    """

    def __init__(self, *, trim_space: bool, space: str = " "):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._space = space
        self._started = not trim_space
        self._held = ""

    def _take(self, data: bytes, *, wait: bool = False) -> str:
        """Decode; ``wait`` holds a lone first space back for the next token."""
        self._held += self._decoder.decode(data).replace(self._space, " ")
        if not self._started and self._held in ("", " "):
            pending = self._decoder.getstate()[0]
            if wait or pending:
                return ""
        return self._out()

    def _out(self) -> str:
        text, self._held = self._held, ""
        if not self._started:
            text = text.removeprefix(" ")
            self._started = bool(text)
        return text

    def finish(self) -> str:
        """Return what is left when no more tokens come."""
        self._held += self._decoder.decode(b"", final=True).replace(self._space, " ")
        return self._out()

    def state(self) -> list[Any]:
        """Return all that the text to come depends on, JSON-ready."""
        return [self._decoder.getstate()[0].hex(), self._started, self._held]

    def restore(self, state: list[Any]) -> None:
        """Go on from a `state`."""
        check(state, str, bool, str)
        pending, self._started, self._held = state
        self._decoder.setstate((bytes.fromhex(pending), 0))


def _bytes_of_characters() -> dict[str, bytes]:
    """Return which byte each character of a byte-level vocabulary stands for.

    Printable ones stand for themselves, the others are written from U+0100 on.
    Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    table = {chr(0x100 + n): bytes([b]) for n, b in enumerate(others)}
    # mlx-lm takes the byte 0 for a missing one, and writes its character as it stands.
    del table["\u0100"]
    return table | {chr(b): bytes([b]) for b in printable}


class ByteLevel(_Bytes):
    """Byte-level BPE, as GPT-2 writes it: every character of a token stands for one byte.

    Args:
        tokens: The tokens by id; an id beyond them is written as mlx-lm does, "!".
    """

    _BYTES = _bytes_of_characters()
    SPACE = "\u0120"

    def __init__(self, tokens: list[str]):
        super().__init__(trim_space=True)
        self._tokens = tokens

    def feed(self, token: int) -> str:
        """Take a token and return the text that it completes."""
        written = self._tokens[token] if token < len(self._tokens) else "!"
        data = b"".join(self._BYTES.get(c) or c.encode() for c in written)
        return self._take(data, wait=written == self.SPACE)


class SentencePiece(_Bytes):
    """SentencePiece with byte fallback.

    Args:
        tokens: The bytes of each token, spaces still written as U+2581.
        trim_space: Drop the space that SentencePiece puts before a text.
    """

    def __init__(self, tokens: list[bytes], *, trim_space: bool):
        super().__init__(trim_space=trim_space, space="\u2581")
        self._tokens = tokens

    def feed(self, token: int) -> str:
        """Take a token and return the text that it completes."""
        return self._take(self._tokens[token] if token < len(self._tokens) else b"")


class AnyTokenizer:
    """Any other tokenizer, by its own ``decode``, a line at a time.

    A line of more than `LINE` tokens has its beginning settled: cut off where decoding the rest
    alone gives the rest of the text.

    Args:
        tokenizer: The tokenizer within mlx-lm's ``TokenizerWrapper``.
        clean_spaces: Its ``decode`` removes spaces before punctuation, so that one at the end
            of the text is not yet certain.
    """

    def __init__(self, tokenizer: Any, *, clean_spaces: bool):
        self._tokenizer = tokenizer
        self._clean_spaces = clean_spaces
        self._tokens: list[int] = []
        self._settled = ""
        self._said = 0

    def feed(self, token: int) -> str:
        """Take a token and return the text that it completes."""
        self._tokens.append(token)
        text = whole = self._decode(self._tokens)
        if text.endswith(REPLACEMENT):
            # An incomplete character can decode to several replacements.
            text = text.rstrip(REPLACEMENT)
        elif self._clean_spaces:
            text = text.removesuffix(" ")
        if text.endswith("\n"):
            self._settled, text = self._settled + text, ""
            self._tokens.clear()
        elif len(self._tokens) > LINE and len(self._tokens) % TAIL == 0:
            text = self._settle(whole, text)
        return self._say(text)

    def finish(self) -> str:
        """Return what is left when no more tokens come."""
        self._settled += self._decode(self._tokens)
        self._tokens.clear()
        return self._say("")

    def _decode(self, tokens: list[int]) -> str:
        return cast("str", self._tokenizer.decode(tokens)) if tokens else ""

    def _say(self, text: str) -> str:
        whole = self._settled + text
        said, self._said = whole[self._said :], len(text)
        self._settled = ""
        return said

    def _settle(self, whole: str, text: str) -> str:
        """Move the beginning of the line to the settled text; return what stays open of it."""
        for n in range(TAIL, LINE):
            rest = self._decode(self._tokens[-n:])
            if rest and not rest.startswith(REPLACEMENT) and whole.endswith(rest):
                cut = len(whole) - len(rest)
                if cut <= len(text):
                    self._settled += text[:cut]
                    del self._tokens[:-n]
                    return text[cut:]
        if len(self._tokens) > 4 * LINE:
            # No tokenizer seen so far comes here; memory stays bounded even so.
            self._settled += whole
            self._tokens.clear()
            return ""
        return text

    def state(self) -> list[Any]:
        """Return all that the text to come depends on, JSON-ready."""
        return [list(self._tokens), self._said]

    def restore(self, state: list[Any]) -> None:
        """Go on from a `state`."""
        check(state, list, int)
        tokens, said = list(state[0]), state[1]
        check(tokens, *[int] * len(tokens))
        if said < 0 or len(tokens) > 5 * LINE:
            raise ValueError(said)
        try:
            self._decode(tokens)
        except Exception as error:
            # Tokenizers differ in what they raise for a token that they do not have.
            raise ValueError(tokens) from error
        self._tokens, self._said = tokens, said
