"""Text in, endless text out: one stream, to feed, to let write, to save and to copy."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_sink.config import NUM_DRAFT_TOKENS, PREFILL_STEP
from mlx_sink.errors import InputError, SessionError
from mlx_sink.io.tensors import Known
from mlx_sink.models.attach import make_cache
from mlx_sink.stream import session
from mlx_sink.stream.loop import PENALTY_WINDOW, Loop, Made, Progress, quiet, wired
from mlx_sink.stream.sampler import LogitsProcessor, Sampler, Sampling, fresh_key, greedy
from mlx_sink.stream.session import Saved
from mlx_sink.stream.speculative import Draft, check_caches
from mlx_sink.stream.text.control import control_of
from mlx_sink.stream.text.detokenize import detokenizer_for
from mlx_sink.stream.text.encode import Encoder, Piece
from mlx_sink.stream.text.stop_strings import ShownText
from mlx_sink.stream.text.tokens import token_ids


class Stream:
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
        if penalty_window < 1:
            raise InputError(f"penalty_window must be at least 1, got {penalty_window}")
        caches: list[Any] = list(make_cache(model))
        key = fresh_key(seed)
        draft = _draft(caches, draft_model, num_draft_tokens)
        loop = Loop(model, caches, key=key, penalty_window=penalty_window, draft=draft)
        self._begin(loop, tokenizer)

    def _begin(self, loop: Loop, tokenizer: Any) -> None:
        self._loop = loop
        loop.settle()
        wrapped = isinstance(tokenizer, TokenizerWrapper)
        self.tokenizer: Any = tokenizer if wrapped else TokenizerWrapper(tokenizer)
        self.note: dict[str, Any] = {}
        self._whose: dict[str, str] | None = None
        self._known: Known = {}
        self._text: ShownText | None = None
        self._turn = 0
        self._cancelled = Event()
        self._read = 0
        self._reading_s = 0.0

    @classmethod
    def over(cls, model: nn.Module, tokenizer: Any, caches: list[Any]) -> Stream:
        """Return a stream over given caches, which draws from MLX's own random state.

        This is what mlx-lm's functions do; a stream of its own is more often wanted.
        """
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
        restored = session.resume(saved, model, whose)
        loop = restored.loop
        loop.draft = _draft(loop.caches, draft_model, num_draft_tokens)
        if loop.draft and loop.recent:
            loop.draft.read(list(loop.recent))
        stream._begin(loop, tokenizer)
        stream._whose, stream.note, stream._known = whose, restored.note, dict(saved.known)
        if restored.text is not None:
            try:
                fresh = detokenizer_for(stream.tokenizer)
                stream._text = ShownText.restored(fresh, restored.text)
            except (TypeError, ValueError):
                name = repr(str(saved.path))
                raise SessionError(f"session {name} does not fit the tokenizer") from None
        return stream

    def save(self, path: str | Path, note: Mapping[str, Any] | None = None) -> None:
        """Save the stream, so that `resume` goes on exactly: text, positions and sampling.

        The file before stays whole until the new one is on disk. May be called between two
        tokens of `generate`, and from the ``progress`` of `feed`.

        Args:
            path: A safetensors file of tensors and JSON.
            note: Anything JSON-ready to keep with it, found in `note` after `resume`.

        Raises:
            OutputError: It cannot be written, or another process is at it; the file before is
                as it was.
            SessionError: Another stream has been saved there since this one was saved there or
                resumed from it: what that one holds would be lost.
            CacheError: The stream is in the middle of a step of another thread.
        """
        self.note = dict(self.note if note is None else note)
        if self._whose is None:
            self._whose = session.fingerprint(self.model, self.tokenizer)
        text = self._text.state() if self._text else None
        session.save(Path(path), self._loop, text, self._whose, self.note, self._known)

    def fork(self) -> Stream:
        """Return an independent copy, which goes on as this one would.

        It has caches and random numbers of its own, at the same values. Text that is held back
        goes with it.

        Raises:
            CacheError: The stream is in the middle of a step of another thread.
        """
        fork = type(self).__new__(type(self))
        fork._begin(self._loop.fork(), self.tokenizer)
        fork.note, fork._whose, fork._known = dict(self.note), self._whose, dict(self._known)
        if self._text is not None:
            fork._text = ShownText.restored(detokenizer_for(self.tokenizer), self._text.state())
        return fork

    @property
    def model(self) -> nn.Module:
        """The model that the stream runs on."""
        return self._loop.model

    @property
    def caches(self) -> list[Any]:
        """The stream's caches, one for each layer."""
        return self._loop.caches

    @property
    def position(self) -> int:
        """Tokens read and made since the stream began."""
        return self._loop.position

    @property
    def nbytes(self) -> int:
        """Bytes of the caches, the draft model's included."""
        draft = self._loop.draft
        caches = [*self.caches, *(draft.caches if draft else [])]
        return sum(cache.nbytes for cache in caches)

    @property
    def drafted(self) -> tuple[int, int]:
        """Tokens that the draft model has guessed so far, and how many of them were right."""
        draft = self._loop.draft
        return (draft.guessed, draft.right) if draft else (0, 0)

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
        prefill_step_size: int = PREFILL_STEP,
        progress: Progress = quiet,
    ) -> int:
        """Read text or tokens, of any length.

        Text of the last answer that is still held back is dropped: see `flush`.

        Args:
            text: Text, which is encoded as is, or token ids.
            special: As in `encode`.
            prefill_step_size: Tokens read at once.
            progress: Called between the chunks with the tokens read so far and all of them.

        Returns:
            The tokens read; fewer than given only if `cancel` was called meanwhile.

        Raises:
            InputError: There is nothing to read, or a token is not in the model's vocabulary.
        """
        tokens = self._tokens(text, special)
        if not tokens:
            raise InputError("the prompt is empty")
        if prefill_step_size < 1:
            raise InputError(f"prefill_step_size must be at least 1, got {prefill_step_size}")
        self._cancelled.clear()
        self._turn += 1
        self._text = None
        began = time.perf_counter()
        with wired(self.model):
            read = self._loop.read(tokens, prefill_step_size, progress, self._cancelled.is_set)
        self._read += read
        self._reading_s += time.perf_counter() - began
        return read

    def _tokens(self, text: str | Sequence[int] | mx.array, special: bool) -> list[int]:
        tokens = self.encode(text, special=special) if isinstance(text, str) else text
        return token_ids(tokens, self._loop.vocabulary, self.tokenizer)

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
            InputError: ``max_tokens`` is out of range.
            CacheError: Nothing was read yet.
        """
        if max_tokens == 0 or max_tokens < -1:
            raise InputError(f"max_tokens must be positive, or -1 for no limit, got {max_tokens}")
        self._cancelled.clear()
        self._turn += 1
        if self._text is None or self._text.stops != tuple(stop):
            self._text = ShownText(detokenizer_for(self.tokenizer), stop)
        hidden = frozenset[int]() if show_special_tokens else self._hidden(stop)
        tokens = self._loop.tokens(Sampling(sampler, tuple(logits_processors)))
        return self._responses(tokens, self._text, hidden, max_tokens, ignore_eos, flush)

    def _hidden(self, stop: Sequence[str]) -> frozenset[int]:
        """Return the tokens that are not shown; what a stop string names is looked for in text."""
        control = control_of(self.tokenizer)
        named = {i for word, i in control.words.items() if any(word in text for text in stop)}
        return control.hidden - named

    def _responses(
        self,
        tokens: Iterator[Made],
        text: ShownText,
        hidden: frozenset[int],
        max_tokens: int,
        ignore_eos: bool,
        flush: bool,
    ) -> Iterator[GenerationResponse]:
        """Turn tokens into text until one of the reasons to stop comes up."""
        turn, n, reason = self._turn, 0, None
        read, tps = self._read, self._read / max(self._reading_s, 1e-9)
        self._read, self._reading_s = 0, 0.0
        began = time.perf_counter()
        with wired(self.model):
            try:
                while not reason and not self._cancelled.is_set():
                    if turn != self._turn:
                        raise InputError("the stream has moved on since: this answer is over")
                    token, logprobs, from_draft = next(tokens)
                    n += 1
                    ended = token in self.tokenizer.eos_token_ids and not ignore_eos
                    shown = "" if ended or token in hidden else text.feed(token)
                    full = n == max_tokens
                    reason = "stop" if ended or text.stopped else "length" if full else None
                    if not text.stopped and (ended or (full and flush)):
                        shown += text.finish()
                    if reason == "stop" or (full and flush):
                        self._text = None
                    yield GenerationResponse(
                        text=shown,
                        token=token,
                        logprobs=logprobs,
                        from_draft=from_draft,
                        prompt_tokens=read,
                        prompt_tps=tps,
                        generation_tokens=n,
                        generation_tps=n / max(time.perf_counter() - began, 1e-9),
                        peak_memory=mx.get_peak_memory() / 1e9,
                        finish_reason=reason,
                    )
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
        self._turn += 1
        self._loop.rollback(n)
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


def _draft(caches: list[Any], draft_model: nn.Module | None, n: int) -> Draft | None:
    """Return the draft of a stream over some caches, if it is to have one."""
    if draft_model is None:
        return None
    of_draft: list[Any] = list(make_cache(draft_model))
    check_caches(caches, n, "model")
    check_caches(of_draft, n, "draft model")
    return Draft(draft_model, of_draft, n)
