"""An estimate of what a model costs, with no weight read; and what fits on which Mac."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_sink.config import BITS
from mlx_sink.errors import ConfigError, ModelError, SinkError, one_line
from mlx_sink.io import records
from mlx_sink.measure import budget
from mlx_sink.measure.costs import Costs, costs_of
from mlx_sink.models import lazy
from mlx_sink.models.checkpoints import settings
from mlx_sink.models.checkpoints.checkpoint import trained_context
from mlx_sink.models.report import Report

LENGTHS = (4 << 10, 32 << 10, 128 << 10, 1 << 20, 10 << 20)
"""Tokens of a stream."""

MEMORIES = (8, 16, 24, 32, 64, 128, 192)
"""Memory of Macs, in units of 2^30 bytes."""

Series = Mapping[str, tuple[int | None, ...]]
"""Values over the lengths, by the kind of cache; ``None`` where a value is not known."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters of a model.

    Attributes:
        nbytes: Bytes of all of them.
        read_by_a_token: Bytes of those that a token reads: of experts, those that are chosen.
    """

    nbytes: int = field(metadata={"key": "bytes"})
    read_by_a_token: int


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits on a Mac.

    Attributes:
        memory_gib: Its memory, in units of 2^30 bytes.
        beside_weights: Bytes that the weights leave free of its working set.
        full_tokens: Tokens of the longest stream of full attention; ``None`` for any length.
        streams: Streams of sinks and window; ``None`` if such a stream takes no bytes.
        window: The window that ``--memory`` would take; ``None`` if not even one token fits.
    """

    memory_gib: int
    beside_weights: int
    full_tokens: int | None
    streams: int | None
    window: int | None


@dataclass(frozen=True, slots=True)
class Chip:
    """An Apple chip.

    Attributes:
        name: As Apple calls it.
        gb_per_s: Bandwidth of its memory, in 1e9 bytes a second.
        source: The page that says so.
    """

    name: str
    gb_per_s: float
    source: str


@dataclass(frozen=True, slots=True)
class SpeedLimit:
    """Tokens per second that a chip cannot exceed: its bandwidth over what a token reads.

    Attributes:
        chip: The chip.
        full: At each length, of full attention.
        sinks: At each length, of sinks and window.
    """

    chip: Chip
    full: tuple[float, ...]
    sinks: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the limit as a JSON-ready dictionary."""
        chip = self.chip
        facts = {"chip": chip.name, "gb_per_s": chip.gb_per_s, "source": chip.source}
        return {**facts, "full": list(self.full), "sinks": list(self.sinks)}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a model costs. Bytes and multiply-adds are those of one sequence.

    Attributes:
        model: The name that it was asked for by.
        dtype: Of the weights that are not quantised.
        dtype_assumed: Neither an argument, the configuration nor a file says the dtype.
        notes: What could not be counted, in words.
        context: Positions it was trained on, in tokens, or ``None`` if unknown.
        weights: Its parameters.
        report: What each layer gets for sinks and window.
        bytes_per_token: Bytes that a token adds to a cache of full attention.
        lengths: Tokens of the streams; all values over lengths are in this order.
        cache_bytes: Bytes of the cache: ``full``, ``window``, ``sinks``, ``sinks_8bit`` and
            ``sinks_4bit``.
        decode_multiply_adds: Of attention for the token at a length: ``full`` and ``sinks``.
        prefill_multiply_adds: Of attention for a prompt of a length: ``full`` and ``sinks``.
        fits: What fits on Macs, by their memory.
        chips: The limits of their chips.
    """

    model: str
    dtype: str
    dtype_assumed: bool
    notes: tuple[str, ...]
    context: int | None
    weights: Weights
    report: Report
    bytes_per_token: int
    lengths: tuple[int, ...]
    cache_bytes: Series
    decode_multiply_adds: Series
    prefill_multiply_adds: Series
    fits: tuple[Fit, ...]
    chips: tuple[SpeedLimit, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as a JSON-ready dictionary."""
        return records.to_dict(self)


def estimate(
    name: str,
    *,
    num_sinks: int | None = None,
    window: int | None = None,
    dtype: str | None = None,
    lengths: Sequence[int] = LENGTHS,
) -> Estimate:
    """Estimate what a model costs, from its configuration, and from its files where they are.

    Args:
        name: As in `lazy.unread`.
        num_sinks: As in `SinkConfig`.
        window: As in `SinkConfig`.
        dtype: Of the weights, if not that of the configuration.
        lengths: Tokens of the streams.

    Raises:
        ModelError, UnsupportedModelError: From `lazy`.
        ConfigError: The window is larger than the trained context.
    """
    unread = lazy.unread(name, dtype)
    model, fields = unread.model, unread.config
    context = trained_context(getattr(model, "args", None)) or trained_context(fields)
    config, _ = settings.apply(settings.Settings.of(fields), context, num_sinks, window)
    try:
        costs = costs_of(model, config)
    except SinkError:
        raise
    except Exception as error:
        # Sizes that no model has make MLX and mlx-lm raise all kinds.
        raise ModelError(f"{name!r} cannot be planned: {one_line(error)}") from None
    capacity = config.capacity
    return Estimate(
        model=name,
        dtype=unread.dtype,
        dtype_assumed=unread.assumed,
        notes=unread.notes + _notes(costs),
        context=context,
        weights=Weights(costs.weights, costs.read),
        report=costs.report,
        bytes_per_token=sum(layer.bytes_per_token for layer in costs.rings),
        lengths=tuple(lengths),
        cache_bytes={
            "full": tuple(costs.full_bytes(n) for n in lengths),
            "window": tuple(costs.bounded_bytes(n, config.window) for n in lengths),
            "sinks": tuple(costs.bounded_bytes(n, capacity) for n in lengths),
            **{f"sinks_{b}bit": tuple(costs.quantised_bytes(n, b) for n in lengths) for b in BITS},
        },
        decode_multiply_adds={
            "full": tuple(costs.decode_work(n) for n in lengths),
            "sinks": tuple(costs.decode_work(n, capacity) for n in lengths),
        },
        prefill_multiply_adds={
            "full": tuple(costs.prefill_work(n) for n in lengths),
            "sinks": tuple(costs.prefill_work(n, capacity) for n in lengths),
        },
        fits=tuple(_fit(model, costs, gib, context) for gib in MEMORIES),
        chips=tuple(_speed_limit(chip, costs, lengths) for chip in chips()),
    )


def _notes(costs: Costs) -> tuple[str, ...]:
    notes: list[str] = []
    if costs.per_key is None:
        notes.append("MLX cannot count this model's multiply-adds; all experts count as read")
    reasons = {reason for reason in costs.quantised.values() if isinstance(reason, str)}
    return *notes, *(f"no quantised rings: {reason}" for reason in sorted(reasons))


def working_set(gib: int) -> int:
    """Return the bytes that macOS recommends a program's GPU memory to stay within.

    By default that is two thirds of a Mac's memory, and three quarters from 36 GB on
    (``recommendedMaxWorkingSetSize`` of Metal).

    Args:
        gib: Memory of the Mac, in units of 2^30 bytes.
    """
    whole = gib << 30
    return whole * 3 // 4 if gib >= 36 else whole * 2 // 3


def _fit(model: nn.Module, costs: Costs, gib: int, context: int | None) -> Fit:
    room = working_set(gib) - costs.weights
    stream, config = costs.report.nbytes, costs.report.config
    window = None
    if costs.rings and room > 0:
        with suppress(ConfigError):  # Not even a window of one token fits.
            largest = budget.largest(model, working_set(gib), config, context=context)
            window = largest.config.window
    return Fit(
        memory_gib=gib,
        beside_weights=max(0, room),
        full_tokens=_longest(costs, room),
        streams=max(0, room // stream) if stream else None,
        window=window,
    )


def _longest(costs: Costs, room: int) -> int | None:
    """Return the longest stream of full attention, or ``None`` if there is no longest."""
    per_token = sum(layer.bytes_per_token for layer in costs.rings)
    if not per_token:
        return None if costs.full_bytes(1 << 40) <= room else 0
    # From here on only layers with full attention grow.
    settled = max((layer.slots for layer in costs.report.layers), default=0)
    rest = room - costs.full_bytes(settled)
    if rest >= 0:
        return settled + rest // per_token
    below = [n for n in range(settled) if costs.full_bytes(n) <= room]
    return max(below, default=0)


def chips() -> list[Chip]:
    """Return Apple's chips, with their bandwidth and where it is from."""
    data = json.loads(Path(__file__).with_name("chips.json").read_text(encoding="utf-8"))
    pages = data["pages"]
    return [Chip(chip["chip"], chip["gb_per_s"], pages[chip["source"]]) for chip in data["chips"]]


def _speed_limit(chip: Chip, costs: Costs, lengths: Sequence[int]) -> SpeedLimit:
    def limit(cache_bytes: int) -> float:
        return round(chip.gb_per_s * 1e9 / (costs.read + cache_bytes), 2)

    capacity = costs.report.config.capacity
    return SpeedLimit(
        chip,
        full=tuple(limit(costs.full_bytes(n)) for n in lengths),
        sinks=tuple(limit(costs.bounded_bytes(n, capacity)) for n in lengths),
    )
