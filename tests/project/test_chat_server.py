"""What reaches the example server: from whom, how long, and how many conversations."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from folder import make_folder

import mlx_sink

SERVER = ROOT / "examples" / "chat_server.py"

SOON = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("chat_server", {str(SERVER)!r})
module = sys.modules["chat_server"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.Handler.timeout = 1
status = module.main()
sys.stderr.flush()
os._exit(status)
"""
"""The server, which gives up a silent connection after a second, not ten."""


class Served:
    """A server, asked by hand: what its client writes is what it gets."""

    def __init__(self, process: subprocess.Popen[str]):
        assert process.stdout is not None
        self.process, self.url = process, process.stdout.readline().strip()
        self.port = int(self.url.rpartition(":")[2].strip("/"))

    def raw(self, head: str, body: bytes = b"", *, close: bool = False) -> tuple[int, str]:
        """Return the status of an answer, and the answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
            if close:
                connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
        return int(answer.split(maxsplit=2)[1]), answer

    def say(self, name: str, text: str = "Once") -> tuple[str | None, str]:
        """Return the state of a conversation and its answer."""
        request = urllib.request.Request(f"{self.url}say/{name}", text.encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.headers["Conversation"], answer.read().decode()

    def status(self, path: str) -> int:
        """Return how a POST without a body is answered."""
        return self.raw(f"POST {path} HTTP/1.1\nHost: localhost\nContent-Length: 0")[0]


@contextmanager
def serving(*argv: str) -> Iterator[Served]:
    """Run the demo model's server; it must end by Ctrl-C, and without a traceback."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", SOON, "--port", "0", *argv]
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    try:
        yield Served(process)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("--max-tokens", "3") as server:
        yield server


@pytest.mark.parametrize("request_line", ["GET / HTTP/1.1", "POST /say/ann HTTP/1.1"])
@pytest.mark.parametrize(
    ("host", "served_"),
    [
        ("Host: localhost:{port}", True),
        ("Host: 127.0.0.1:{port}", True),
        ("Host: LocalHost", True),
        ("Host: [::1]:9000", True),  # as through a tunnel
        ("Host: evil.example:{port}", False),
        ("Host: 127.0.0.1.evil.example", False),
        ("Host: localhost.evil.example:{port}", False),
        ("Host: evil.example/localhost", False),
        ("Host: user@localhost", False),
        ("Host: 0.0.0.0:{port}", False),
        ("Host: 192.168.1.5:{port}", False),
        ("Host: localhost:port", False),
        ("Host: ", False),
        ("Accept: */*", False),
    ],
)
def test_only_this_machine_is_served(host: str, served_: bool, request_line: str, served: Served):
    """A name that a page has had resolved to this machine (DNS rebinding) is another's."""
    head = f"{request_line}\n{host.format(port=served.port)}\nContent-Length: 4"
    status, answer = served.raw(head, b"Once")
    assert status == (200 if served_ else 403)
    assert served_ or "this server is for its own machine" in answer
    assert served_ or "form" not in answer


@pytest.mark.parametrize(
    ("origin", "served_"),
    [
        ("http://localhost:{port}", True),
        ("HTTP://LOCALHOST:{port}", True),
        ("http://127.0.0.1:{port}", False),  # another name is another site to a browser
        ("http://localhost:1", False),
        ("http://localhost", False),
        ("https://localhost:{port}", False),
        ("http://evil.example", False),
        ("http://localhost:{port}.evil.example", False),
        ("null", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("verb", ["say", "cancel", "fork"])
def test_no_other_sites_page_is_served(verb: str, origin: str, served_: bool, served: Served):
    served.say("tom")
    head = f"POST /{verb}/tom HTTP/1.1\nHost: localhost:{served.port}\nContent-Length: 4\n"
    status, _ = served.raw(head + f"Origin: {origin.format(port=served.port)}", b"Once")
    assert status == (200 if served_ else 403)


LENGTHS: dict[str, tuple[str, bytes, int]] = {
    "right": ("Content-Length: 4", b"Once", 200),
    "twice the same": ("Content-Length: 4\nContent-Length: 4", b"Once", 400),
    "twice": ("Content-Length: 4\nContent-Length: 9", b"Once", 400),
    "none": ("Accept: */*", b"", 411),
    "chunks": ("Transfer-Encoding: chunked", b"4\r\nOnce\r\n0\r\n\r\n", 411),
    "both": ("Transfer-Encoding: chunked\nContent-Length: 4", b"Once", 411),
    "negative": ("Content-Length: -4", b"Once", 400),
    "no number": ("Content-Length: four", b"Once", 400),
    "empty": ("Content-Length: ", b"Once", 411),
    "a sign": ("Content-Length: +4", b"Once", 400),
    "a separator": ("Content-Length: 0_4", b"Once", 400),
    "a fraction": ("Content-Length: 4.0", b"Once", 400),
    "hexadecimal": ("Content-Length: 0x4", b"Once", 400),
    "other digits": ("Content-Length: \u0664", b"Once", 400),
    "too large": ("Content-Length: 1048577", b"Once", 413),
    "huge": ("Content-Length: 99999999999999999999", b"Once", 413),
    "endless": ("Content-Length: " + "9" * 400, b"Once", 400),
    "zero": ("Content-Length: 0", b"", 400),
    "not UTF-8": ("Content-Length: 4", b"On\xff\xfe", 400),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_every_length_is_answered(case: str, served: Served):
    line, body, status = LENGTHS[case]
    head = f"POST /say/joe HTTP/1.1\nHost: localhost\n{line}"
    assert served.raw(head, body)[0] == status, case
    assert served.say("joe")[1] is not None, "and the next one is served"


@pytest.mark.parametrize("close", [False, True])
def test_a_body_that_does_not_come(close: bool, served: Served):
    """The client has gone, or says no more: the connection is not held for ever."""
    name = f"kim-{close}"
    head = f"POST /say/{name} HTTP/1.1\nHost: localhost\nContent-Length: 9"
    status, answer = served.raw(head, b"Once", close=close)
    assert status == 400
    assert "as long as its Content-Length says" in answer
    assert served.say(name)[0] == "new", "nothing was read of it"


@pytest.mark.parametrize(("path", "status"), [("/say/big", 413), ("/no/big", 404)])
def test_the_answer_is_not_lost_with_a_body_that_is_not_read(
    path: str, status: int, served: Served
):
    """A client sends all of it before it looks for the answer."""
    body = b"x" * 5_000_000
    head = f"POST {path} HTTP/1.1\nHost: localhost\nContent-Length: {len(body)}"
    assert served.raw(head, body)[0] == status


@pytest.mark.parametrize(
    "path", ["/cancel/nobody", "/fork/nobody", "/say/", "/say/a b", "/say/" + "x" * 81, "/say/a/b",
             "/say/%2e", "/say/\u00e4", "//say/a", "http://evil.example/say/a"]
)  # fmt: skip
def test_nothing_is_made_for_a_name_that_is_none(path: str, served: Served):
    assert served.status(path) in (400, 404)


def test_so_many_conversations_are_kept():
    """The one that was silent for longest is forgotten: said here, and to the client."""
    with serving("--max-tokens", "2", "--conversations", "2") as server:
        states = [server.say(name)[0] for name in ("ann", "bob", "ann", "eve", "ann", "bob")]
        assert states == ["new", "new", "known", "new", "known", "new"]
        copy = urllib.request.urlopen(f"{server.url}fork/bob", b"", timeout=60).read().decode()
        assert server.say(copy)[0] == "known"
        assert [server.say(name)[0] for name in ("bob", "ann")] == ["known", "new"]
        server.process.send_signal(signal.SIGINT)
        _, said = server.process.communicate(timeout=60)
        assert [line.split()[1] for line in said.splitlines() if "forgot" in line] == [
            "bob:", "eve:", "ann:", copy + ":",
        ]  # fmt: skip


def test_a_conversation_that_answers_is_not_forgotten():
    with serving("--max-tokens", "-1", "--conversations", "2") as server:
        url = server.url
        with (
            urllib.request.urlopen(f"{url}say/ann", b"Once", timeout=60) as ann,
            urllib.request.urlopen(f"{url}say/bob", b"Once", timeout=60) as bob,
        ):
            assert ann.read(1)
            assert bob.read(1)
            for request in ("say/eve", "fork/ann"):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(f"{url}{request}", b"Once", timeout=60)
                assert refused.value.code == (503 if request == "say/eve" else 409)
            for answer, name in ((ann, "ann"), (bob, "bob")):
                urllib.request.urlopen(f"{url}cancel/{name}", b"", timeout=60)
                answer.read()
        with urllib.request.urlopen(f"{url}say/eve", b"Once", timeout=60) as eve:
            assert eve.read(1)
            urllib.request.urlopen(f"{url}cancel/eve", b"", timeout=60)
            eve.read()


def test_an_idle_connection_does_not_keep_the_server_alive():
    """Browsers open one in advance."""
    with serving() as server:
        connection = socket.create_connection(("127.0.0.1", server.port))
        time.sleep(0.5)  # until it has been accepted: then it is idle
    connection.close()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("chat_server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "chat_server", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_what_is_cancelled_while_it_is_read_is_not_answered(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An answer to half of what was said is none."""
    app = module.App(*mlx_sink.load(make_folder(tmp_path / "m", chat=True)), max_tokens=3)
    conversation = app.take("ann")
    feed = mlx_sink.Stream.feed
    with monkeypatch.context() as patch:
        patch.setattr(mlx_sink.Stream, "feed", lambda self, tokens: feed(self, tokens[:3]))
        assert list(app.say(conversation, "the cat went to the sea")) == []
    assert conversation.stream.position == 3
    assert len(list(app.say(conversation, "the dog"))) == 3


@pytest.mark.parametrize("argv", [["--port", "99999"], ["--port", "{taken}"], ["--model", "/no"]])
def test_what_cannot_be_served_is_one_line(
    argv: list[str], module: Any, capsys: pytest.CaptureFixture[str]
):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert module.main([word.replace("{taken}", port) for word in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


def test_it_stays_an_example():
    assert len(SERVER.read_text().splitlines()) <= 250
