"""A small local app: endless conversations in the browser, each in constant memory.

    python examples/chat_server.py --model demo --port 8080

Every conversation is a `mlx_sink.Stream`; all of them run on one model, each request in a thread
of its own. Nothing but mlx_sink and the standard library is needed.

    POST /say/NAME      the body is what you say; the answer streams back as plain text
    POST /cancel/NAME   stop the answer, from whatever thread that is
    POST /fork/NAME     a copy of the conversation; its name comes back
    GET /               a page that does the above
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from mlx_lm.sample_utils import make_sampler

import mlx_sink
from mlx_sink.stream.text.chat import frame, render, render_again

PAGE = """<!doctype html><meta charset="utf-8"><title>mlx_sink</title>
<style>body{font:16px system-ui;max-width:40em;margin:2em auto}pre{white-space:pre-wrap}</style>
<pre id="log"></pre>
<form><input id="text" size="50" autofocus> <button>say</button>
<button type="button" id="stop">stop</button></form>
<script>
const log = document.getElementById("log"), text = document.getElementById("text");
const name = "chat" + Date.now();
document.forms[0].onsubmit = async event => {
  event.preventDefault();
  const said = text.value; text.value = ""; log.append("\\n> " + said + "\\n");
  const answer = await fetch("/say/" + name, {method: "POST", body: said});
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part; !(part = await reader.read()).done;) log.append(part.value);
};
document.getElementById("stop").onclick = () => fetch("/cancel/" + name, {method: "POST"});
</script>"""


@dataclass
class Conversation:
    """A stream, and whose turn it is: a stream is for one thread at a time.

    Attributes:
        stream: The stream.
        turn: Held while it answers.
        ended: Its last token is an end-of-text token.
    """

    stream: mlx_sink.Stream
    ended: bool = False
    turn: Lock = field(default_factory=Lock)


class App:
    """The model and the conversations on it."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int):
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        # What the chat template writes between two turns; a model without one is just read on.
        around = frame(tokenizer)
        self.around = around._replace(again=()) if around.first else around
        self.sampler = make_sampler(0.7, top_p=0.95)
        self.conversations: dict[str, Conversation] = {}
        self.lock = Lock()
        self.closing = False

    def conversation(self, name: str) -> Conversation:
        """Return a conversation, a new one if there is none of that name."""
        with self.lock:
            if name not in self.conversations:
                stream = mlx_sink.Stream(self.model, self.tokenizer)
                self.conversations[name] = Conversation(stream)
            return self.conversations[name]

    def say(self, conversation: Conversation, text: str) -> Iterator[str]:
        """Read what was said and yield the answer, piece by piece.

        Control tokens in what was said are text: nobody but the template opens a turn.
        """
        stream, ended = conversation.stream, conversation.ended
        if not text.strip():
            raise mlx_sink.InputError("the prompt is empty")
        if stream.position:
            tokens = render_again(self.tokenizer, text, self.around, ended, response="")
        else:
            tokens = render(self.tokenizer, text).tokens
        stream.feed(tokens)
        conversation.ended = False
        for response in stream.generate(self.max_tokens, sampler=self.sampler):
            conversation.ended = response.token in self.tokenizer.eos_token_ids
            yield response.text
            if self.closing:
                return

    def fork(self, name: str) -> str:
        """Copy a conversation and return the copy's name."""
        conversation = self.conversation(name)
        copy = Conversation(conversation.stream.fork(), conversation.ended)
        with self.lock:
            self.conversations[f"{name}-{len(self.conversations)}"] = copy
            return list(self.conversations)[-1]


class Handler(BaseHTTPRequestHandler):
    """One request, in a thread of its own."""

    app: App

    def do_GET(self) -> None:
        """Show the page."""
        self.answer(200, "text/html", PAGE)

    def do_POST(self) -> None:
        """Say, cancel, or fork."""
        _, verb, name = [*self.path.split("/"), "", ""][:3]
        if not name or verb not in ("say", "cancel", "fork"):
            return self.answer(404, "text/plain", "POST /say/NAME, /cancel/NAME or /fork/NAME\n")
        conversation = self.app.conversation(name)
        if verb == "cancel":
            conversation.stream.cancel()
            return self.answer(200, "text/plain", "")
        if not conversation.turn.acquire(blocking=False):
            return self.answer(409, "text/plain", "still answering: cancel first\n")
        try:
            if verb == "fork":
                return self.answer(200, "text/plain", self.app.fork(name))
            said = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            self.stream_out(self.app.say(conversation, said))
        except mlx_sink.SinkError as error:
            self.answer(400, "text/plain", f"{error}\n")
        except OSError:
            pass  # The browser is gone; the conversation stands where it left.
        finally:
            conversation.turn.release()

    def stream_out(self, pieces: Iterator[str]) -> None:
        """Send text as it comes; the connection's end is the text's."""
        first = next(pieces, "")
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        self.wfile.write(first.encode())
        for piece in pieces:
            self.wfile.write(piece.encode())
            self.wfile.flush()

    def answer(self, status: int, kind: str, text: str) -> None:
        """Send a whole answer."""
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal quiet."""


class Server(ThreadingHTTPServer):
    """Waits for its threads when it closes, so that every answer has ended."""

    daemon_threads = False


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Endless conversations in the browser.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--port", type=int, default=8080, help="0 for any that is free")
    parser.add_argument("--max-tokens", type=int, default=200, help="of an answer, -1 for ever")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = mlx_sink.load(args.model)
        Handler.app = App(model, tokenizer, args.max_tokens)
    except mlx_sink.SinkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Only this machine can reach it.
    with Server(("127.0.0.1", args.port), Handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/", flush=True)
        try:
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
