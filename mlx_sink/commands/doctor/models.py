"""Check and time the kernels on the attention shapes of ten well-known models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlx_sink.attention.kernels import check_decode, check_prefill, source
from mlx_sink.attention.kernels.check_decode import DecodeVariant
from mlx_sink.attention.kernels.check_prefill import PrefillVariant
from mlx_sink.commands.doctor.examine import DTYPES, TimedKernel, runs
from mlx_sink.config import SinkConfig
from mlx_sink.io import terminal
from mlx_sink.measure.attention_times import decode_times, prefill_times

WINDOWS = (1020, 4092)
"""With the usual 4 sinks, 1,024 and 4,096 keys."""
CHUNK = 512
"""Tokens of a prefill chunk on a GPU."""
CPU_CHUNK = 32


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The attention of one layer of a model.

    Attributes:
        model: The Hugging Face repository whose config.json has these numbers.
        n_heads: Query heads (``num_attention_heads``).
        n_kv_heads: Heads of keys and values (``num_key_value_heads``).
        head_dim: Of queries, keys and values.
        learned_sinks: The softmax has a learned sink for each head.
    """

    model: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    learned_sinks: bool = False


SHAPES = (
    AttentionShape("HuggingFaceTB/SmolLM2-135M-Instruct", 9, 3, 64),
    AttentionShape("Qwen/Qwen2.5-0.5B-Instruct", 14, 2, 64),
    AttentionShape("meta-llama/Llama-3.2-1B-Instruct", 32, 8, 64),
    AttentionShape("openai/gpt-oss-20b", 64, 8, 64, learned_sinks=True),
    AttentionShape("microsoft/Phi-3-mini-4k-instruct", 32, 32, 96),
    AttentionShape("Qwen/Qwen2.5-7B-Instruct", 28, 4, 128),
    AttentionShape("meta-llama/Llama-3.1-8B-Instruct", 32, 8, 128),
    AttentionShape("Qwen/Qwen3-30B-A3B", 32, 4, 128),
    AttentionShape("meta-llama/Llama-3.3-70B-Instruct", 64, 8, 128),
    AttentionShape("google/gemma-3-4b-it", 8, 4, 256),
)


@dataclass(frozen=True, slots=True)
class Conditions:
    """How the shapes are timed.

    Attributes:
        dtype: Of queries, keys and values, as in `DTYPES`.
        chunk: Tokens of the prefill chunk.
        rounds: Rounds of each timing.
    """

    dtype: str
    chunk: int
    rounds: int

    @classmethod
    def of_this_machine(cls, rounds: int) -> Conditions:
        """Return what suits this machine: a CPU is slow, and slower still with 16 bits."""
        if source.is_available():
            return cls("bfloat16", CHUNK, rounds)
        return cls("float32", CPU_CHUNK, rounds=1)

    def to_dict(self) -> dict[str, Any]:
        """Return the conditions as a JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ShapeResult:
    """A decode step and a prefill chunk of one shape on one ring, both timed."""

    shape: AttentionShape
    config: SinkConfig
    decode: TimedKernel
    prefill: TimedKernel

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a JSON-ready dictionary."""
        return {
            **asdict(self.shape),
            "num_sinks": self.config.num_sinks,
            "window": self.config.window,
            "decode": self.decode.to_dict(),
            "prefill": self.prefill.to_dict(),
        }


def time_shapes(
    conditions: Conditions,
    shapes: Sequence[AttentionShape] | None = None,
    windows: Sequence[int] | None = None,
) -> list[ShapeResult]:
    """Check and time shapes on rings of several windows.

    Args:
        conditions: How to time.
        shapes: Which shapes; `SHAPES` if None.
        windows: Windows of the rings, in tokens; `WINDOWS` if None.
    """
    shapes, windows = shapes or SHAPES, windows or WINDOWS
    results: list[ShapeResult] = []
    with terminal.bar(len(shapes) * len(windows), "timing models", "ring") as bar:
        for shape in shapes:
            for window in windows:
                results.append(_time_shape(shape, SinkConfig(window=window), conditions))
                bar.update()
    return results


def _time_shape(shape: AttentionShape, config: SinkConfig, c: Conditions) -> ShapeResult:
    D, group = shape.head_dim, shape.n_heads // shape.n_kv_heads
    dtype = DTYPES[c.dtype]
    step = DecodeVariant(dtype, group, D, D, 1, D, False, learned_sinks=shape.learned_sinks)
    verdict = check_decode.check(step) if source.is_available() else None
    times = decode_times(step, shape.n_kv_heads, config, rounds=c.rounds, kernel=runs(verdict))
    decode = TimedKernel(step.name, verdict, times)
    chunk = PrefillVariant(dtype, D, D, D, False, learned_sinks=shape.learned_sinks)
    verdict = check_prefill.check(chunk) if source.backend() == "metal" else None
    times = prefill_times(
        chunk,
        shape.n_heads,
        shape.n_kv_heads,
        config,
        chunk=c.chunk,
        rounds=c.rounds,
        kernel=runs(verdict),
    )
    return ShapeResult(shape, config, decode, TimedKernel(chunk.name, verdict, times))
