"""``python -m mlx_sink.doctor``: is the kernel right on this machine, and what does it gain?

Checks every common specialisation anew, whatever verdict was kept, and times one decode step of
one attention layer, and on Metal a chunk that is read. Without Metal it times what serves there.
With ``--kv-bits`` it does so for quantised rings, and for the heads that the group size divides.
What use has found about other specialisations (learned sinks, unusual heads) is in the verdicts
that were kept, which it lists.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_sink.attention import reference
from mlx_sink.attention.packed import Packed, packed
from mlx_sink.attention.ring import Ring, Turn, layout_of
from mlx_sink.attention.rope import Rotation
from mlx_sink.commands import options as cli
from mlx_sink.config import SinkConfig
from mlx_sink.errors import ConfigError
from mlx_sink.io import terminal
from mlx_sink.kernels import check_decode, check_prefill, decode, source, trust
from mlx_sink.kernels.check_decode import DecodeVariant
from mlx_sink.kernels.decode_packed import decode_packed
from mlx_sink.kernels.tables import MAX_QUERIES, decode_tables

PROG = "python -m mlx_sink.doctor"
DESCRIPTION = (
    "Check the Metal kernels on this machine and time them against what serves without them."
)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
GROUPS = (1, 4, 8)
FEW = {"dtype": ("float32",), "head_dim": (64, 128), "group": (1, 4)}
"""What is timed where there is no kernel to check, and plain operations take long."""
N_KV_HEADS = 8
STEPS = 32
"""Steps of a round of a timing on a GPU: enough to hide what a round itself costs."""
STEPS_ON_CPU = 2
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of one decode step of one layer, the median of some rounds.

    Attributes:
        kernel: The Metal kernel; None where there is none.
        ops: The plain operations that serve without it.
        sdpa: MLX's own attention over as many keys, which knows no sinks: what a cache without
            them costs.
    """

    kernel: float | None
    ops: float
    sdpa: float


def measure(spec: DecodeVariant, config: SinkConfig, *, rounds: int, kernel: bool) -> Times:
    """Time a step on a full ring whose window spans two epochs.

    Args:
        spec: What to time, for 8 kv heads and one sequence.
        config: The ring.
        rounds: How often.
        kernel: Time the Metal kernel too.
    """
    S, W = config.num_sinks, config.window
    start = 3 * config.epoch_length
    ring = Ring(S, W, config.epoch_length, start + W // 2, start, start - config.epoch_length)
    layout = layout_of(ring, spec.n)
    block = layout.block(ring.tokens, layout.end)
    rows = max(run.row + run.length for run in layout.runs)
    pairs = spec.rotated // 2
    rotation = Rotation([10000.0 ** -(i / pairs) for i in range(pairs)], spec.interleaved)
    q, k, v = (
        mx.random.normal((1, heads, length, dim)).astype(spec.dtype)
        for heads, length, dim in (
            (N_KV_HEADS * spec.group, spec.n, spec.head_dim),
            (N_KV_HEADS, rows, spec.head_dim),
            (N_KV_HEADS, rows, spec.v_head_dim),
        )
    )
    scale = spec.head_dim**-0.5
    tables = decode_tables(layout, block, rotation, packed=spec.packed is not None)
    held: tuple[Packed, Packed] | None = None
    if spec.packed is not None:
        k_bits, v_bits, size = spec.packed
        held = packed(k, S, k_bits, size), packed(v, S, v_bits, size)

    def by_kernel(q: mx.array) -> mx.array:
        if held is not None:
            return decode_packed(q, *held, tables, scale=scale)
        return decode.decode(q, k, v, tables, scale=scale)

    def by_ops(q: mx.array) -> mx.array:
        still = q * scale
        queries = {
            turn: rotation.turn(still, layout.turns(turn), key=turn) if turn else still
            for turn in Turn
        }
        keys, values = (k, v) if held is None else (x.expanded() for x in held)
        return reference.attend(queries, keys, values, block, W)

    def by_sdpa(q: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)

    return Times(
        _microseconds(by_kernel, q, rounds) if kernel else None,
        _microseconds(by_ops, q, rounds),
        _microseconds(by_sdpa, q, rounds),
    )


def _microseconds(step: Callable[[mx.array], mx.array], q: mx.array, rounds: int) -> float:
    """Return a step's time: the median over rounds of steps that wait for one another.

    As layers do: each step's queries are the outputs of the one before.
    """
    times: list[float] = []
    steps = STEPS if source.is_available() else STEPS_ON_CPU
    for _ in range(rounds + 1):
        began, x = time.perf_counter(), q
        for _ in range(steps):
            x = step(x)
        x.sum().item()
        times.append((time.perf_counter() - began) / steps * 1e6)
    return round(statistics.median(times[1:]), 1)  # the first compiles


def examine(
    dtypes: Sequence[str],
    head_dims: Sequence[int],
    groups: Sequence[int],
    config: SinkConfig,
    rounds: int = 10,
    queries: Sequence[int] = (1,),
) -> dict[str, Any]:
    """Check and time specialisations on this machine.

    Args:
        dtypes: Names of dtypes, as in `DTYPES`.
        head_dims: Sizes of the heads.
        groups: Query heads for each kv head.
        config: The ring that is timed.
        rounds: Rounds of a timing.
        queries: New tokens of a step.

    Returns:
        A JSON-ready dictionary: ``machine``, ``metal``, ``backend`` (``metal``, ``cuda`` or
        empty), ``ring``, a list of ``kernels`` and one for ``prefill`` (`examine_prefill`), and
        the verdicts ``kept`` from use.
    """
    available = source.is_available()
    kernels: list[dict[str, Any]] = []
    (k_bits, v_bits), size = config.bits, config.kv_group_size
    kinds = list(itertools.product(dtypes, head_dims, groups, queries))
    for dtype, head_dim, group, n in tqdm(kinds, desc="checking", unit="kernel", leave=False):
        spec = DecodeVariant(
            *(DTYPES[dtype], group, head_dim, head_dim, n, head_dim, False),
            packed=None if k_bits is None or v_bits is None else (k_bits, v_bits, size),
        )
        verdict = check_decode.check(spec) if available else None
        ran = verdict is not None and verdict.error is not None
        times = measure(spec, config, rounds=rounds, kernel=ran)
        kernels.append(
            {
                "kernel": spec.name,
                "passed": verdict.passed if verdict else None,
                "max_error": verdict.error if verdict else None,
                "reason": verdict.reason if verdict else "no Metal, no CUDA",
                "kernel_us": times.kernel,
                "ops_us": times.ops,
                "sdpa_us": times.sdpa,
            }
        )
    return {
        "machine": _machine(),
        "metal": source.backend() == "metal",
        "backend": source.backend(),
        "ring": {**config.to_dict(), "n_kv_heads": N_KV_HEADS},
        "kernels": kernels,
        "prefill": examine_prefill(dtypes, head_dims),
        "kept": [{"kernel": k, **v.to_dict()} for k, v in trust.stored().items()]
        if available
        else [],
    }


def examine_prefill(dtypes: Sequence[str], head_dims: Sequence[int]) -> list[dict[str, Any]]:
    """Check the prefill kernel and time it against the plain operations; on Metal alone.

    Returns:
        A dictionary for each kernel; ``speedup`` is None where it failed, and it ``serves`` where
        it is right and that is above 1.
    """
    if source.backend() != "metal":
        return []
    found: list[dict[str, Any]] = []
    for dtype, head_dim in itertools.product(dtypes, head_dims):
        spec = check_prefill.PrefillVariant(DTYPES[dtype], head_dim, head_dim, head_dim, False)
        verdict = check_prefill.check(spec)
        found.append(
            {
                "kernel": spec.name,
                "passed": verdict.passed,
                "max_error": verdict.error,
                "reason": verdict.reason,
                "speedup": verdict.speedup,
                "serves": verdict.passed and (verdict.speedup or 0) > 1,
            }
        )
    return found


def _machine() -> dict[str, str]:
    found = trust.machine() if source.is_available() else {}
    return {
        **found,
        "processor": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("mlx-sink", "mlx", "mlx-lm")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def as_text(found: dict[str, Any]) -> str:
    """Write what `examine` found for people."""
    lines = [f"{name:>12}  {value}" for name, value in found["machine"].items()]
    if found["backend"] == "cuda":
        lines.append("the kernels run through CUDA, for which their text has only been compiled")
    if not found["backend"]:
        lines.append(
            "no Metal on this machine, and no CUDA: the plain operations serve, and are timed here"
        )
    ring = found["ring"]
    lines.append(
        f"one decode step of one layer, {ring['num_sinks']} sinks + window {ring['window']}, "
        f"{ring['n_kv_heads']} kv heads, in microseconds"
    )
    lines.append(
        f"{'kernel':<44} {'verdict':<8} {'error':>8} {'kernel':>9} {'ops':>9} {'MLX sdpa':>9}"
    )
    for row in found["kernels"]:
        verdict = {True: "right", False: "WRONG", None: "-"}[row["passed"]]
        error = "-" if row["max_error"] is None else f"{row['max_error']:.1e}"
        kernel = "-" if row["kernel_us"] is None else f"{row['kernel_us']:.1f}"
        lines.append(
            f"{row['kernel']:<44} {verdict:<8} {error:>8} {kernel:>9} "
            f"{row['ops_us']:>9.1f} {row['sdpa_us']:>9.1f}"
        )
        if row["passed"] is False:
            lines.append(f"    {row['reason']}")
    lines += _prefill_lines(found["prefill"])
    if found["kept"]:
        wrong = [row for row in found["kept"] if not row["passed"]]
        lines.append(f"verdicts kept from use: {len(found['kept'])}, {len(wrong)} of them WRONG")
        lines += [f"{row['kernel']}\n    {row['reason']}" for row in wrong]
    return "\n".join(lines) + "\n"


def _prefill_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    chunk, window = check_prefill.TIMED_CHUNK, check_prefill.TIMED_RING.window
    lines = [f"reading {chunk} tokens in one layer, window {window}, against the plain operations"]
    lines.append(f"{'kernel':<44} {'verdict':<8} {'error':>8} {'speed':>9}")
    for row in rows:
        verdict = "right" if row["passed"] else "WRONG"
        error = "-" if row["max_error"] is None else f"{row['max_error']:.1e}"
        speed = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        said = "serves" if row["serves"] else row["reason"] or "the plain operations serve"
        lines.append(f"{row['kernel']:<44} {verdict:<8} {error:>8} {speed:>9}  {said}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 if a kernel is wrong on this machine."""
    p = cli.Parser(prog=PROG, description=DESCRIPTION)
    cli.add_sink_options(p)
    cli.add_kv_options(p)
    available = source.is_available()
    common = {"dtype": ("float16", "bfloat16"), "head_dim": HEAD_DIMS, "group": GROUPS}
    p.set_defaults(**(common if available else FEW))
    p.add_argument("--dtype", nargs="+", choices=DTYPES)
    p.add_argument("--head-dim", nargs="+", type=_positive)
    p.add_argument("--group", nargs="+", type=_positive, help="query heads for each kv head")
    p.add_argument(
        "--queries",
        nargs="+",
        type=_positive,
        default=[1, 4] if available else [1],
        help="new tokens of a step, at most 8",
    )
    p.add_argument("--rounds", type=_positive, default=10, help="rounds of each timing (10)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = p.parse_args(arguments)
    if any(dim % 16 for dim in args.head_dim):
        raise ConfigError(f"--head-dim must be multiples of 16, got {args.head_dim}")
    if max(args.group) > 16:
        raise ConfigError(f"--group must be at most 16, got {max(args.group)}")
    if max(args.queries) > MAX_QUERIES:
        most = MAX_QUERIES
        raise ConfigError(f"--queries must be at most {most}, got {max(args.queries)}")
    config = SinkConfig.for_context(None, args.num_sinks, args.window)
    config = replace(config, **cli.kv_settings(args))
    size = config.kv_group_size if config.bits[0] else 1
    head_dims = [dim for dim in args.head_dim if dim % size == 0]
    if not head_dims:
        raise ConfigError(f"--kv-group-size {size} divides none of --head-dim {args.head_dim}")
    kinds = (args.dtype, head_dims, args.group)
    found = examine(*kinds, config, args.rounds, args.queries)
    terminal.write(json.dumps(found, indent=1) + "\n" if args.json else as_text(found))
    rows = [*found["kernels"], *found["prefill"]]
    return int(any(row["passed"] is False for row in rows))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
