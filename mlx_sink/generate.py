"""``python -m mlx_sink.generate``: read a text of any length, stream text for ever."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from mlx_sink import cli, sampling
from mlx_sink.attach import attach
from mlx_sink.config import NUM_DRAFT_TOKENS, SinkConfig
from mlx_sink.errors import ConfigError, InputError
from mlx_sink.load import DEMO, load_draft, load_unattached
from mlx_sink.prompt import Prompt, read_text, render
from mlx_sink.report import Report, format_bytes
from mlx_sink.stream import GenerationResponse, Stream

PROG = "python -m mlx_sink.generate"
DEMO_TEMP = 0.7
"""Temperature for the demo model, unless stated: without one it repeats itself."""


def parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    p = cli.Parser(
        prog=PROG,
        description="Read a prompt of any length and stream text for as long as you like, in "
        "constant memory. Text goes to stdout, everything else to stderr.",
    )
    cli.add_model_options(p)
    text = p.add_mutually_exclusive_group()
    text.add_argument("--prompt", "-p", help="what to read first; '-' reads standard input")
    text.add_argument("--prompt-file", help="a UTF-8 text file to read first")
    p.add_argument("--system-prompt", help="system prompt for the chat template")
    p.add_argument("--prefill-response", help="how the answer is to begin")
    p.add_argument("--ignore-chat-template", action="store_true", help="use the prompt as it is")
    p.add_argument("--chat-template-config", help="variables of the chat template, as JSON")
    cli.add_sink_options(p)
    cli.add_kv_options(p)
    p.add_argument(
        "--pin-system-prompt",
        action="store_true",
        help="make the whole rendered system prompt sinks, so that it is never forgotten",
    )
    p.add_argument(
        "--max-tokens", "-m", type=int, default=100, help="tokens to generate, -1 for ever (100)"
    )
    p.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    p.add_argument(
        "--extra-eos-token", nargs="+", default=[], help="more tokens that end the text"
    )
    p.add_argument("--stop", nargs="+", default=[], help="strings that end the text")
    sampling.add_options(p)
    cli.add_draft_options(p)
    p.add_argument("--seed", type=int, help="seed of the random numbers")
    p.add_argument(
        "--prefill-step-size", type=int, default=2048, help="tokens read at once (2048)"
    )
    p.add_argument("--json", action="store_true", help="print the statistics as one JSON object")
    return p


class _Run:
    """One run of the command: what it read, what it made, and the statistics of both."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        loaded = load_unattached(
            args.model,
            adapter_path=args.adapter_path,
            tokenizer_config={"trust_remote_code": args.trust_remote_code},
            trust_remote_code=args.trust_remote_code,
        )
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.prompt = _prompt(args, self.tokenizer)
        self.report = self._attach(loaded.context)
        self.settings = sampling.settings(args, DEMO_TEMP if args.model == DEMO else 0.0)
        window = sampling.penalty_window(self.settings)
        self.text = Stream(
            self.model,
            self.tokenizer,
            seed=args.seed,
            penalty_window=window,
            draft_model=self._load_draft(),
            num_draft_tokens=_num_draft_tokens(args),
        )
        self.last: GenerationResponse | None = None
        self.read = 0
        self.bar: tqdm[Any] | None = None

    def _attach(self, context: int | None) -> Report:
        args, num_sinks = self.args, self.args.num_sinks
        if args.pin_system_prompt:
            if not self.prompt.system:
                raise ConfigError("--pin-system-prompt needs --system-prompt")
            num_sinks = max(self.prompt.system, num_sinks or 0)
        config = SinkConfig.for_context(context, num_sinks, args.window)
        config.check_context(context)
        rollback = _num_draft_tokens(args) if args.draft_model else 0
        config = replace(config, rollback=rollback, **cli.kv_settings(args))
        return attach(self.model, config)

    def _load_draft(self) -> nn.Module | None:
        args = self.args
        if args.draft_model is None:
            return None
        return load_draft(
            args.draft_model,
            self.tokenizer,
            self.report.config,
            trust_remote_code=args.trust_remote_code,
        )

    def stream(self) -> None:
        """Generate, and write the text as it comes."""
        args = self.args
        for token in args.extra_eos_token:
            self.tokenizer.add_eos_token(token)
        self.text.feed(
            self.prompt.tokens,
            prefill_step_size=args.prefill_step_size,
            progress=self._progress,
        )
        chosen = sampling.sampling(self.settings, self.tokenizer)
        for response in self.text.generate(
            args.max_tokens,
            sampler=chosen.sampler,
            logits_processors=chosen.processors,
            stop=args.stop,
            ignore_eos=args.ignore_eos,
        ):
            self.last = response
            if response.text:
                cli.write(response.text)
        cli.write("\n")

    def _progress(self, done: int, total: int) -> None:
        """Show how far the prompt is read; short prompts need no bar."""
        if self.bar is None and total > self.args.prefill_step_size:
            pace = 0.2 if sys.stderr.isatty() else 10.0
            self.bar = tqdm(total=total, desc="reading", unit="tok", mininterval=pace, leave=False)
        if self.bar is not None:
            self.bar.update(done - self.read)
            if done == total:
                self.bar.close()
        self.read = done

    def close(self) -> None:
        """Leave no half-drawn progress bar behind."""
        if self.bar is not None:
            self.bar.close()

    def statistics(self) -> dict[str, Any]:
        """Return what was read and made, the bytes held, and where the stream stands."""
        last = self.last
        made = last.generation_tokens if last else 0
        return {
            "model": self.args.model,
            "prompt_tokens": self.read,
            "prompt_tps": round(last.prompt_tps, 3) if last else None,
            "generation_tokens": made,
            "generation_tps": round(last.generation_tps, 3) if last else None,
            "finish_reason": last.finish_reason if last else None,
            "num_sinks": self.report.config.num_sinks,
            "window": self.report.config.window,
            "cache_bytes": self.text.nbytes,
            "cache_bytes_full": self.report.nbytes,
            "peak_memory_bytes": mx.get_peak_memory(),
            "position": self.text.position,
            **({"draft": self._drafted()} if self.args.draft_model else {}),
        }

    def _drafted(self) -> dict[str, Any]:
        guessed, right = self.text.drafted
        rate = round(right / guessed, 4) if guessed else None
        return {"guessed": guessed, "accepted": right, "acceptance_rate": rate}


def _prompt(args: argparse.Namespace, tokenizer: Any) -> Prompt:
    """Read and render the prompt that the arguments name."""
    if args.prompt_file is not None:
        text = read_text(args.prompt_file, f"prompt file {args.prompt_file!r}")
    elif args.prompt == "-":
        text = read_text(sys.stdin.buffer, "standard input")
    elif args.prompt is not None:
        text = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    else:
        text = "Once upon a time" if args.model == DEMO else "hello"
    options: object = {}
    if args.chat_template_config is not None:
        try:
            options = json.loads(args.chat_template_config)
        except ValueError:
            options = None
    if not isinstance(options, dict):
        raise InputError("--chat-template-config must be a JSON object")
    return render(
        tokenizer,
        text,
        system=args.system_prompt,
        chat=not args.ignore_chat_template,
        response=args.prefill_response,
        template_options=cast("dict[str, Any]", options),
    )


def _summary(s: dict[str, Any]) -> str:
    def rate(tps: float | None) -> str:
        return "" if tps is None else f" at {tps:.1f} tok/s"

    lines = [
        f"read {s['prompt_tokens']} tokens{rate(s['prompt_tps'])}, "
        f"made {s['generation_tokens']}{rate(s['generation_tps'])}; "
        f"the stream stands at token {s['position']}",
        f"cache {format_bytes(s['cache_bytes'])} ({s['num_sinks']} sinks + window "
        f"{s['window']}; {format_bytes(s['cache_bytes_full'])} when full), "
        f"peak memory {format_bytes(s['peak_memory_bytes'])}",
    ]
    if "draft" in s:
        drafted = s["draft"]
        lines.append(
            f"the draft model guessed {drafted['guessed']} tokens, {drafted['accepted']} right"
            + (f" ({drafted['acceptance_rate']:.0%})" if drafted["guessed"] else "")
        )
    if s["model"] == DEMO:
        lines.append(
            "this was the small demo model; for a real one: "
            f"{PROG} --model mlx-community/Llama-3.2-3B-Instruct-4bit"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0, or 130 after Ctrl-C; errors are raised.
    """
    args = parser().parse_args(argv)
    _check(args)
    run, status = _Run(args), 0
    try:
        run.stream()
    except KeyboardInterrupt:
        status = cli.STATUS_INTERRUPTED
        cli.write("\n")
    finally:
        run.close()
    statistics = run.statistics()
    print(json.dumps(statistics) if args.json else _summary(statistics), file=sys.stderr)
    return status


def _num_draft_tokens(args: argparse.Namespace) -> int:
    return NUM_DRAFT_TOKENS if args.num_draft_tokens is None else args.num_draft_tokens


def _check(args: argparse.Namespace) -> None:
    """Raise for values that only a later, less clear error would complain about."""
    if args.max_tokens == 0 or args.max_tokens < -1:
        raise ConfigError(f"--max-tokens must be positive, or -1 for ever, got {args.max_tokens}")
    if args.prefill_step_size < 1:
        raise ConfigError(f"--prefill-step-size must be at least 1, got {args.prefill_step_size}")
    if args.num_draft_tokens is not None and args.draft_model is None:
        raise ConfigError("--num-draft-tokens needs --draft-model")
    if _num_draft_tokens(args) < 1:
        raise ConfigError(f"--num-draft-tokens must be at least 1, got {args.num_draft_tokens}")
    SinkConfig(
        num_sinks=0 if args.num_sinks is None else args.num_sinks,
        window=1 if args.window is None else args.window,
        **cli.kv_settings(args),
    )
    sampling.check(args)


if __name__ == "__main__":
    cli.run(main, PROG)
