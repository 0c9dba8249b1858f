"""A small local app: endless conversations in the browser, each in constant memory.

    python examples/chat_server.py --model demo --port 8080

Every conversation is a `mlx_sink.Stream`; all run on one model, each request in its own thread.

    POST /say/NAME      the body is what you say; the answer streams back as plain text
    POST /cancel/NAME   stop the answer, from whatever thread that is
    POST /fork/NAME     a copy of the conversation; its name comes back
    GET /               a page that does the above

Only this machine is served, and no page of another site. At most ``--conversations`` are kept: the
one that was silent for longest is forgotten, which a header, ``Conversation: new``, says later.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from uuid import uuid4

from mlx_lm.sample_utils import make_sampler

import mlx_sink
from mlx_sink.stream.text.chat import frame, render, render_again

LONGEST = 1 << 20  # bytes of what is said at once
PAGE = """<!doctype html><meta charset="utf-8"><title>mlx_sink</title>
<style>body{font:16px system-ui;max-width:40em;margin:2em auto}pre{white-space:pre-wrap}</style>
<pre id="log"></pre>
<form><input id="text" size="50" autofocus> <button>say</button>
<button type="button" id="stop">stop</button></form>
<script>
const log = document.getElementById("log"), text = document.getElementById("text");
const name = "chat" + Date.now(); let turns = 0;
document.forms[0].onsubmit = async event => {
  event.preventDefault();
  const said = text.value; text.value = ""; log.append("\\n> " + said + "\\n");
  const answer = await fetch("/say/" + name, {method: "POST", body: said});
  if (answer.headers.get("Conversation") === "new" && turns++)
    log.append("(what was said before is forgotten)\\n");
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part; !(part = await reader.read()).done;) log.append(part.value);
};
document.getElementById("stop").onclick = () => fetch("/cancel/" + name, {method: "POST"});
</script>"""


class RefusedError(Exception):
    """A request that is not served: the status, and why in a line."""


@dataclass
class Conversation:
    """A stream, and whose turn it is: a stream is for one thread at a time."""

    stream: mlx_sink.Stream
    ended: bool = False  # its last token is an end-of-text token
    turn: Lock = field(default_factory=Lock)  # held while it answers


class App:
    """The model and the conversations on it, the one that was used last at the end."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int, most: int = 16):
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        # What the chat template writes between two turns; a model without one is just read on.
        around = frame(tokenizer)
        self.around = around._replace(again=()) if around.first else around
        self.sampler = make_sampler(0.7, top_p=0.95)
        self.conversations: dict[str, Conversation] = {}
        self.most, self.lock, self.closing = most, Lock(), False

    def take(self, name: str) -> Conversation:
        """Return a conversation with its turn taken, a new one if there is none of that name."""
        with self.lock:
            if name not in self.conversations:
                self.add(name, Conversation(mlx_sink.Stream(self.model, self.tokenizer)))
            conversation = self.conversations[name] = self.conversations.pop(name)
            if not conversation.turn.acquire(blocking=False):
                raise RefusedError(409, "still answering: cancel first")
            return conversation

    def add(self, name: str, conversation: Conversation) -> None:
        """Add a conversation, in the place of the one that was silent for longest."""
        if len(self.conversations) >= self.most:
            silent = [n for n, c in self.conversations.items() if not c.turn.locked()]
            if not silent:
                raise RefusedError(503, f"all {self.most} conversations are answering")
            del self.conversations[silent[0]]
            print(f"forgot {silent[0]}: {self.most} conversations are kept", file=sys.stderr)
        self.conversations[name] = conversation

    def say(self, conversation: Conversation, text: str) -> Iterator[str]:
        """Read what was said, in which control tokens are text, and yield the answer in pieces."""
        stream, ended = conversation.stream, conversation.ended
        tokens = render(self.tokenizer, text).tokens  # checks the text, too
        if stream.position:
            tokens = render_again(self.tokenizer, text, self.around, ended, response="")
        conversation.ended = False
        if stream.feed(tokens) < len(tokens):
            return  # cancelled
        for response in stream.generate(self.max_tokens, sampler=self.sampler):
            conversation.ended = response.token in self.tokenizer.eos_token_ids
            yield response.text
            if self.closing:
                return

    def fork(self, conversation: Conversation) -> str:
        """Copy a conversation, whose turn is taken, and return the copy's name."""
        copy = Conversation(conversation.stream.fork(), conversation.ended)
        with self.lock:
            self.add(name := f"copy-{uuid4().hex[:12]}", copy)
        return name


class Handler(BaseHTTPRequestHandler):
    """One request, in a thread of its own."""

    app: App
    timeout = 10  # seconds without a byte

    def do_POST(self) -> None:
        """Serve a request, or say why not."""
        try:
            self.check_sender()
            request = f"{self.command} {self.path}"
            if request == "GET /":
                return self.answer(200, PAGE, "text/html")
            asked = re.fullmatch(r"POST /(say|cancel|fork)/([\w.-]{1,80})", request, re.ASCII)
            if asked is None:
                raise RefusedError(404, "POST /say/NAME, /cancel/NAME or /fork/NAME")
            self.serve(*asked.groups())
        except RefusedError as refused:
            self.answer(*refused.args)
        except mlx_sink.SinkError as error:
            self.answer(400, str(error))
        except OSError:
            pass  # The browser is gone; the conversation stands where it left.

    do_GET = do_POST  # noqa: N815 - http.server's name

    def serve(self, verb: str, name: str) -> None:
        """Do what is asked of a conversation."""
        said = self.body() if verb == "say" else ""
        known = self.app.conversations.get(name)
        if verb != "say" and known is None:
            raise RefusedError(404, f"there is no conversation {name}")
        if verb == "cancel":
            known.stream.cancel()
            return self.answer(200, "")
        conversation = self.app.take(name)
        try:
            if verb == "fork":
                return self.answer(200, self.app.fork(conversation))
            state = "known" if conversation.stream.position else "new"
            # Text is sent as it comes; the connection's end is the text's.
            with contextlib.closing(self.app.say(conversation, said)) as pieces:
                self.answer(200, next(pieces, ""), Conversation=state)
                for piece in pieces:
                    self.wfile.write(piece.encode())
        finally:
            conversation.turn.release()

    def check_sender(self) -> None:
        """Refuse what another site's page has sent, under whatever name it reached this server."""
        host = self.headers.get("Host", "").lower()
        if not re.fullmatch(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", host):
            raise RefusedError(403, "this server is for its own machine: call it localhost")
        if self.headers.get("Origin", f"http://{host}").lower() != f"http://{host}":
            raise RefusedError(403, "pages of other sites are not served")

    def body(self) -> str:
        """Return what was sent."""
        length = ", ".join(self.headers.get_all("Content-Length", []))
        if "Transfer-Encoding" in self.headers or not length:
            raise RefusedError(411, "send a Content-Length, and not in chunks")
        if not re.fullmatch(r"[0-9]{1,20}", length):
            raise RefusedError(400, "the Content-Length is not a number")
        if int(length) > LONGEST:
            raise RefusedError(413, f"say at most {LONGEST} bytes at once")
        with contextlib.suppress(TimeoutError, UnicodeDecodeError):
            if len(data := self.rfile.read(int(length))) == int(length):
                return data.decode()
        raise RefusedError(400, "the body must be UTF-8, and as long as its Content-Length says")

    def answer(self, status: int, text: str, kind: str = "text/plain", **headers: str) -> None:
        """Send an answer, or the beginning of one."""
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def finish(self) -> None:
        """Close; what is still being sent is read first, or the answer would be lost with it."""
        with contextlib.suppress(OSError):
            super().finish()
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            until = time.monotonic() + 2
            while self.connection.recv(1 << 16) and time.monotonic() < until:
                pass

    def log_message(self, *_: Any) -> None:
        """Keep the terminal quiet."""


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Endless conversations in the browser.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--port", type=int, default=8080, help="0 for any that is free")
    parser.add_argument("--max-tokens", type=int, default=200, help="of an answer, -1 for ever")
    parser.add_argument("--conversations", type=int, default=16, help="kept at once")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = mlx_sink.load(args.model)
        Handler.app = App(model, tokenizer, args.max_tokens, args.conversations)
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except (mlx_sink.SinkError, OSError, OverflowError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    server.daemon_threads = False  # it waits for them when it closes: every answer has ended then
    with server:
        try:
            print(f"http://127.0.0.1:{server.server_port}/", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            Handler.app.closing = True
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # A thread that has been joined may still be taking down its MLX streams, and the process
    # aborts if Python tidies up meanwhile. Nothing is left to tidy up.
    os._exit(status)
