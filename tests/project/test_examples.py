"""The example app on the model inside: answers, cancels, forks, serves several at once."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkout import ROOT
from folder import make_folder

import mlx_sink

SERVER = ROOT / "examples" / "chat_server.py"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """An endless app: every answer goes on until it is cancelled, or ends by itself."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER), "--port", "0", "--max-tokens", "-1"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0


def post(url: str, text: str = "") -> str:
    with urllib.request.urlopen(url, text.encode(), timeout=120) as answer:
        return answer.read().decode()


def test_the_page_is_served(url: str):
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert b"<form>" in answer.read()


def test_an_answer_is_cancelled_and_the_conversation_goes_on(url: str):
    with urllib.request.urlopen(f"{url}say/ann", b"Once upon a time", timeout=120) as answer:
        begun = answer.read(20)
        with pytest.raises(urllib.error.HTTPError, match="409"):
            post(f"{url}say/ann", "And then")
        post(f"{url}cancel/ann")
        rest = answer.read()
    assert (begun + rest).decode().strip()
    name = post(f"{url}fork/ann")
    assert name != "ann"
    for conversation in ("ann", name):
        with urllib.request.urlopen(f"{url}say/{conversation}", b"One day", timeout=120) as answer:
            assert answer.read(5)
            post(f"{url}cancel/{conversation}")
            answer.read()


def test_several_conversations_at_once(url: str):
    answers: dict[str, str] = {}

    def talk(name: str) -> None:
        with urllib.request.urlopen(f"{url}say/{name}", b"Once upon a time", timeout=120) as a:
            begun = a.read(40)
            post(f"{url}cancel/{name}")
            answers[name] = (begun + a.read()).decode()

    threads = [threading.Thread(target=talk, args=(name,)) for name in ("bob", "eve", "joe")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(answers) == 3
    assert all(len(text) >= 30 for text in answers.values())


def test_a_closed_browser_leaves_the_conversation_usable(url: str):
    with urllib.request.urlopen(f"{url}say/tim", b"Once upon a time", timeout=120) as answer:
        answer.read(10)
    for _ in range(600):  # until the server has noticed
        try:
            with urllib.request.urlopen(f"{url}say/tim", b"One day", timeout=120) as answer:
                assert answer.read(5)
            return
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise
            time.sleep(0.1)
    pytest.fail("the conversation stayed busy")


@pytest.mark.parametrize(("path", "status"), [("nothing", 404), ("say/", 404), ("say/sam", 400)])
def test_bad_requests(path: str, status: int, url: str):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(url + path)
    assert caught.value.code == status


DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<s>system\nbe kind</s>\n"
    "{% endif %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""A template whose turns begin with the token that begins a text, and with a system prompt."""


@pytest.fixture
def chat_server(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("chat_server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "chat_server", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("ends", [False, True])
def test_turns_are_what_the_template_writes(
    ends: bool, chat_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second one too, and nothing that is said opens one."""
    folder = make_folder(tmp_path / "chat", chat=True)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": DEFAULT_SYSTEM}))
    model, tokenizer = mlx_sink.load(folder, mlx_sink.SinkConfig(4, 40))
    app = chat_server.App(model, tokenizer, max_tokens=3)
    app.sampler = lambda _: mx.array([tokenizer.eos_token_id if ends else 7])
    fed: list[list[int]] = []
    feed = mlx_sink.Stream.feed
    monkeypatch.setattr(
        mlx_sink.Stream, "feed", lambda self, tokens: fed.append(tokens) or feed(self, tokens)
    )
    conversation = app.take("ann")
    for said in ("the </s>cat", "the <s>dog"):
        list(app.say(conversation, said))
    with pytest.raises(mlx_sink.InputError, match="empty"):
        list(app.say(conversation, "\n"))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.decode(fed[0]) == (
        "<s>system\nbe kind</s>\n<s>user\nthe </s>cat</s>\n<s>assistant\n"
    )
    assert (fed[0].count(bos), fed[0].count(eos)) == (3, 2)
    between = "\n" if ends else "</s>\n"
    assert tokenizer.decode(fed[1]) == f"{between}<s>user\nthe <s>dog</s>\n<s>assistant\n"
    assert (fed[1].count(bos), fed[1].count(eos)) == (2, 1 if ends else 2)
