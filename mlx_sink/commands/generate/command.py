"""``python -m mlx_sink.generate``: read a text of any length, stream text for ever."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from mlx_sink.commands.generate import follow
from mlx_sink.commands.generate import resume as turns
from mlx_sink.commands.generate import sampling_options as sampling
from mlx_sink.commands.generate.autosave import Answering, Runner
from mlx_sink.commands.generate.follow import Follower
from mlx_sink.commands.generate.prompt import Asked
from mlx_sink.commands.generate.statistics import summary
from mlx_sink.commands.numbers import MAX_SEED, add_integer
from mlx_sink.commands.options import (
    Parser,
    add_draft_options,
    add_kv_options,
    add_model_options,
    add_sink_options,
    kv_settings,
    program,
)
from mlx_sink.config import NUM_DRAFT_TOKENS, PREFILL_STEP, SinkConfig
from mlx_sink.errors import ConfigError
from mlx_sink.io import terminal
from mlx_sink.io.units import parse_bytes
from mlx_sink.measure import budget
from mlx_sink.models import settings as own_settings
from mlx_sink.models.attach import attach
from mlx_sink.models.load import DEMO, load_draft, load_unattached
from mlx_sink.models.report import Report
from mlx_sink.models.settings import Settings
from mlx_sink.stream.session import Saved
from mlx_sink.stream.stream import Stream

PROG = program("generate")
TEXTS = ("prompt", "system_prompt", "prefill_response", "stop", "extra_eos_token", "marker")
"""Options whose values are text, and not names of files."""

DEMO_TEMP = 0.7
"""Temperature for the demo model, unless stated: without one it repeats itself."""


def parser() -> Parser:
    """Return the command's argument parser."""
    p = Parser(
        prog=PROG,
        description="Read a prompt of any length and stream text for as long as you like, in "
        "constant memory. Text goes to stdout, everything else to stderr.",
    )
    add_model_options(p)
    text = p.add_mutually_exclusive_group()
    text.add_argument("--prompt", "-p", help="what to read first; '-' reads standard input")
    text.add_argument("--prompt-file", help="a UTF-8 text file to read first")
    p.add_argument("--system-prompt", help="system prompt for the chat template")
    p.add_argument("--prefill-response", help="how the answer is to begin")
    p.add_argument("--ignore-chat-template", action="store_true", help="use the prompt as it is")
    p.add_argument("--chat-template-config", help="variables of the chat template, as JSON")
    add_sink_options(p)
    add_kv_options(p)
    budget.add_options(p)
    p.add_argument(
        "--pin-system-prompt",
        action="store_true",
        help="make the whole rendered system prompt sinks, so that it is never forgotten",
    )
    what = "tokens to generate, -1 for ever"
    add_integer(p, "--max-tokens", "-m", least=1, besides=-1, default=100, help=what)
    p.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    p.add_argument(
        "--extra-eos-token", nargs="+", default=[], help="more tokens that end the text"
    )
    p.add_argument("--stop", nargs="+", default=[], help="strings that end the text")
    turns.add_options(p)
    follow.add_options(p)
    sampling.add_options(p)
    add_draft_options(p)
    usual = "a new one each time"
    add_integer(
        p, "--seed", least=0, most=MAX_SEED, usual=usual, help="seed of the random numbers"
    )
    step = PREFILL_STEP
    add_integer(p, "--prefill-step-size", least=1, default=step, help="tokens read at once")
    p.add_argument("--json", action="store_true", help="print the statistics as one JSON object")
    return p


class _Run:
    """One run of the command: what it read, what it made, and the statistics of both."""

    def __init__(self, args: argparse.Namespace, stated: dict[str, Any]):
        self.args = args
        self.file = None if args.session is None else Path(args.session)
        saved = turns.restore(args, stated, parser()) if self.file else None
        _check(args)
        loaded = load_unattached(
            args.model,
            adapter_path=args.adapter_path,
            trust_remote_code=args.trust_remote_code,
        )
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.asked = Asked(args, self.tokenizer, fresh=not (saved and saved.position))
        self.plan: budget.Budget | None = None
        self.report = self._attach(loaded.context, loaded.settings, saved)
        how = sampling.settings(args, DEMO_TEMP if args.model == DEMO else 0.0)
        note: dict[str, Any] = {**(saved.note if saved else {})}
        note["settings"] = how | turns.settings(args)
        for token in args.extra_eos_token:
            try:
                self.tokenizer.add_eos_token(token)
            except ValueError:
                raise ConfigError(
                    f"--extra-eos-token must be a token of the model, got {token!r}"
                ) from None
        self.chosen = sampling.sampling(how, self.tokenizer)
        draft = self._draft_options()
        if saved:
            self.stream = Stream.resume(saved, self.model, self.tokenizer, **draft)
            written = note.get("place", {}).get("written", 0)
            self._say(f"going on at token {self.stream.position}, after {written} bytes of text")
        else:
            window = sampling.penalty_window(how)
            options: dict[str, Any] = {"seed": args.seed, "penalty_window": window} | draft
            self.stream = Stream(self.model, self.tokenizer, **options)
        self.resumed_at = self.stream.position if saved else None
        self.note = note
        self.bar: tqdm[Any] | None = None

    def _say(self, line: str) -> None:
        terminal.say(f"session {str(self.file)!r}: {line}")

    def _attach(self, context: int | None, own: Settings, saved: Saved | None) -> Report:
        args = self.args
        num_sinks, window = args.num_sinks, args.window
        if args.pin_system_prompt:
            num_sinks = max(self.asked.pinned(), num_sinks or own.num_sinks or 0)
        sources: dict[str, str] = {}
        if saved:
            config = saved.config
        else:
            config, sources = own_settings.apply(own, context, num_sinks, window)
            rollback = _num_draft_tokens(args) if args.draft_model else 0
            config = replace(config, rollback=rollback, **kv_settings(args))
        config.check_context(context)
        if args.memory is None:
            return replace(attach(self.model, config), sources=sources)
        limit, step = parse_bytes(args.memory), args.prefill_step_size
        if saved or window is not None:
            self.plan = budget.check(self.model, limit, config, step)
        else:
            self.plan = budget.plan(
                self.model, limit, config, context=context, prefill_step_size=step
            )
        terminal.say(str(self.plan))
        if window is None and sources:
            sources["window"] = "--memory"
        return replace(self.plan.report, sources=sources)

    def _draft_options(self) -> dict[str, Any]:
        """Load the draft model, if there is to be one."""
        args = self.args
        if args.draft_model is None:
            return {}
        model: nn.Module = load_draft(
            args.draft_model,
            self.tokenizer,
            self.report.config,
            trust_remote_code=args.trust_remote_code,
        )
        return {"draft_model": model, "num_draft_tokens": _num_draft_tokens(args)}

    def go(self, interrupted: Callable[[], bool]) -> None:
        """Read, write, and save, until it is done or interrupted."""
        args = self.args
        runner = self.runner = Runner(
            self.stream,
            Answering(self.chosen, args.max_tokens, tuple(args.stop), args.ignore_eos),
            show=terminal.write,
            interrupted=interrupted,
            file=self.file,
            save_every=args.save_every,
            step=args.prefill_step_size,
            note=self.note,
        )
        if self.resumed_at is None:
            # Where it cannot be saved, say so before the work is done.
            runner.save()
        if args.follow is not None:
            around, question = self.asked.around(), self.asked.text
            Follower(runner, args.follow, args.marker, around, question).run()
        else:
            turns.take(runner, self.asked.name, self.asked.tokens, self._progress)
        if self.file is None:
            runner.show(self.stream.flush())
        if args.follow is None and (self.file is None or sys.stdout.isatty()):
            terminal.write("\n")
        runner.save()

    def _progress(self, done: int, total: int) -> None:
        """Show how far the prompt is read; short prompts need no bar."""
        if self.bar is None and total > self.args.prefill_step_size:
            self.bar = terminal.bar(total, "reading", "tok")
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
            if done == total:
                self.bar.close()

    def close(self) -> None:
        """Leave no half-drawn progress bar behind."""
        if self.bar is not None:
            self.bar.close()

    def statistics(self) -> dict[str, Any]:
        """Return what was read and made, the bytes held, and where the stream stands."""
        last = self.runner.last
        statistics: dict[str, Any] = {
            "model": self.args.model,
            "prompt_tokens": self.runner.tokens_read,
            "prompt_tps": round(self.runner.reading_tps, 3),
            "generation_tokens": self.runner.tokens_made,
            "generation_tps": round(last.generation_tps, 3) if last else None,
            "finish_reason": last.finish_reason if last else None,
            "num_sinks": self.report.config.num_sinks,
            "window": self.report.config.window,
            "sources": dict(self.report.sources),
            "cache_bytes": self.stream.nbytes,
            "cache_bytes_full": self.report.nbytes,
            "peak_memory_bytes": mx.get_peak_memory(),
            "position": self.stream.position,
        }
        if self.file is not None:
            statistics |= {
                "session": str(self.file),
                "resumed_at": self.resumed_at,
                "text_bytes": self.runner.place["written"],
                "failed_saves": self.runner.failures,
            }
        if self.args.draft_model:
            guessed, right = self.stream.drafted
            rate = round(right / guessed, 4) if guessed else None
            statistics["draft"] = {"guessed": guessed, "accepted": right, "acceptance_rate": rate}
        return statistics | ({"memory": self.plan.to_dict()} if self.plan else {})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0, or 130 after Ctrl-C, which is no more than the end of `--follow`; errors are raised.
    """
    args = parser().parse_args(argv)
    _check(args)
    with turns.locked(args):
        run = _Run(args, turns.given(parser(), argv))
        with terminal.Interrupt() as interrupt:
            try:
                run.go(interrupt)
            finally:
                run.close()
    statistics = run.statistics()
    print(json.dumps(statistics) if args.json else summary(statistics, PROG), file=sys.stderr)
    ended = args.follow is not None and interrupt.status == terminal.STATUS_INTERRUPTED
    return 0 if ended else interrupt.status


def _num_draft_tokens(args: argparse.Namespace) -> int:
    return NUM_DRAFT_TOKENS if args.num_draft_tokens is None else args.num_draft_tokens


def _check(args: argparse.Namespace) -> None:
    """Raise for values that only a later, less clear error would complain about."""
    for name in TEXTS:
        _check_text(f"--{name.replace('_', '-')}", getattr(args, name))
    if args.num_draft_tokens is not None and args.draft_model is None:
        raise ConfigError("--num-draft-tokens needs --draft-model")
    SinkConfig(
        num_sinks=0 if args.num_sinks is None else args.num_sinks,
        window=1 if args.window is None else args.window,
        **kv_settings(args),
    )
    if args.memory is not None:
        parse_bytes(args.memory)
    follow.check(args)


def _check_text(flag: str, value: str | Sequence[str] | None) -> None:
    """Raise for bytes that are no UTF-8: they come as halves of pairs, and cannot be written."""
    for text in [value] if isinstance(value, str) else value or ():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{flag} must be UTF-8, got {text!a}") from None
