"""Read what is appended to a file or a pipe, answer where it says so, and read on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from mlx_sink.commands.generate.autosave import Runner
from mlx_sink.commands.generate.tail import MARK, Tail
from mlx_sink.errors import SessionError
from mlx_sink.io import terminal
from mlx_sink.stream.session import natural
from mlx_sink.stream.text.chat import Frame, render_again
from mlx_sink.stream.text.encode import Encoder, Piece

LONG = 1 << 18
"""Bytes of a file that take a while to read: from here on a bar is shown."""


def check_place(place: Any) -> None:
    """Check what a session says of the place in the followed file.

    Raises:
        ValueError: It is not what `Follower` notes. Other errors come from values of other types.
    """
    known = {"offset", "mark", "head", "answering"}
    if not known - {"head"} <= place.keys() <= known or type(place["answering"]) is not bool:
        raise ValueError(place)
    mark, head = (bytes.fromhex(place.get(name, "")) for name in ("mark", "head"))
    if max(len(mark), len(head)) > MARK or len(mark) > natural(place["offset"]):
        raise ValueError(place)


class Follower:
    """One run: lines in, answers out, at any length in constant memory.

    Every line is encoded by itself, so that the result does not depend on when it came.

    Args:
        runner: Reads, answers and saves. Its place keeps ours, so a session goes on in the
            middle of a file, and in the middle of an answer.
        source: As in `Tail`.
        marker: The line to answer at, spaces around it aside. It is not read itself.
        around: What the chat template writes around each turn.
        question: What is asked at each marker, after all that was read.
        special: Control tokens count in what is read; by default they are text there.

    Raises:
        InputError: The file cannot be read.
        SessionError: The saved place is not one of ours.
    """

    def __init__(
        self,
        runner: Runner,
        source: str,
        marker: str,
        around: Frame,
        question: str | None = None,
        *,
        special: bool = False,
    ):
        self._runner, self._marker, self._around = runner, marker.strip(), around
        self._question, self._special = question or "", special
        self._encoder = Encoder(runner.stream.tokenizer)
        saved = runner.place.get("follow")
        try:
            if saved is not None:
                check_place(saved)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise SessionError("the session's place in the followed file is damaged") from None
        self._tail = Tail(source, saved, terminal.warn)
        self._began = saved is not None
        self._place: dict[str, Any] = {"answering": saved is not None and saved["answering"]}
        runner.place["follow"] = self._place
        self._waiting: list[int] = []

    def run(self) -> None:
        """Follow until interrupted, or until standard input is closed."""
        runner = self._runner
        self._note_place()
        if runner.stream.position == 0:
            around = self._around
            self._waiting = self._encoder.encode(*around.before, first=around.first)
        elif not self._began:
            self._read_again()
        if self._place["answering"]:
            self._go_on_answering()
        bar = _bar(self._tail.backlog())
        try:
            while not runner.interrupted():
                piece = self._tail.next()
                if piece is None:
                    bar.close()
                    self._read()
                    if self._tail.ended:
                        break
                    self._tail.wait()
                elif piece.whole and piece.text.strip() == self._marker:
                    self._answer()
                else:
                    self._waiting += self._encoder.encode(Piece(piece.text, self._special))
                    bar.update(len(piece.text.encode()))
                    if len(self._waiting) >= runner.step:
                        self._read()
        finally:
            bar.close()
            self._tail.close()

    def _note_place(self) -> None:
        """Note how far the file is read; only while nothing read from it waits."""
        self._place.update(self._tail.place)

    def _read(self) -> None:
        """Let the model read what waits."""
        self._read_now(self._waiting)
        self._waiting = []
        self._note_place()
        self._runner.save_if_due()

    def _read_now(self, tokens: Sequence[int], recall: bool | None = None) -> None:
        if tokens:
            self._runner.read(tokens, whole=True, recall=recall)

    def _read_again(self) -> None:
        """Read what stands between an answer and the next words."""
        runner = self._runner
        ended = runner.place["ended"]
        self._read_now(render_again(runner.stream.tokenizer, "", self._around, ended))

    def _answer(self) -> None:
        """Read what waits and the question, and answer; nothing is saved before the answer is."""
        asked = self._encoder.encode(Piece(self._question, self._special), *self._around.ask)
        self._read_now(self._waiting)
        self._read_now(asked, recall=True)
        self._waiting = []
        self._note_place()
        if self._runner.stream.position == 0:
            terminal.warn("there is nothing to answer to yet")
            return
        self._runner.place["made"] = 0
        self._place["answering"] = True
        self._go_on_answering()

    def _go_on_answering(self) -> None:
        if self._runner.answer() is None:
            return
        self._runner.show(self._runner.stream.flush() + "\n")
        self._read_again()
        self._place["answering"] = False
        self._runner.save_if_due()


def _bar(backlog: int) -> tqdm[Any]:
    """Return a bar for what a file holds already; one that is not shown if that is little."""
    return terminal.bar(backlog, "reading", "B", unit_scale=True, disable=backlog < LONG)
