"""The example app on the model inside: answers, cancels, forks, serves several at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from checkout import ROOT

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
