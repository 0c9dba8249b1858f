"""Text in, endless text out: one stream, to feed, to let write, to save and to copy."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from threading import Event
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_sink.config import NUM_DRAFT_TOKENS, PREFILL_STEP
from mlx_sink.errors import InputError
from mlx_sink.models.attach import make_cache
from mlx_sink.stream import checks, session
from mlx_sink.stream.answer import Answer, hidden_tokens, response
from mlx_sink.stream.loop import PENALTY_WINDOW, Loop, Made, Progress, quiet
from mlx_sink.stream.place import Place
from mlx_sink.stream.sampler import LogitsProcessor, Sampler, Sampling, fresh_key, greedy
from mlx_sink.stream.session import Saved
from mlx_sink.stream.speculative import draft_over
from mlx_sink.stream.text.detokenize import detokenizer_for
from mlx_sink.stream.text.encode import Encoder, Piece
from mlx_sink.stream.text.stop_strings import ShownText
from mlx_sink.stream.text.tokens import token_ids
from mlx_sink.stream.wired import wired


class Stream(Place):
    """One endless text: what a model has read and written, held in constant memory.

    Feed it, let it generate, feed it again, for as long as you like. Streams of one model share
    nothing but its weights: each has its own caches and random numbers, and may run in a thread
    of its own. One stream is for one thread at a time; only `cancel` may come from any.

    Args:
        model: A model from `load`, or one given to `attach`.
        tokenizer: Its tokenizer.
        seed: Of the stream's random numbers; by default drawn from MLX's own.
        penalty_window: Newest tokens that logits processors (repetition penalties) see.
        draft_model: A smaller model, attached too, that guesses tokens ahead. The text is the
            model's own all the same, and comes faster where many guesses are right. Both are
            attached with a ``rollback`` of at least ``num_draft_tokens``.
        num_draft_tokens: Tokens guessed at once.

    Attributes:
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        note: What `save` noted, where the stream was resumed.

    Raises:
        CacheError: The model is not attached, or cannot take drafted tokens back.
        InputError: The penalty window is empty, or no token is to be drafted.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        seed: int | None = None,
        penalty_window: int = PENALTY_WINDOW,
        draft_model: nn.Module | None = None,
        num_draft_tokens: int = NUM_DRAFT_TOKENS,
    ):
        checks.integer("penalty_window", penalty_window, 1)
        caches: list[Any] = list(make_cache(model))
        key = fresh_key(seed)
        draft = draft_over(caches, draft_model, num_draft_tokens)
        loop = Loop(model, caches, key=key, penalty_window=penalty_window, draft=draft)
        self._begin(loop, tokenizer)

    def _begin(self, loop: Loop, tokenizer: Any) -> None:
        self._loop = loop
        loop.settle()
        wrapped = isinstance(tokenizer, TokenizerWrapper)
        self.tokenizer: Any = tokenizer if wrapped else TokenizerWrapper(tokenizer)
        self.note: dict[str, Any] = {}
        self._whose: dict[str, str] | None = None
        self._known: dict[str, str] = {}  # sums of files, to notice what others save there
        self._text: ShownText | None = None
        self._generation = 0
        self._cancelled = Event()
        self._read = 0
        self._reading_s = 0.0

    @classmethod
    def over(cls, model: nn.Module, tokenizer: Any, caches: list[Any]) -> Stream:
        """Return a stream over given caches, which draws from MLX's own random state."""
        stream = cls.__new__(cls)
        stream._begin(Loop(model, caches, key=None), tokenizer)
        return stream

    @classmethod
    def resume(
        cls,
        path: str | Path | Saved,
        model: nn.Module,
        tokenizer: Any,
        *,
        draft_model: nn.Module | None = None,
        num_draft_tokens: int = NUM_DRAFT_TOKENS,
    ) -> Stream:
        """Return a stream that goes on where `save` was called.

        Args:
            path: The file, or what `session.read` has read from it.
            model: The same model, attached with the same settings.
            tokenizer: Its tokenizer.
            draft_model: As in the class. Drafts are not saved: it reads the newest tokens anew.
            num_draft_tokens: As in the class.

        Raises:
            SessionError: The file is missing, damaged, not a session, or of another model,
                tokenizer or setting.
        """
        stream = cls.__new__(cls)
        saved = path if isinstance(path, Saved) else session.read(Path(path))
        whose = session.fingerprint(model, tokenizer)
        loop = session.resume(saved, model, whose)
        loop.draft = draft_over(loop.caches, draft_model, num_draft_tokens)
        if loop.draft and loop.recent:
            loop.draft.read(list(loop.recent))
        stream._begin(loop, tokenizer)
        stream._whose, stream._known, stream.note = whose, dict(saved.known), deepcopy(saved.note)
        stream._text = session.open_text(saved, stream.tokenizer)
        return stream

    def save(self, path: str | Path, note: Mapping[str, Any] | None = None) -> None:
        """Save the stream, so that `resume` goes on exactly: text, positions and sampling.

        The file before stays whole until the new one is on disk. May be called between two
        tokens of `generate`, and from the ``progress`` of `feed`.

        Args:
            path: A safetensors file of tensors and JSON.
            note: Anything JSON-ready to keep with it, found in `note` after `resume`.

        Raises:
            OutputError: It cannot be written, or another process is at it; the file is as before.
            SessionError: Another stream was saved there since, and would be lost.
            CacheError: The stream is in the middle of a step of another thread.
        """
        self.note = dict(self.note if note is None else note)
        if self._whose is None:
            self._whose = session.fingerprint(self.model, self.tokenizer)
        text = self._text.state() if self._text else None
        session.save(Path(path), self._loop, text, self._whose, self.note, self._known)

    def fork(self) -> Stream:
        """Return an independent copy, which goes on as this one would.

        It has caches, random numbers and held-back text of its own, at the same values.

        Raises:
            CacheError: The stream is in the middle of a step of another thread.
        """
        fork = type(self).__new__(type(self))
        fork._begin(self._loop.fork(), self.tokenizer)
        fork.note, fork._whose, fork._known = dict(self.note), self._whose, dict(self._known)
        if self._text is not None:
            fork._text = ShownText.restored(detokenizer_for(self.tokenizer), self._text.state())
        return fork

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the tokens that `feed` reads for a text.

        What the tokenizer puts before a text goes before the very first one only.

        Args:
            text: The text.
            special: Control tokens such as ``<|im_end|>`` count in it, as in one that a chat
                template has rendered. By default they are the text that they are: what comes
                from a person or a file opens no turns.

        Raises:
            InputError: The tokenizer makes a control token of a text whatever is tried.
        """
        return Encoder(self.tokenizer).encode(Piece(text, special), first=self.position == 0)

    def feed(
        self,
        text: str | Sequence[int] | mx.array,
        *,
        special: bool = False,
        recall: bool | None = None,
        prefill_step_size: int = PREFILL_STEP,
        progress: Progress = quiet,
    ) -> int:
        """Read text or tokens, of any length.

        Text of the last answer that is still held back is dropped: see `flush`.

        Args:
            text: Text, which is encoded as is, or token ids.
            special: As in `encode`.
            recall: This is a question: its tokens look up evicted ones, as the answer's do. By
                default only with ``SinkConfig(recall_mode="always")``. Without
                ``SinkConfig(recall=...)`` there is nothing to look up.
            prefill_step_size: Tokens read at once.
            progress: Called between the chunks with the tokens read so far and all of them.

        Returns:
            The tokens read; fewer than given only if `cancel` was called meanwhile.

        Raises:
            InputError: There is nothing to read, or a token is not in the model's vocabulary.
        """
        ids = self.encode(text, special=special) if isinstance(text, str) else text
        tokens = token_ids(ids, self._loop.vocabulary, self.tokenizer)
        if not tokens:
            raise InputError("the prompt is empty")
        checks.integer("prefill_step_size", prefill_step_size, 1)
        self._cancelled.clear()
        self._generation += 1
        self._text = None
        began = time.perf_counter()
        with wired(self.model):
            read = self._loop.read(
                tokens,
                prefill_step_size,
                progress,
                self._cancelled.is_set,
                self.recalls_always if recall is None else recall,
            )
        self._read += read
        self._reading_s += time.perf_counter() - began
        return read

    def generate(
        self,
        max_tokens: int = 256,
        *,
        sampler: Sampler = greedy,
        logits_processors: Sequence[LogitsProcessor] = (),
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        show_special_tokens: bool = False,
        flush: bool = True,
    ) -> Iterator[GenerationResponse]:
        """Write on, piece by piece, from where the stream stands.

        A token that has been yielded is part of the stream, and may be the last: breaking off,
        saving or forking between two of them is exact.

        Args:
            max_tokens: Tokens to generate; -1 for no limit.
            sampler: Picks the token, as from mlx-lm's ``make_sampler``.
            logits_processors: As from mlx-lm's ``make_logits_processors``; they see the newest
                ``penalty_window`` tokens.
            stop: Strings that end the text; they are not part of it.
            ignore_eos: Go on after an end-of-text token.
            show_special_tokens: Control tokens are part of the text, as with mlx-lm. By default
                only those that a stop string names are.
            flush: When ``max_tokens`` is reached, hand out text that is held back (half a
                character, what may begin a stop string). Without, the next `generate` goes on
                with the same text, as if there had been no pause.

        Yields:
            mlx-lm's ``GenerationResponse``: one for each token, its text possibly empty. After
            `cancel` there are no more.

        Raises:
            InputError: ``max_tokens`` is out of range, or an argument is of another type.
            CacheError: Nothing was read yet.
        """
        checks.integer("max_tokens", max_tokens, 1, besides=-1)
        stop = checks.strings("stop", stop)
        processors = checks.functions("logits_processors", logits_processors)
        self._cancelled.clear()
        self._generation += 1
        if self._text is None or self._text.stops != stop:
            self._text = ShownText(detokenizer_for(self.tokenizer), stop)
        answer = Answer(
            self._text,
            frozenset[int]() if ignore_eos else frozenset(self.tokenizer.eos_token_ids),
            frozenset[int]() if show_special_tokens else hidden_tokens(self.tokenizer, stop),
            max_tokens,
            flush,
        )
        return self._responses(self._loop.tokens(Sampling(sampler, processors)), answer)

    def _responses(self, tokens: Iterator[Made], answer: Answer) -> Iterator[GenerationResponse]:
        """Turn tokens into text until one of the reasons to stop comes up."""
        generation, n, reason = self._generation, 0, None
        read = self._read, self._read / max(self._reading_s, 1e-9)
        self._read, self._reading_s = 0, 0.0
        began = time.perf_counter()
        with wired(self.model):
            try:
                while not reason and not self._cancelled.is_set():
                    if generation != self._generation:
                        raise InputError("the stream has moved on since: this answer is over")
                    made = next(tokens)
                    n += 1
                    shown, reason = answer.take(made.token, n)
                    if reason == "stop" or (reason and answer.flush):
                        self._text = None
                    yield response(shown, made, n, reason, read, began)
            finally:
                self._loop.settle()

    def rollback(self, n: int) -> None:
        """Take back the newest ``n`` tokens, as if they had never been read or made.

        An open answer ends, and what it holds back of its text is dropped. Random numbers are
        not taken back, so that another answer may come.

        Args:
            n: At most the ``rollback`` that the model is attached with, less what other tokens
                that were taken back just before have used up; any number until the first
                eviction. Drafts use the same slots.

        Raises:
            CacheError: More than can be taken back; nothing has changed then.
        """
        self._generation += 1
        self._loop.rollback(checks.integer("n", n, 0))
        self._text = None

    def flush(self) -> str:
        """End the answer, and return the text of it that is still held back."""
        text, self._text = self._text, None
        return text.finish() if text else ""

    def cancel(self) -> None:
        """Stop what runs: `generate` within one token, `feed` within one chunk.

        May be called from any thread. The stream stands at the last token that was handed out,
        and can be fed and gone on with. When nothing runs, nothing happens.
        """
        self._cancelled.set()
