"""``--follow``: what comes is read, markers are answered, and a restart changes nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from folder import make_folder
from mlx_lm.sample_utils import make_sampler

import mlx_sink
from mlx_sink import SessionError, SinkConfig, Stream
from mlx_sink.commands.generate.autosave import Answering, Runner
from mlx_sink.commands.generate.follow import Follower
from mlx_sink.commands.generate.tail import Tail
from mlx_sink.stream.loop import Sampling
from mlx_sink.stream.text.chat import frame

CONFIG = SinkConfig(num_sinks=4, window=28)
LINES = ["the cat went to the sea\n", "@@\n", "\n", "the dog\n", " @@ \n", "é and the cat\n"]
SAMPLER = make_sampler(0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return mlx_sink.load(folder, CONFIG)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return mlx_sink.load(make_folder(tmp_path_factory.mktemp("models") / "c", chat=True), CONFIG)


class Following:
    """Follows a file until nothing is left to read, or until asked for the n-th time."""

    def __init__(
        self, loaded: tuple[Any, Any], source: Path, session: Path | None = None, step: int = 8
    ):
        self.loaded, self.source, self.session, self.step = loaded, source, session, step
        self.text = ""
        self.stream = Stream(*loaded, seed=2)

    def go(
        self, monkeypatch: pytest.MonkeyPatch, asks: int | None = None, question: str | None = None
    ) -> Following:
        asked, idle = [0], [False]
        monkeypatch.setattr(Tail, "wait", lambda _: idle.__setitem__(0, True))

        def interrupted() -> bool:
            asked[0] += 1
            return idle[0] or (asks is not None and asked[0] >= asks)

        note: dict[str, Any] = {}
        if self.session is not None and self.session.exists():
            self.stream = Stream.resume(self.session, *self.loaded)
            note = self.stream.note
        runner = Runner(
            self.stream,
            Answering(Sampling(SAMPLER), 9, ignore_eos=True),
            show=self.show,
            interrupted=interrupted,
            file=self.session,
            save_every=1,
            step=self.step,
            note=note,
        )
        around = frame(self.stream.tokenizer)
        Follower(runner, str(self.source), "@@", around, question).run()
        runner.save()
        self.runner = runner
        return self

    def show(self, text: str) -> None:
        self.text += text


def test_it_reads_line_by_line_and_answers_at_the_marker(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same as feeding by hand; the markers themselves are not read."""
    log = tmp_path / "log"
    log.write_text("".join(LINES))
    following = Following(loaded, log).go(monkeypatch, question="and then")
    by_hand, text = Stream(*loaded, seed=2), ""
    encode = by_hand.tokenizer.encode
    by_hand.feed(encode(""))  # the beginning of a text
    for line in LINES:
        if line.strip() != "@@":
            by_hand.feed(encode(line, add_special_tokens=False))
            continue
        by_hand.feed(encode("and then", add_special_tokens=False))
        for response in by_hand.generate(9, sampler=SAMPLER, ignore_eos=True):
            text += response.text
        text += "\n"
        by_hand.feed(encode("\n", add_special_tokens=False))
    assert following.text == text
    assert following.stream.position == by_hand.position
    assert following.text.count("\n") >= 2


def test_an_answer_under_way_ends_at_a_smaller_limit(loaded: tuple[Any, Any]):
    """A restart may ask for shorter answers than the one that it goes on with."""
    stream, text = Stream(*loaded, seed=2), list[str]()
    stream.feed("the cat")
    for made in (5, 3, 2):
        how = Answering(Sampling(SAMPLER), 3, ignore_eos=True)
        runner = Runner(stream, how, show=text.append, note={"place": {"made": made}})
        assert runner.answer() == "length"
        assert runner.tokens_made == max(0, 3 - made)


def test_a_chat_template_is_written_around_each_turn(
    chat: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    log = tmp_path / "log"
    log.write_text("the cat\n@@\nthe dog\n@@\n")
    read: list[int] = []
    plain = Stream.feed

    def feed(stream: Stream, tokens: Any, **options: Any) -> int:
        read.extend(tokens)
        return plain(stream, tokens, **options)

    monkeypatch.setattr(Stream, "feed", feed)
    Following(chat, log).go(monkeypatch)
    turn = "<|user|>the {}\n\n<|assistant|>"
    assert chat[1].decode(read) == turn.format("cat") + "\n" + turn.format("dog") + "\n<|user|>"


@pytest.mark.parametrize("asks", range(1, 30, 4))
def test_a_restart_changes_nothing(
    asks: int, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped between lines or in the middle of an answer, with the log growing meanwhile."""
    log, session = tmp_path / "log", tmp_path / "s"
    log.write_text("".join(LINES))
    whole = Following(loaded, log).go(monkeypatch)
    log.write_text("".join(LINES[:4]))
    first = Following(loaded, log, session).go(monkeypatch, asks)
    with log.open("a") as out:
        out.writelines(LINES[4:])
    second = Following(loaded, log, session).go(monkeypatch)
    assert first.text + second.text == whole.text
    assert second.stream.position == whole.stream.position
    assert second.runner.place["written"] == len(whole.text.encode())


def test_what_is_only_saved_now_and_then_is_gone_on_with_exactly(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As after a kill: from each save on disk the same text follows."""
    log, session = tmp_path / "log", tmp_path / "s"
    log.write_text("".join(LINES))
    whole = Following(loaded, log).go(monkeypatch)
    saves: list[bytes] = []
    plain = Stream.save

    def save(stream: Stream, path: Path, note: Any) -> None:
        plain(stream, path, note)
        saves.append(path.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "save", save)
        Following(loaded, log, session).go(monkeypatch)
    assert len(saves) > 18
    for content in saves:
        session.write_bytes(content)
        written = Stream.resume(session, *loaded).note["place"]["written"]
        again = Following(loaded, log, session).go(monkeypatch)
        assert whole.text.encode()[:written] + again.text.encode() == whole.text.encode()
        assert again.stream.position == whole.stream.position


def test_the_place_in_the_file_is_checked(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    log, session = tmp_path / "log", tmp_path / "s"
    log.write_text("the cat\n")
    for place in ({}, {"answering": 1}, [], {"offset": "1", "mark": "x", "answering": 0},
                  {"offset": -4, "mark": "", "answering": 0}):  # fmt: skip
        stream = Stream(*loaded)
        stream.save(session, {"place": {"follow": place}})
        with pytest.raises(SessionError, match="damaged"):
            Following(loaded, log, session).go(monkeypatch)


def test_memory_is_bounded_for_a_long_log_and_an_endless_line(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing waits that the model has not read, and its memory is flat."""
    log, marks, waiting = tmp_path / "log", [], [0]
    log.write_text("the cat and the dog went to the sea\n" * 1000 + "the sea " * 4000)
    plain = Runner.read

    def read(runner: Runner, tokens: Any, *args: Any, **options: Any) -> None:
        waiting[0] = max(waiting[0], len(tokens))
        plain(runner, tokens, *args, **options)
        marks.append(mx.get_active_memory())

    monkeypatch.setattr(Runner, "read", read)
    following = Following(loaded, log, step=512)
    following.go(monkeypatch)
    assert following.stream.position > 15_000
    assert waiting[0] <= 512 + 4096
    later = marks[len(marks) // 4 :]
    assert max(later) - min(later) < 300_000


def follow(folder: Path, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
    run = [sys.executable, "-m", "mlx_sink.generate", "--model", str(folder), "--marker", "@@"]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen([*run, *argv, "-m", "8", "--ignore-eos", "--window", "28"],
                            bufsize=0, **pipes, **options)  # fmt: skip


def test_standard_input_is_answered_as_it_comes(folder: Path):
    process = follow(folder, "--follow", "-", "--json")
    assert process.stdin is not None
    assert process.stdout is not None
    for line in (b"the cat\n@@\n", b"the dog\n@@\n"):
        process.stdin.write(line)
        assert process.stdout.read(1)  # before the input ends
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert json.loads(said.splitlines()[-1])["generation_tokens"] == 16


def test_ctrl_c_is_a_normal_end_and_the_session_goes_on(folder: Path, tmp_path: Path):
    log, session = tmp_path / "log", tmp_path / "s"
    log.write_text("the cat\n@@\n")
    options = ["--follow", str(log), "--session", str(session), "--json"]
    positions: list[int] = []
    for line in ("the dog\n@@\n", "the sea\n@@\n"):
        process = follow(folder, *options)
        assert process.stdout is not None
        assert process.stdout.read(1)
        with log.open("a") as out:
            out.write(line)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert b"Traceback" not in said
        statistics = json.loads(said.splitlines()[-1])
        positions.append(statistics["position"])
    assert positions[1] > positions[0] > 1
