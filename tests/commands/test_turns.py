"""``--session``: whatever happens to the command, its text is that of a run left alone."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from folder import make_folder

from mlx_sink import ConfigError, InputError, OutputError, SessionError, SinkConfig, Stream, attach
from mlx_sink.commands.generate import resume as turns
from mlx_sink.commands.generate.command import main
from mlx_sink.io import tensors as store
from mlx_sink.io import terminal
from mlx_sink.stream.text.chat import frame, render_again

SAMPLING = shlex.split("--temp 0.9 --top-p 0.95 --repetition-penalty 1.2 --seed 3 --ignore-eos")
PROMPT = ["-p", "the cat and the dog went to the sea " * 5, "--prefill-step-size", "16"]
SMALL = ["--window", "20", "--save-every", "7"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "chat", chat=True)


Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command; return its text and its messages."""

    def run(*argv: str, status: int = 0, model: Path = folder) -> tuple[str, str]:
        assert main(["--model", str(model), *argv]) == status
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture
def whole(run: Run) -> str:
    """The text of 60 tokens, left alone."""
    return run(*SAMPLING, *SMALL, *PROMPT, "-m", "60")[0].removesuffix("\n")


def test_a_session_goes_on_where_it_was_left(run: Run, whole: str, tmp_path: Path):
    session = ["--session", str(tmp_path / "s")]
    text, _ = run(*SAMPLING, *SMALL, *PROMPT, *session, "-m", "25")
    more, said = run(*session, "-m", "34")
    last, _ = run(*session, "-m", "1", "--json")
    assert text + more + last == whole
    assert f"after {len(text.encode())} bytes of text" in said
    assert os.listdir(tmp_path) == ["s"]


class Nth:
    """An interrupt that comes when it is asked for the n-th time."""

    left = 0
    status = 0

    def __call__(self) -> bool:
        Nth.left -= 1
        if Nth.left < 0:
            self.status = 130
        return self.status != 0

    def __enter__(self) -> Nth:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 20, 40, 63])
def test_an_interrupted_turn_is_finished(
    n: int, run: Run, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the middle of the prompt and of the answer; the same command ends it."""
    argv = [*SAMPLING, *SMALL, *PROMPT, "--session", str(tmp_path / "s"), "-m", "60"]
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "Interrupt", Nth)
        Nth.left = n
        first, _ = run(*argv, status=130)
    rest, _ = run(*argv)
    assert first + rest == whole
    assert len(rest) > 0


def test_a_session_is_read_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It may be large, and another one may take its place between two looks at it."""
    argv = [*SAMPLING, *SMALL, *PROMPT, "--session", str(tmp_path / "s"), "-m"]
    first, _ = run(*argv, "20")
    opened, read = list[Any](), store._read
    monkeypatch.setattr(store, "_read", lambda *args: (opened.append(args), read(*args))[1])
    rest, _ = run("--session", str(tmp_path / "s"), "-m", "10")
    assert len(opened) == 1
    monkeypatch.undo()
    assert first + rest == run(*argv[:-2], str(tmp_path / "t"), "-m", "30")[0]


def test_another_question_begins_another_turn(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    session = ["--session", str(tmp_path / "s")]
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "Interrupt", Nth)
        Nth.left = 8
        run(*SAMPLING, *SMALL, *PROMPT, *session, "-m", "60", status=130)
    _, said = run(*session, "-p", "the sea", "-m", "5", "--json")
    statistics = json.loads(said.splitlines()[-1])
    assert statistics["position"] == statistics["resumed_at"] + statistics["prompt_tokens"] + 5
    assert statistics["generation_tokens"] == 5


def test_the_same_question_twice_is_asked_twice(run: Run, tmp_path: Path):
    argv = [*SAMPLING, *SMALL, "--session", str(tmp_path / "s"), "-p", "the sea", "-m", "5"]
    run(*argv)
    statistics = json.loads(run(*argv, "--json")[1].splitlines()[-1])
    assert statistics["prompt_tokens"] > 0


def test_a_run_killed_before_it_read_anything_begins_anew(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its file holds an empty stream, and its luck."""

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    argv = [*SAMPLING, *SMALL, "-m", "20", "--session", str(tmp_path / "s")]
    with monkeypatch.context() as patch:
        patch.setattr(turns, "take", die)
        with pytest.raises(KeyboardInterrupt):
            run(*argv)
    text, said = run(*argv)
    assert "at token 0" in said
    assert run(*argv[:-1], str(tmp_path / "t"))[0] == text


def test_without_the_prompt_it_cannot_read_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    session = ["--session", str(tmp_path / "s")]
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "Interrupt", Nth)
        Nth.left = 1
        run(*SAMPLING, *SMALL, *PROMPT, *session, "-m", "60", status=130)
    with pytest.raises(ConfigError, match="give the prompt again"):
        run(*session, "-m", "60")


def test_later_turns_are_what_the_chat_template_writes(
    chat_folder: Path, run: Run, tmp_path: Path
):
    """The tokens of a whole conversation, though only its new part is read each time."""
    session = ["--session", str(tmp_path / "s")]
    begin = ["-m", "6", "--ignore-eos", "--window", "60", "--num-sinks", "0"]
    system = ["--system-prompt", "the sea", *session]
    run("-p", "the cat", *system, *begin, model=chat_folder)
    _, said = run("-p", "the dog", *system, "-m", "1", "--json", model=chat_folder)
    statistics = json.loads(said.splitlines()[-1])
    tokenizer = mlx_lm.load(str(chat_folder))[1]
    new = tokenizer.encode("\n<|user|>the dog\n<|assistant|>", add_special_tokens=False)
    assert statistics["prompt_tokens"] == len(new)


def test_an_end_that_the_template_writes_too_is_read_once(chat_folder: Path):
    tokenizer = mlx_lm.load(str(chat_folder))[1]
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    around = frame(tokenizer, system="the sea")
    texts = ["".join(piece.text for piece in pieces) for pieces in around[:3]]
    assert texts == ["[system]the sea[user]", "[assistant]", "</s>[user]"]
    end = tokenizer.eos_token_id
    cut_short, ended = (render_again(tokenizer, "the", around, how) for how in (False, True))
    assert cut_short == [end, *ended]
    assert tokenizer.decode(ended) == "[user]the"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | lower }}{% endfor %}"
    with pytest.raises(InputError, match="--ignore-chat-template"):
        frame(tokenizer)


CONTRADICTIONS = {
    "temp": ["--temp", "0.5"],
    "top-p": ["--top-p", "0.5"],
    "repetition-penalty": ["--repetition-penalty", "1.5"],
    "presence-penalty": ["--presence-penalty", "1.5"],
    "seed": ["--seed", "4"],
    "window": ["--window", "30"],
    "num-sinks": ["--num-sinks", "2"],
    "stop": ["--stop", "zz"],
    "extra-eos-token": ["--extra-eos-token", "e"],
}


def test_flags_that_contradict_the_session(run: Run, tmp_path: Path):
    file = tmp_path / "s"
    run(*SAMPLING, *SMALL, "-p", "the cat", "--session", str(file), "-m", "5")
    before = file.read_bytes()
    for name, flags in CONTRADICTIONS.items():
        with pytest.raises(ConfigError, match=f"made with.* --{name}.*leave --{name} out"):
            run("--session", str(file), "-m", "5", *flags)
    assert file.read_bytes() == before
    run(*SAMPLING, *SMALL, "--num-sinks", "4", "--session", str(file), "-m", "5")
    other = str(tmp_path / "other")
    run("-p", "the cat", "--session", other, "-m", "1", "--window", "20")
    with pytest.raises(ConfigError, match="was made without --ignore-eos"):
        run("--session", other, "-m", "1", "--ignore-eos")


def damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def foreign(file: Path) -> None:
    file.write_text("a shopping list\n")


def of_python(file: Path, folder: Path) -> None:
    """A session of a program, not of the command, is taken; one with a wrong note is not."""
    model, tokenizer = mlx_lm.load(str(folder))
    attach(model, SinkConfig(4, 20))
    stream = Stream(model, tokenizer)
    stream.feed("the cat")
    stream.save(file, {"settings": {"temp": "hot"}, "place": {}})


@pytest.mark.parametrize("damage", [damaged, foreign, of_python])
def test_what_is_no_session_is_refused_and_kept(
    damage: Callable[..., None], run: Run, folder: Path, tmp_path: Path
):
    file = tmp_path / "s"
    run(*SMALL, "-p", "the cat", "--session", str(file), "-m", "5")
    damage(file, folder) if damage is of_python else damage(file)
    before = file.read_bytes()
    with pytest.raises(SessionError) as caught:
        run(*SMALL, "-p", "the cat", "--session", str(file), "-m", "5")
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize(
    "note",
    [
        {"settings": []},
        {"settings": {"nonesuch": 1}},
        {"settings": {"stop": [1]}},
        {"settings": {"top_k": 0.5}},
        {"place": {"read": -1}},
        {"place": {"written": "9"}},
        {"place": {"turn": {"over": 1}}},
        {"place": {"turn": []}},
        {"place": 3},
    ],
)
def test_a_note_of_another_kind_is_refused(
    note: dict[str, Any], run: Run, folder: Path, tmp_path: Path
):
    model, tokenizer = mlx_lm.load(str(folder))
    attach(model, SinkConfig(4, 20))
    Stream(model, tokenizer).save(tmp_path / "s", note)
    with pytest.raises(SessionError, match="not one of this command"):
        run("--session", str(tmp_path / "s"), "-p", "the cat", "-m", "1")


def test_a_session_of_another_model_is_refused(run: Run, folder: Path, tmp_path: Path):
    other = make_folder(tmp_path / "other", hidden_size=32, rms_norm_eps=1e-4)
    file = tmp_path / "s"
    run(*SMALL, "-p", "the cat", "--session", str(file), "-m", "5")
    before = file.read_bytes()
    with pytest.raises(SessionError, match="another model"):
        run("--session", str(file), "-m", "5", model=other)
    assert file.read_bytes() == before


def test_a_session_that_cannot_be_written_is_told_before_the_work(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(OutputError, match="No such file"):
        run("-p", "the cat", "--session", str(tmp_path / "nowhere" / "s"), "-m", "5", *SMALL)
    assert capsys.readouterr().out == ""


# A full disk.


def test_a_failed_save_is_a_warning_and_the_run_goes_on(
    run: Run, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A disk that is full for a while: the file before stays, and a later save takes its place."""
    file, saves, plain = tmp_path / "s", [0], store._write

    def write(*args: Any) -> str:
        saves[0] += 1
        if 3 <= saves[0] <= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*args)

    monkeypatch.setattr(store, "_write", write)
    text, said = run(*SAMPLING, *SMALL, *PROMPT, "--session", str(file), "-m", "60", "--json")
    assert text == whole
    assert said.count('{"warning": "cannot save session') == 3
    assert "No space left" in said
    assert json.loads(said.splitlines()[-1])["failed_saves"] == 3
    assert os.listdir(tmp_path) == ["s"]
    assert run("--session", str(file), "-m", "3")[0]


def command(folder: Path, *argv: str) -> list[str]:
    return [sys.executable, "-m", "mlx_sink.generate", "--model", str(folder), *argv]


def test_a_disk_that_stays_full_keeps_the_last_session(folder: Path, whole: str, tmp_path: Path):
    """By a limit on the size of files, which every system has: the empty stream fits, no more."""
    argv = [*SAMPLING, *SMALL, *PROMPT, "--session", str(tmp_path / "s"), "-m", "60"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    full = subprocess.run(command(folder, *argv), capture_output=True, preexec_fn=limit, text=True)
    assert full.stdout == whole, full.stderr
    assert full.returncode == 2
    assert full.stderr.count("warning: cannot save") > 3
    assert "error: cannot save session" in full.stderr.splitlines()[-1]
    assert "Traceback" not in full.stderr
    assert os.listdir(tmp_path) == ["s"]
    again = subprocess.run(command(folder, *argv), capture_output=True, text=True)
    assert "after 0 bytes of text" in again.stderr
    assert again.stdout == whole


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with file.open("wb", buffering=0) as rest, contextlib.suppress(OSError):
        while True:
            rest.write(b"x" * 4096)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_small_file_system(folder: Path, whole: str, tmp_path: Path):
    """A disk that is really full; what was on it stays, and is gone on with."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system does not let root mount a file system")
    try:
        argv = [*SAMPLING, *SMALL, *PROMPT, "--session", str(place / "s")]
        first = subprocess.run(command(folder, *argv, "-m", "20"), capture_output=True, text=True)
        before = (place / "s").read_bytes()
        fill(place / "rest")
        more = [*SAMPLING, "--session", str(place / "s"), "--save-every", "7", "-m", "40"]
        full = subprocess.run(command(folder, *more), capture_output=True, text=True)
        assert first.stdout + full.stdout == whole
        assert full.stderr.count("No space left") > 3
        assert (place / "s").read_bytes() == before
        assert sorted(os.listdir(place)) == ["rest", "s"]
        (place / "rest").unlink()
        again = subprocess.run(command(folder, *more), capture_output=True, text=True)
        assert first.stdout + again.stdout == whole
        assert again.returncode == 0
    finally:
        subprocess.run(["umount", str(place)], check=True)


# Signals.


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves(number: int, status: int, folder: Path, tmp_path: Path, run: Run):
    argv = [*SAMPLING, *SMALL, "-p", "the cat", "--session", str(tmp_path / "s"), "-m"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command(folder, *argv, "-1"), stdout=pipe, stderr=pipe, bufsize=0)
    assert process.stdout is not None
    begun = process.stdout.read(20)
    process.send_signal(number)
    rest, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert b"Traceback" not in said
    text = (begun + rest).decode()
    made = store.read(tmp_path / "s")[0]["note"]["place"]["made"]
    more = run("--session", str(tmp_path / "s"), "-m", "10")[0]
    other = [*SAMPLING, *SMALL, "-p", "the cat", "--session", str(tmp_path / "t"), "-m"]
    assert run(*other, str(made + 10))[0] == text + more


def test_a_second_interrupt_is_obeyed_at_once():
    with terminal.Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt()
        assert interrupt.status == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_killed_again_and_again(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """`scripts/dev/kill_runs.py` with some kills; by hand it is run with 200."""
    import kill_runs

    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the cat and the dog went to the sea\n" * 30)
    argv = ["--kills", "5", "--model", str(folder), "--prompt-file", str(prompt), "--window", "20"]
    assert kill_runs.main(argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["kills"] == 5
    assert result["same_text"] is True
