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
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from mlx_sink.commands import plots
from mlx_sink.commands.compare import page
from mlx_sink.commands.numbers import add_integer, add_real
from mlx_sink.commands.options import Parser, add_model_options, add_sink_options, program
from mlx_sink.errors import ConfigError, InputError
from mlx_sink.io import lock, terminal
from mlx_sink.io import text as text_io
from mlx_sink.io.atomic import write_whole
from mlx_sink.io.units import parse_tokens
from mlx_sink.measure import losses
from mlx_sink.measure.comparison import file as comparison_file
from mlx_sink.measure.comparison import methods, needles
from mlx_sink.measure.comparison.results import LINES, NEEDLE, ModelInfo, Results, Score, TextInfo
from mlx_sink.measure.comparison.run import Comparison, ComparisonSettings
from mlx_sink.measure.machine import as_json, machine
from mlx_sink.models.attach import attach
from mlx_sink.models.checkpoints import settings as own_settings
from mlx_sink.models.lazy import weight_bytes
from mlx_sink.models.load import load_unattached
from mlx_sink.models.vocabulary import vocabulary
from mlx_sink.stream.session import fingerprint
from mlx_sink.stream.text.encode import Encoder, Piece
from mlx_sink.stream.text.tokens import token_ids

PROG = program("compare")
DESCRIPTION = (
    "Compare full attention, windows and sinks on a text: time, memory, loss, needle tests, as a "
    "page. A run that was interrupted is resumed when the same command is given again."
)
EVERY = 30.0
"""Seconds after which an unfinished run is saved."""


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
    add("--arms", nargs="+", choices=methods.NAMES, default=methods.USUAL, help="what to compare")
    add_integer(p, "--prefill-step-size", least=1, default=512, help="tokens read at once")
    what = "reading time of a method at most, in minutes"
    add_real(p, "--arm-minutes", least=0, above=True, default=3, help=what)
    what = "tokens between lengths to recompute"
    add_integer(p, "--samples", least=1, default=64, help=what)
    what = "questions for each place and method, 0 for none"
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
    lengths: set[int] = set()
    for word in words:
        first, dots, last = word.partition("..")
        low = parse_tokens(first)
        if not dots:
            if low > tokens:
                raise InputError(f"the text has {tokens} tokens, fewer than the length {word}")
            lengths.add(low)
            continue
        high = parse_tokens(last)
        if low > tokens:
            raise InputError(f"the text has {tokens} tokens, fewer than the length {first}")
        while low < min(high, tokens):
            lengths.add(low)
            low *= 2
        lengths.add(min(high, tokens))
    return tuple(sorted(lengths))


def read_results(path: Path) -> Results:
    """Read the results of an earlier run.

    Raises:
        InputError: The file holds none, or none that this version can show.
    """
    text = text_io.read(path, repr(str(path)))
    try:
        values: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not JSON that can be read: {error}") from None
    try:
        return Results.from_dict(values)
    except InputError as error:
        raise InputError(f"{str(path)!r} cannot be shown: {error}") from None


class _Run:
    """A comparison, its files, and its progress."""

    def __init__(self, args: argparse.Namespace, argv: Sequence[str]):
        self.args = args
        text = text_io.read(args.text, f"text file {args.text!r}")
        options = {"adapter_path": args.adapter_path} if args.adapter_path else {}
        model, self.tokenizer, context, own = load_unattached(
            args.model, trust_remote_code=args.trust_remote_code, **options
        )
        self.model = model
        config, _ = own_settings.apply(own, context, args.num_sinks, args.window)
        self._encoder, self._vocabulary = Encoder(self.tokenizer), vocabulary(model)
        ids = self.encode(text)
        self.inputs, targets = losses.cut(ids, self.tokenizer.bos_token_id)
        here = machine()
        attach(model, config)  # A model that is refused ends here.
        settings = ComparisonSettings(
            config=config,
            methods=tuple(args.arms),
            lengths=lengths_of(args.lengths, self.inputs.shape[1]),
            chunk=args.prefill_step_size,
            seconds=60 * args.arm_minutes,
            samples=args.samples,
            limit=here.memory * 3 // 4,
        )
        self.comparison = Comparison(model, self.inputs, targets, settings)
        self.scores: list[Score] = []
        self.state = _with(args.output, ".state")
        digest = hashlib.sha256(text.encode()).hexdigest()
        sums = fingerprint(model, self.tokenizer)
        self.key = comparison_file.key_of(settings, trials=args.trials, text=digest, **sums)
        self.start = Results(
            command=shlex.join(["python", "-m", "mlx_sink.compare", *argv]),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            machine=here,
            model=ModelInfo(args.model, context, weight_bytes(model)),
            text=TextInfo(Path(args.text).name, self.inputs.shape[1]),
            config=config,
            lengths=settings.lengths,
            trials=args.trials,
            choices=needles.CHOICES,
            finished=False,
            methods={},
            beside_recompute={},
            scores=(),
        )
        self._saved = time.monotonic()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, in which no word is a control token."""
        ids = self._encoder.encode(Piece(text))
        return token_ids(ids, self._vocabulary, self.tokenizer)

    def go(self) -> None:
        """Run to the end, and leave the results and the page."""
        if self.state.exists():
            self.scores = comparison_file.restore(self.state, self.comparison, self.key)
            terminal.say(f"resuming from {self.state}")
        terminal.say(str(self.start.machine))
        began, shape = time.monotonic(), "{desc}{percentage:3.0f}%|{bar}| {elapsed}{postfix} left"
        with tqdm(desc="reading", total=1.0, bar_format=shape) as bar:
            for _ in self.comparison.steps():
                elapsed, left = time.monotonic() - began, self.comparison.seconds_left()
                bar.total, bar.n = elapsed + left, elapsed
                bar.set_postfix_str(tqdm.format_interval(left), refresh=False)
                bar.update(0)
                self.keep()
        if self.args.trials:
            self.ask()
        self.keep(final=True)
        self.state.unlink(missing_ok=True)

    def ask(self) -> None:
        """Put the questions that have not been put yet."""
        capacity = self.comparison.settings.config.capacity
        length = 2 * capacity + 2 * needles.EDGE
        tests = {
            NEEDLE: needles.places(capacity, length),
            LINES: needles.distances(capacity),
        }
        done = {(score.test, score.place, score.method) for score in self.scores}
        cells = [
            (test, place, distance, method)
            for test, places in tests.items()
            for place, distance in places.items()
            for method in self.comparison.runs
            if method != methods.SAMPLED and (test, place, method) not in done
        ]
        for test, place, distance, method in tqdm(cells, desc="needle tests", unit="cell"):
            # The same questions for every method, others in every place.
            seeds = [f"{test} {place} {i}" for i in range(self.args.trials)]
            questions = [self._question(test, i, length, distance, s) for i, s in enumerate(seeds)]
            right = sum(self._is_right(method, question) for question in questions)
            self.scores.append(Score(test, place, distance, method, right, len(questions)))
            self.keep()

    def _question(
        self, test: str, i: int, length: int, distance: int, seed: str
    ) -> needles.Question:
        if test == NEEDLE:
            hay = self.inputs[0, 1:]
            start = i * length % max(1, len(hay) - length)
            part = hay[start : start + length].tolist()
            question = needles.needle(self.encode, part, distance, seed)
        else:
            question = needles.lines(self.encode, length, distance, seed)
        bos = self.tokenizer.bos_token_id
        return question if bos is None else question.after(bos)

    def _is_right(self, method: str, question: needles.Question) -> bool:
        settings = self.comparison.settings
        caches = methods.caches_of(method, self.model, settings.config)
        return needles.ask(self.model, caches, question, settings.chunk)

    def keep(self, final: bool = False) -> None:
        """Save the run and write the page, if it is time to."""
        if final or time.monotonic() - self._saved > EVERY:
            comparison_file.save(self.state, self.comparison, self.key, self.scores)
            write(self.args.output, [self.results(final)])
            self._saved = time.monotonic()

    def results(self, finished: bool) -> Results:
        """Return the results so far."""
        return replace(
            self.start,
            finished=finished,
            methods=self.comparison.results(),
            beside_recompute=self.comparison.beside_recompute(),
            scores=tuple(self.scores),
        )


def write(output: Path, results: Sequence[Results]) -> None:
    """Write the page, the picture, and the results where they are of one run."""
    if len(results) == 1:
        write_whole(_with(output, ".json"), (as_json(results[0].to_dict(), 1) + "\n").encode())
    write_whole(_with(output, ".html"), page.page(results).encode())
    if plots.is_available():
        plots.save(page.picture(results), _with(output, ".png"))


def _with(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(argv)
    if not plots.is_available():
        terminal.warn(
            f"without matplotlib there are no plots ({plots.INSTALL}): tables in "
            f"{_with(args.output, '.html').name}, figures in {_with(args.output, '.json').name}"
        )
    if not args.results and args.text is None:
        raise ConfigError("--text names the text to compare on; or give --from results")
    with lock.holding(args.output, f"comparison {str(args.output)!r}", warn=terminal.warn):
        if args.results:
            write(args.output, [read_results(path) for path in args.results])
        else:
            _Run(args, argv).go()
    terminal.write(f"{_with(args.output, '.html')}\n")
    return 0
