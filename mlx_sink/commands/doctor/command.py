"""``python -m mlx_sink.doctor``: is the kernel right on this machine, and what does it gain?

Checks every common variant of the kernels anew, whatever verdicts are stored, and times one
decode step of one attention layer, and on Metal the reading of a chunk. Without Metal it times
what serves there. With ``--kv-bits`` it does so for quantised rings, and for the heads that the
group size divides. Verdicts on other variants (learned sinks, unusual heads) come from earlier use
of the library; it lists those that are stored.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_sink.attention.kernels import check_prefill, inputs, source, trust
from mlx_sink.attention.kernels.tables import MAX_QUERIES
from mlx_sink.commands.doctor import models, report
from mlx_sink.commands.doctor.examine import (
    DTYPES,
    N_KV_HEADS,
    Examination,
    PrefillKernel,
    TimedKernel,
    examine,
)
from mlx_sink.commands.numbers import add_integer, integer
from mlx_sink.commands.options import (
    Parser,
    add_kv_options,
    kv_settings,
    program,
)
from mlx_sink.config import DEFAULT_NUM_SINKS, DEFAULT_WINDOW, SinkConfig
from mlx_sink.errors import ConfigError
from mlx_sink.io import terminal

PROG = program("doctor")
DESCRIPTION = (
    "Check the GPU kernels on this machine against plain operations, and time both. Without a GPU "
    "the plain operations are timed. The exit status is 1 if a kernel is wrong here."
)
GPU_DEFAULTS: dict[str, list[Any]] = {
    "dtype": ["float16", "bfloat16"],
    "head_dim": [64, 80, 96, 128, 192, 256],
    "group": [1, 4, 8],
    "queries": [1, 4],
}
CPU_DEFAULTS: dict[str, list[Any]] = {
    "dtype": ["float32"],
    "head_dim": [64, 128],
    "group": [1, 4],
    "queries": [1],
}
"""Where there is no kernel to check, and plain operations take long."""


def parser() -> Parser:
    """Return the command's parser."""
    p = Parser(prog=PROG, description=DESCRIPTION)
    add_integer(
        p,
        "--num-sinks",
        least=0,
        default=DEFAULT_NUM_SINKS,
        help="sinks of the timed ring",
    )
    add_integer(
        p, "--window", least=1, default=DEFAULT_WINDOW, help="window of the timed ring, in tokens"
    )
    add_kv_options(p)
    p.set_defaults(**(GPU_DEFAULTS if source.is_available() else CPU_DEFAULTS))
    p.add_argument("--dtype", nargs="+", choices=DTYPES, help=f"dtypes ({_default('dtype')})")
    p.add_argument(
        "--head-dim",
        nargs="+",
        type=_head_dim,
        metavar="DIM",
        help=f"head sizes, multiples of 16 ({_default('head_dim')})",
    )
    p.add_argument(
        "--group",
        nargs="+",
        type=integer(1, inputs.MAX_GROUP),
        metavar="N",
        help=f"query heads for each kv head, at most {inputs.MAX_GROUP} ({_default('group')})",
    )
    p.add_argument(
        "--queries",
        nargs="+",
        type=integer(1, MAX_QUERIES),
        metavar="N",
        help=f"new tokens of a decode step, at most {MAX_QUERIES} ({_default('queries')})",
    )
    add_integer(p, "--rounds", least=1, default=10, help="rounds of each timing")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="also time the attention of ten well-known models, and write all results to FILE as "
        "JSON, to be attached to an issue: with chip, memory and versions, without user name, "
        "host name and paths",
    )
    return p


def _head_dim(text: str) -> int:
    value = integer(16)(text)
    if value % 16:
        raise argparse.ArgumentTypeError(f"must be a multiple of 16, got {value}")
    return value


def _default(option: str) -> str:
    return f"{_words(GPU_DEFAULTS[option])}; without a GPU {_words(CPU_DEFAULTS[option])}"


def _words(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


def as_text(examination: Examination) -> str:
    """Lay the results out for people."""
    lines = [f"{name:>12}  {value}" for name, value in examination.machine.items()]
    if examination.backend == "cuda":
        lines.append("the kernels run through CUDA, for which their text has only been compiled")
    if not examination.backend:
        lines.append(
            "no Metal on this machine, and no CUDA: the plain operations serve, and are timed here"
        )
    config = examination.config
    lines.append(
        f"one decode step of one layer, {config.num_sinks} sinks + window {config.window}, "
        f"{N_KV_HEADS} kv heads, in microseconds"
    )
    lines.append(
        f"{'kernel':<44} {'verdict':<8} {'error':>8} {'kernel':>9} {'ops':>9} {'MLX sdpa':>9}"
    )
    for result in examination.decode:
        lines += _decode_lines(result)
    lines += _prefill_lines(examination.prefill)
    if examination.stored:
        wrong = {name: v for name, v in examination.stored.items() if not v.passed}
        lines.append(f"stored verdicts: {len(examination.stored)}, {len(wrong)} of them WRONG")
        lines += [f"{name}\n    {verdict.reason}" for name, verdict in wrong.items()]
    return "\n".join(lines) + "\n"


def _decode_lines(result: TimedKernel) -> list[str]:
    verdict, times = result.verdict, result.times
    word = "-" if verdict is None else "right" if verdict.passed else "WRONG"
    error = None if verdict is None else verdict.error
    line = (
        f"{result.kernel:<44} {word:<8} {_number(error, '.1e'):>8} "
        f"{_number(times.kernel, '.1f'):>9} {times.operations:>9.1f} {times.sdpa:>9.1f}"
    )
    return [line] if verdict is None or verdict.passed else [line, f"    {verdict.reason}"]


def _prefill_lines(results: Sequence[PrefillKernel]) -> list[str]:
    if not results:
        return []
    chunk, window = check_prefill.TIMED_CHUNK, check_prefill.TIMED_RING.window
    lines = [f"reading {chunk} tokens in one layer, window {window}, against the plain operations"]
    lines.append(f"{'kernel':<44} {'verdict':<8} {'error':>8} {'speed':>9}")
    for result in results:
        verdict = result.verdict
        word = "right" if verdict.passed else "WRONG"
        speed = "-" if verdict.speedup is None else f"{verdict.speedup:.2f}x"
        note = "serves" if result.serves else verdict.reason or "the plain operations serve"
        error = _number(verdict.error, ".1e")
        lines.append(f"{result.kernel:<44} {word:<8} {error:>8} {speed:>9}  {note}")
    return lines


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 if a kernel is wrong on this machine."""
    args: argparse.Namespace = parser().parse_args(arguments)
    config = SinkConfig(args.num_sinks, args.window, **kv_settings(args))
    size = config.kv_group_size if config.bits[0] else 1
    head_dims = [dim for dim in args.head_dim if dim % size == 0]
    if not head_dims:
        raise ConfigError(
            f"--kv-group-size {size} divides none of --head-dim {_words(args.head_dim)}"
        )
    if args.report is not None:
        report.check_path(args.report)
    trust.is_wanted()  # an error where the environment demands kernels that cannot run
    examination = examine(args.dtype, head_dims, args.group, config, args.rounds, args.queries)
    if args.report is not None:
        conditions = models.Conditions.of_this_machine(args.rounds)
        report.write(args.report, examination, conditions, models.time_shapes(conditions))
    results = json.dumps(examination.to_dict(), indent=1) + "\n"
    terminal.write(results if args.json else as_text(examination))
    return int(examination.is_wrong)
