"""A stream that shows what it writes and is saved as it goes: what a command runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_sink.commands.generate.options import SAVE_EVERY
from mlx_sink.config import PREFILL_STEP
from mlx_sink.errors import OutputError
from mlx_sink.io import terminal
from mlx_sink.stream.loop import Progress, Sampling, quiet
from mlx_sink.stream.stream import GenerationResponse, Stream


@dataclass(frozen=True, slots=True)
class Answering:
    """How answers are made; fields as in `Stream.generate`."""

    sampling: Sampling
    max_tokens: int = 256
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    show_special_tokens: bool = False


class Runner:
    """Read and answer, show the text, and save what is needed to go on.

    Text is shown before the token it belongs to can be saved. So after a crash, the first
    ``place["written"]`` bytes of what was shown are what the saved stream has said.

    Args:
        stream: The stream.
        answering: How answers are made.
        show: Takes each piece of text.
        interrupted: Asked between tokens and chunks; once true, what runs comes to an end.
        file: Where the stream is saved; ``None`` to save nothing.
        save_every: Tokens between two saves.
        step: Tokens read at once.
        note: JSON-ready, saved with the stream.

    Attributes:
        place: The part of the note that says where the command stands: ``read`` and ``made``
            count the tokens of the current turn, ``written`` all bytes of text, and ``ended``
            tells that the last token is an end-of-text token.
        last: The last token's response.
        tokens_read: Tokens read in this run.
        reading_s: Seconds that it took.
        tokens_made: Tokens made in this run.
        failures: Saves that failed in this run.
    """

    def __init__(
        self,
        stream: Stream,
        answering: Answering,
        *,
        show: Callable[[str], None],
        interrupted: Callable[[], bool] = lambda: False,
        file: Path | None = None,
        save_every: int = SAVE_EVERY,
        step: int = PREFILL_STEP,
        note: dict[str, Any] | None = None,
    ):
        self.stream, self.answering = stream, answering
        self.interrupted = interrupted
        self.step = step
        self.last: GenerationResponse | None = None
        self.tokens_read = self.tokens_made = self.failures = 0
        self.reading_s = 0.0
        self._show = show
        self._file, self._every = file, save_every
        self._note = {} if note is None else note
        start = {"read": 0, "made": 0, "written": 0, "ended": False}
        self.place: dict[str, Any] = start | self._note.get("place", {})
        self._note["place"] = self.place
        self._saved_at = stream.position

    def show(self, text: str) -> None:
        """Show a piece of text, and count it.

        Where it cannot be shown it stays in the place: a run that goes on shows it first.
        """
        text = self.place.pop("unshown", "") + text
        if text:
            self.place["unshown"] = text
            self._show(text)
            del self.place["unshown"]
            self.place["written"] += len(text.encode("utf-8", "replace"))

    def read(
        self,
        tokens: Sequence[int],
        progress: Progress = quiet,
        *,
        whole: bool = False,
        recall: bool | None = None,
    ) -> None:
        """Read tokens, and save on the way.

        Args:
            tokens: At least one.
            progress: As in `Stream.feed`.
            whole: Neither stop nor save before all are read.
            recall: As in `Stream.feed`.
        """
        before = self.place["read"]
        self.place["ended"] = False

        def between(done: int, total: int) -> None:
            self.place["read"] = before + done
            progress(done, total)
            if not whole:
                if self.interrupted():
                    self.stream.cancel()
                self.save_if_due()

        began = time.perf_counter()
        read = self.stream.feed(
            tokens, recall=recall, prefill_step_size=self.step, progress=between
        )
        self.tokens_read += read
        self.reading_s += time.perf_counter() - began

    @property
    def reading_tps(self) -> float:
        """Tokens read in a second."""
        return self.tokens_read / max(self.reading_s, 1e-9)

    def answer(self) -> str | None:
        """Write until the answer of ``place["made"]`` tokens so far is over.

        Returns:
            mlx-lm's finish reason; ``None`` if interrupted.
        """
        how = self.answering
        # An answer that was begun under a larger limit may be longer than this one's already.
        left = -1 if how.max_tokens < 0 else max(0, how.max_tokens - self.place["made"])
        if left == 0:
            return "length"
        for response in self.stream.generate(
            left,
            sampler=how.sampling.sampler,
            logits_processors=how.sampling.processors,
            stop=how.stop,
            ignore_eos=how.ignore_eos,
            show_special_tokens=how.show_special_tokens,
            flush=False,
        ):
            self.last = response
            self.tokens_made += 1
            self.place["made"] += 1
            self.show(response.text)
            if response.finish_reason:
                ids = self.stream.tokenizer.eos_token_ids
                self.place["ended"] = response.token in ids and not how.ignore_eos
                return response.finish_reason
            if self.interrupted():
                break
            self.save_if_due()
        return None

    def save_if_due(self) -> None:
        """Save if enough tokens came since; where that fails, warn and go on."""
        if self._file is None or self.stream.position - self._saved_at < self._every:
            return
        self._saved_at = self.stream.position
        try:
            self.stream.save(self._file, self._note)
        except OutputError as error:
            self.failures += 1
            terminal.warn(
                f"{error}; the one before is whole, and the next try is in {self._every} tokens"
            )

    def save(self) -> None:
        """Save now.

        Raises:
            OutputError: It cannot be written.
        """
        if self._file is not None:
            self.stream.save(self._file, self._note)
            self._saved_at = self.stream.position
