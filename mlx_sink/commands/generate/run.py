"""One run of `generate`: load, attach, read, write, save."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from mlx_sink.commands.generate import resume
from mlx_sink.commands.generate import sampling_options as sampling
from mlx_sink.commands.generate.autosave import Answering, Runner
from mlx_sink.commands.generate.follow import Follower
from mlx_sink.commands.generate.options import check, num_draft_tokens, parser
from mlx_sink.commands.generate.prompt import Asked
from mlx_sink.commands.options import kv_settings, recall_settings
from mlx_sink.errors import OutputError
from mlx_sink.io import terminal
from mlx_sink.io.units import parse_bytes
from mlx_sink.measure import budget
from mlx_sink.models.attach import attach
from mlx_sink.models.checkpoints import settings as own_settings
from mlx_sink.models.checkpoints.settings import Settings
from mlx_sink.models.load import DEMO, load_draft, load_unattached
from mlx_sink.models.report import Report
from mlx_sink.models.vocabulary import vocabulary
from mlx_sink.stream.session import Saved
from mlx_sink.stream.stream import Stream
from mlx_sink.stream.text.control import add_end

DEMO_TEMP = 0.7
"""Temperature for the demo model, unless stated: without one it repeats itself."""


ARCHIVE_SHARE = 4
"""Of ``--memory`` the archive gets one part in so many, unless stated."""


class Run:
    """One run of the command: what it read, what it made, and the statistics of both."""

    def __init__(self, args: argparse.Namespace, stated: dict[str, Any]):
        self.args = args
        self.file = None if args.session is None else Path(args.session)
        saved = resume.restore(args, stated, parser()) if self.file else None
        check(args)
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
        note["settings"] = how | resume.settings(args)
        tokens = vocabulary(self.model)
        for token in args.extra_eos_token:
            add_end(self.tokenizer, token, tokens)
        # An answer that goes on after its end is the user's next turn, and it is not the model's.
        endless = args.ignore_eos and self.asked.is_chat
        self.chosen = sampling.sampling(how, self.tokenizer, tokens, endless=endless)
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
            rollback = num_draft_tokens(args) if args.draft_model else 0
            others = {"rollback": rollback, **kv_settings(args), **recall_settings(args)}
            if args.memory is not None and args.recall_memory is None:
                others["recall_memory"] = parse_bytes(args.memory) // ARCHIVE_SHARE
            config, sources = own_settings.apply(own, context, num_sinks, window, **others)
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
        return {"draft_model": model, "num_draft_tokens": num_draft_tokens(args)}

    def go(self, interrupted: Callable[[], bool]) -> None:
        """Read, write, and save, until it is done or interrupted."""
        args = self.args
        runner = self.runner = Runner(
            self.stream,
            Answering(
                self.chosen,
                args.max_tokens,
                tuple(args.stop),
                args.ignore_eos,
                args.show_special_tokens,
            ),
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
        try:
            self._take(runner)
        except (OutputError, BrokenPipeError):
            # The reader, or the terminal, is gone: what was made is not.
            runner.save()
            raise
        runner.save()

    def _take(self, runner: Runner) -> None:
        """Read and answer, once or for every marker of the followed file."""
        args = self.args
        runner.show("")
        if args.follow is not None:
            around, question = self.asked.around(), self.asked.text
            special = args.allow_special_tokens
            Follower(runner, args.follow, args.marker, around, question, special=special).run()
        else:
            asked = self.asked
            resume.take(
                runner, asked.name, asked.tokens, self._progress, recall=asked.is_question or None
            )
        if self.file is None:
            runner.show(self.stream.flush())
        if args.follow is None and (self.file is None or sys.stdout.isatty()):
            terminal.write("\n")

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
        last, archived = self.runner.last, self.stream.archived
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
            "cache_bytes": self.stream.nbytes - (archived.nbytes if archived else 0),
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
        if archived:
            statistics["recall"] = {
                "tokens": [archived.tokens.start, archived.tokens.stop],
                "archive_bytes": archived.nbytes,
                "archive_bytes_full": self.report.archive_bytes,
            }
        if self.args.draft_model:
            guessed, right = self.stream.drafted
            rate = round(right / guessed, 4) if guessed else None
            statistics["draft"] = {"guessed": guessed, "accepted": right, "acceptance_rate": rate}
        return statistics | ({"memory": self.plan.to_dict()} if self.plan else {})
