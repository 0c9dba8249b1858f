"""``python -m mlx_sink.compare``: ways to keep a stream's context, side by side."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from mlx_sink.commands import plots
from mlx_sink.commands.compare import page
from mlx_sink.commands.numbers import add_integer, add_real
from mlx_sink.commands.options import Parser, add_model_options, add_sink_options, program
from mlx_sink.errors import ConfigError, InputError
from mlx_sink.io import terminal
from mlx_sink.io import text as text_io
from mlx_sink.io.atomic import write_whole
from mlx_sink.io.units import parse_tokens
from mlx_sink.measure import losses, resume
from mlx_sink.measure import methods as arms
from mlx_sink.measure import needles as recall
from mlx_sink.measure.comparison import Comparison, Settings
from mlx_sink.measure.machine import as_json, describe, machine
from mlx_sink.models import settings as own_settings
from mlx_sink.models.attach import attach
from mlx_sink.models.lazy import weight_bytes
from mlx_sink.models.load import load_unattached
from mlx_sink.stream.session import fingerprint

PROG = program("compare")
DESCRIPTION = (
    "Compare full attention, windows and sinks on a text: time, memory, loss, recall, as a page. "
    "A run that was stopped goes on when the same command is given again."
)
FORMAT = 1
"""Of results: goes up when older pages cannot show newer results."""

EVERY = 30.0
"""Seconds between two checkpoints."""


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog=PROG, description=DESCRIPTION)
    add_model_options(p)
    add_sink_options(p)
    add = p.add_argument
    add("--text", help="a UTF-8 text file, read from its start")
    add(
        "--lengths",
        nargs="+",
        default=["1K..1M"],
        metavar="TOKENS",
        help="where to measure: 1K 4K 16K, or 1K..1M (default) for each doubling up to the end",
    )
    add("--arms", nargs="+", choices=arms.NAMES, default=arms.USUAL, help="what to compare")
    add_integer(p, "--prefill-step-size", least=1, default=512, help="tokens read at once")
    what = "reading time of an arm at most, in minutes"
    add_real(p, "--arm-minutes", least=0, above=True, default=3, help=what)
    what = "tokens between lengths to recompute"
    add_integer(p, "--samples", least=1, default=64, help=what)
    what = "questions for each place and arm; 0 for none"
    add_integer(p, "--trials", least=0, default=8, help=what)
    add(
        "--output",
        type=Path,
        default=Path("compare"),
        help="writes OUTPUT.html, .json and .png (default: compare)",
    )
    add(
        "--from",
        dest="results",
        nargs="+",
        type=Path,
        metavar="JSON",
        help="make the page from results of earlier runs: two machines, or two models",
    )
    return p


def lengths_of(words: Sequence[str], tokens: int) -> tuple[int, ...]:
    """Read lengths; a range that passes the end of the text stops there.

    Raises:
        ConfigError: They are none.
        InputError: The text is shorter than a length that was named.
    """
    found: set[int] = set()
    for word in words:
        first, dots, last = word.partition("..")
        low = parse_tokens(first)
        if not dots:
            if low > tokens:
                raise InputError(f"the text has {tokens} tokens, fewer than the length {word}")
            found.add(low)
            continue
        high = parse_tokens(last)
        if low > tokens:
            raise InputError(f"the text has {tokens} tokens, fewer than the length {first}")
        while low < min(high, tokens):
            found.add(low)
            low *= 2
        found.add(min(high, tokens))
    return tuple(sorted(found))


def read_results(path: Path) -> dict[str, Any]:
    """Read results of an earlier run.

    Raises:
        InputError: They are no results, or of another version.
    """
    try:
        held: object = json.loads(text_io.read(path, repr(str(path))))
    except json.JSONDecodeError as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}") from None
    found = cast("dict[str, Any]", held) if isinstance(held, dict) else {}
    version = found.get("mlx_sink_compare")
    if version is None:
        raise InputError(f"{str(path)!r} holds no results of {PROG}")
    if version != FORMAT:
        raise InputError(f"{str(path)!r} is of version {version}: this one reads {FORMAT}")
    missing = [key for key in page.NEEDED if key not in found]
    if missing:
        raise InputError(f"{str(path)!r} lacks {missing[0]}")
    return found


class _Run:
    """A comparison, its files, and its progress."""

    def __init__(self, args: argparse.Namespace, argv: Sequence[str]):
        self.args = args
        self.text = text_io.read(args.text, f"text file {args.text!r}")
        options = {"adapter_path": args.adapter_path} if args.adapter_path else {}
        model, self.tokenizer, context, own = load_unattached(
            args.model, trust_remote_code=args.trust_remote_code, **options
        )
        self.model = model
        config, _ = own_settings.apply(own, context, args.num_sinks, args.window)
        ids = self.encode(self.text)
        self.inputs, targets = losses.cut(ids, self.tokenizer.bos_token_id)
        facts = machine()
        attach(model, config)  # A model that is refused ends here.
        settings = Settings(
            config, tuple(args.arms), lengths_of(args.lengths, self.inputs.shape[1]),
            args.prefill_step_size, 60 * args.arm_minutes, args.samples, facts["memory"] * 3 // 4,
        )  # fmt: skip
        self.comparison = Comparison(model, self.inputs, targets, settings)
        self.recall: list[dict[str, Any]] = []
        self.state = _with(args.output, ".state")
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        whose = fingerprint(model, self.tokenizer)
        self.key = resume.key_of(settings, trials=args.trials, text=digest, **whose)
        self.head: dict[str, Any] = {
            "mlx_sink_compare": FORMAT,
            "command": shlex.join(["python", "-m", "mlx_sink.compare", *argv]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": facts,
            "model": {"name": args.model, "context": context, "weights": weight_bytes(model)},
            "text": {"name": Path(args.text).name, "tokens": self.inputs.shape[1]},
            "config": config.to_dict() | {"capacity": config.capacity},
            "lengths": list(settings.lengths),
            "trials": args.trials,
            "choices": recall.CHOICES,
        }
        self._saved = time.monotonic()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def go(self) -> dict[str, Any]:
        """Run to the end, and leave the results and the page."""
        if self.state.exists():
            self.recall = resume.restore(self.state, self.comparison, self.key)
            terminal.say(f"going on from {self.state}")
        terminal.say(describe(self.head["machine"]))
        began, shape = time.monotonic(), "{desc}{percentage:3.0f}%|{bar}| {elapsed}{postfix} left"
        with tqdm(desc="reading", total=1.0, bar_format=shape) as bar:
            for _ in self.comparison.steps():
                took, left = time.monotonic() - began, self.comparison.seconds_left()
                bar.total, bar.n = took + left, took
                bar.set_postfix_str(tqdm.format_interval(left), refresh=False)
                bar.update(0)
                self.keep()
        if self.args.trials:
            self.ask()
        self.keep(final=True)
        found = self.found(True)
        self.state.unlink(missing_ok=True)
        return found

    def ask(self) -> None:
        """Put the questions that have not been put yet."""
        settings = self.comparison.settings
        capacity, config = settings.config.capacity, settings.config
        length, hay = 2 * capacity + 2 * recall.EDGE, self.inputs[0].tolist()[1:]
        done = {(row["test"], row["place"], row["arm"]) for row in self.recall}
        cells = [
            (test, place, n, arm)
            for test, where in (
                ("needle", recall.places(capacity, length)),
                ("lines", recall.distances(capacity)),
            )
            for place, n in where.items()
            for arm in self.comparison.arms
            if arm != arms.SAMPLED and (test, place, arm) not in done
        ]
        first = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        for test, place, n, arm in tqdm(cells, desc="recall", unit="cell"):
            right = 0
            for i in range(self.args.trials):
                # The same questions for every arm, others in every place.
                seed = f"{test} {place} {i}"
                if test == "needle":
                    start = i * length % max(1, len(hay) - length)
                    asked = recall.needle(self.encode, hay[start : start + length], n, seed)
                else:
                    asked = recall.lines(self.encode, length, n, seed)
                asked.context[:0] = first
                caches = arms.caches_of(arm, self.model, config)
                right += recall.ask(self.model, caches, asked, settings.chunk)
            row = {"test": test, "place": place, "distance": n, "arm": arm}
            self.recall.append(row | {"right": right, "trials": self.args.trials})
            self.keep()

    def keep(self, final: bool = False) -> None:
        """Write what there is, if it is time to."""
        if final or time.monotonic() - self._saved > EVERY:
            resume.save(self.state, self.comparison, self.key, self.recall)
            write(self.args.output, [self.found(final)])
            self._saved = time.monotonic()

    def found(self, finished: bool) -> dict[str, Any]:
        """Return the results so far, JSON-ready."""
        return {
            **self.head,
            "finished": finished,
            "arms": self.comparison.found(),
            "beside_recompute": self.comparison.beside_recompute(),
            "recall": self.recall,
        }


def write(output: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write the page, the picture, and the results where they are of one run."""
    if len(results) == 1:
        write_whole(_with(output, ".json"), (as_json(results[0], 1) + "\n").encode())
    write_whole(_with(output, ".html"), page.page(results).encode())
    plots.save(page.picture(results), _with(output, ".png"))


def _with(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(argv)
    plots.check()
    if args.results:
        write(args.output, [read_results(path) for path in args.results])
    elif args.text is None:
        raise ConfigError("--text names the text to compare on; or give --from results")
    else:
        for name in ("prefill_step_size", "samples"):
            if getattr(args, name) < 1:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} must be at least 1, got {getattr(args, name)}")
        if args.trials < 0 or args.arm_minutes <= 0:
            raise ConfigError("--trials must be at least 0, and --arm-minutes more than 0")
        _Run(args, argv).go()
    terminal.write(f"{_with(args.output, '.html')}\n")
    return 0
