"""Let a stream read and write millions of tokens: does anything grow, slow down or drift?

    python scripts/bench/soak.py --layers 6 --tokens 5000000 --state soak-deep

A random Llama reads random text and writes on, in turns. For each bucket of tokens one row says
what the process and MLX held and how long a token took, and how far the log probabilities are
from float64. After each turn a copy of the stream as it was when young writes as much, and is
timed alike: on a busy machine only that ratio tells an old stream from a slow moment.

Every bucket is saved in the folder of `--state`; the same command goes on from there. The table
goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import _oracle
import mlx.core as mx
import numpy as np
import psutil
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import mlx_sink
from mlx_sink import SinkConfig, SinkError, Stream, attach
from mlx_sink.io.terminal import say
from mlx_sink.measure.machine import as_json, machine

SINKS = 4
COLUMNS = {
    "rss_mb": ("resident MB", ".2f"),
    "active_mb": ("MLX active MB", ".3f"),
    "cache_mb": ("MLX cache MB", ".3f"),
    "wall_ms": ("ms a token", ".3f"),
    "cpu_ms": ("CPU ms a token", ".3f"),
    "read_us": ("us a token read", ".1f"),
    "old_over_young": ("old/young", ".4f"),
    "drift": ("   drift", ".1e"),
}
SAMPLED: dict[str, Any] = {
    "sampler": make_sampler(1.0, top_p=0.95),
    "logits_processors": make_logits_processors(repetition_penalty=1.1),
    "stop": ["\x00 never \x00"],
    "ignore_eos": True,
    "flush": False,
}


def main(argv: list[str] | None = None) -> int:
    """Run, or go on, and print the table."""
    args = parse(argv)
    say(str(machine()))
    try:
        soak = Soak(args)
        while soak.stream.position - soak.began < args.tokens:
            soak.bucket()
            say(row(soak.rows[-1]))
    except SinkError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped: the same command goes on from the last row")
        return 130
    print(table(soak.rows))
    result = {"options": soak.options, "slopes_percent": slopes(soak.rows), "rows": soak.rows}
    if args.json:
        args.json.write_text(as_json(result, indent=1))
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Let a stream run for millions of tokens and watch it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--state", type=Path, required=True, help="folder that the run is saved in")
    add("--tokens", type=int, default=5_000_000, help="tokens of the whole run")
    add("--bucket", type=int, default=100_000, help="tokens for each row")
    add("--layers", type=int, default=6, help="layers of the model")
    add("--window", type=int, default=60, help="window")
    add("--start", type=int, default=0, help="token that the stream is moved to at its start")
    add("--read", type=int, default=960, help="tokens read in a turn")
    add("--make", type=int, default=32, help="tokens made in a turn")
    add("--pair-every", type=int, default=1, help="turns after which a young copy is timed too")
    add("--seed", type=int, default=0, help="seed of weights, text and sampling")
    add("--json", type=Path, help="write all figures here")
    return parser.parse_args(argv)


def random_llama(layers: int, vocabulary: int, seed: int) -> llama.Model:
    """Build a small Llama whose attention is sharp: a wrong key or distance would show."""
    shape = llama.ModelArgs(
        model_type="llama", hidden_size=32, num_hidden_layers=layers, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=vocabulary,
        rms_norm_eps=1e-5, max_position_embeddings=131072, rope_theta=10000.0,
    )  # fmt: skip
    mx.random.seed(seed)
    model = llama.Model(shape)
    for layer in model.layers:
        layer.self_attn.apply(lambda weight: 2.5 * weight)
    model.model.embed_tokens.weight *= 3
    mx.eval(model.parameters())
    return model


@dataclass
class Samples:
    """What was measured since the last row; as many figures in every bucket."""

    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **figures: float) -> None:
        """Take one measurement of each."""
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

    def medians(self) -> dict[str, float]:
        """Return the median of each."""
        return {name: statistics.median(values) for name, values in self.figures.items()}


class Soak:
    """A stream that is old, a copy of it that stays young, and the rows so far."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        tokenizer = mlx_sink.load("demo")[1]
        self.vocabulary = len(tokenizer)
        model = random_llama(args.layers, self.vocabulary, args.seed)
        attach(model, SinkConfig(SINKS, args.window))
        flat = tree_flatten(model.parameters())
        self.weights = {name: np.array(value, np.float64) for name, value in flat}
        self.shape = model.args
        args.state.mkdir(parents=True, exist_ok=True)
        self.file, self.young_file = (args.state / name for name in ("old", "young"))
        names = ("bucket", "layers", "window", "start", "read", "make", "pair_every", "seed")
        self.options = {name: getattr(args, name) for name in names}
        self.recent: deque[int] = deque(maxlen=_oracle.needed(args.layers, args.window))
        if self.file.exists():
            self._resume(model, tokenizer)
        else:
            self._begin(model, tokenizer)
        self.process = psutil.Process()

    def _begin(self, model: Any, tokenizer: Any) -> None:
        """Fill the ring, keep a copy that stays there, and move to where the run starts."""
        self.stream, self.rows, self.runs = Stream(model, tokenizer, seed=self.args.seed), [], 1
        self.sinks: list[int] = []
        self.sinks = self._read(self.stream)[:SINKS]
        self._make(self.stream)
        self.stream.save(self.young_file)
        if self.args.start:
            move(self.stream, self.args.start)
        self.began = self.stream.position
        self._save()

    def _resume(self, model: Any, tokenizer: Any) -> None:
        self.stream = Stream.resume(self.file, model, tokenizer)
        note = self.stream.note
        if note["options"] != self.options:
            raise SinkError(f"{self.args.state} was begun with other options: {note['options']}")
        self.rows, self.runs, self.began = note["rows"], note["runs"] + 1, note["began"]
        self.sinks = note["sinks"]
        self.recent.extend(note["recent"])

    def _save(self) -> None:
        note = {"options": self.options, "rows": self.rows, "runs": self.runs}
        where = {"began": self.began, "sinks": self.sinks, "recent": list(self.recent)}
        self.stream.save(self.file, note | where)

    def bucket(self) -> None:
        """Run one bucket, measure, and save."""
        args, samples = self.args, Samples()
        young = Stream.resume(self.young_file, self.stream.model, self.stream.tokenizer)
        end = self.stream.position + args.bucket
        turns = 0
        while self.stream.position < end:
            old = self._turn(self.stream)
            samples.add(**old)
            if turns % args.pair_every == 0:
                samples.add(old_over_young=old["wall_ms"] / self._make(young))
            samples.add(
                rss_mb=self.process.memory_info().rss / 1e6,
                active_mb=mx.get_active_memory() / 1e6,
                cache_mb=mx.get_cache_memory() / 1e6,
            )
            turns += 1
        drift = self._drift()
        place = {"to": self.stream.position, "run": self.runs}
        self.rows.append(place | samples.medians() | {"drift": drift})
        self._save()

    def _turn(self, stream: Stream) -> dict[str, float]:
        wall = time.perf_counter()
        self._read(stream)
        read = time.perf_counter() - wall
        cpu_made = time.process_time()
        wall_ms = self._make(stream)
        return {
            "wall_ms": wall_ms,
            "cpu_ms": (time.process_time() - cpu_made) / self.args.make * 1e3,
            "read_us": read / self.args.read * 1e6,
        }

    def _read(self, stream: Stream) -> list[int]:
        """Let it read random tokens, the same ones whenever this place is reached."""
        random = np.random.default_rng([self.args.seed, stream.position])
        tokens: list[int] = random.integers(0, self.vocabulary, self.args.read).tolist()
        stream.feed(tokens)
        if stream is self.stream:
            self.recent.extend(tokens)
        return tokens

    def _make(self, stream: Stream) -> float:
        """Let it write, and return the median time of a token in ms."""
        times: list[float] = []
        began = time.perf_counter()
        for response in stream.generate(self.args.make, **SAMPLED):
            if stream is self.stream:
                self.recent.append(response.token)
            now = time.perf_counter()
            times.append(now - began)
            began = now
        return statistics.median(times) * 1e3

    def _drift(self) -> float:
        """Return how far the next token's log probabilities are from float64, at the most."""
        exact = _oracle.logprobs(
            self.weights, self.shape, self.sinks, list(self.recent), self.stream.position,
            self.args.window,
        )  # fmt: skip
        response = next(self.stream.fork().generate(1, ignore_eos=True))
        return float(np.abs(np.array(response.logprobs, np.float64) - exact).max())


def move(stream: Stream, target: int) -> None:
    """Move a stream that has wrapped to a later token; slots repeat every window."""
    for cache in stream.caches:
        ring = cache.ring
        by = -(-(target - ring.tokens) // ring.window) * ring.window
        places = {name: getattr(ring, name) + by for name in ("tokens", "start", "previous")}
        cache.ring = replace(ring, **places)
    # Nothing but a test needs this, so a stream has no method for it.
    stream._loop.position = stream.caches[0].tokens


def slopes(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return how much a straight line through each column rises, in percent of its mean.

    The second figure is the standard error of the first. The first row is warm-up. A process
    that goes on with a run holds other memory than the one before: of several the one with the
    most rows counts.
    """
    runs = [r["run"] for r in rows[1:]]
    steady = [r for r in rows[1:] if r["run"] == statistics.mode(runs)]
    if len(steady) < 3:
        return {}
    result: dict[str, tuple[float, float]] = {}
    for name in list(COLUMNS)[:-1]:
        values = np.array([r[name] for r in steady])
        at = np.arange(len(values)) - (len(values) - 1) / 2
        slope = float(at @ values / (at @ at))
        spread = np.sum((values - values.mean() - slope * at) ** 2) / (len(values) - 2)
        percent = 100 * (len(values) - 1) / max(values.mean(), 1e-12)
        result[name] = slope * percent, float(np.sqrt(spread / (at @ at))) * percent
    return result


def row(values: dict[str, Any]) -> str:
    """Write one row."""
    cells = [f"{values[name]:{form}}" for name, (_, form) in COLUMNS.items()]
    return _line(str(values["to"]), cells)


def table(rows: list[dict[str, Any]]) -> str:
    """Write all rows, and the slopes with their standard errors."""
    found = slopes(rows)
    rises, errors = (
        [f"{found[n][i]:+.2f}" if n in found else "" for n in COLUMNS] for i in (0, 1)
    )
    titles = [title for title, _ in COLUMNS.values()]
    last = _line("slope, %", rises), _line("error, %", [e.lstrip("+") for e in errors])
    return "\n".join([_line("to token", titles), *map(row, rows), *last])


def _line(first: str, cells: list[str]) -> str:
    titles = [title for title, _ in COLUMNS.values()]
    padded = [cell.rjust(len(title) + 2) for cell, title in zip(cells, titles, strict=True)]
    return first.rjust(12) + "".join(padded)


if __name__ == "__main__":
    sys.exit(main())
