"""What a comparison found, as it is written to JSON and read back.

The keys in the JSON are older than the names here: ``arms`` are the methods, ``recall`` is what
the needle tests gave. Results of earlier versions are read, and earlier versions read these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

from mlx_sink.config import SinkConfig
from mlx_sink.errors import InputError
from mlx_sink.io import records
from mlx_sink.measure.comparison.methods import NAMES
from mlx_sink.measure.machine import Machine

VERSION_KEY = "mlx_sink_compare"
VERSION = 1
"""Of the results: goes up when an older version cannot show newer results."""

NEEDLE, LINES = "needle", "lines"
"""The two needle tests: a line hidden in a text, and a text of such lines alone."""

LARGEST_LOSS = 700.0
"""Nats: the perplexity of more is no float."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured of one method at one length of the text.

    Attributes:
        length: Tokens.
        ms: Median time of a decoded token in ms.
        ms_low: The first quartile.
        ms_high: The third quartile.
        prefill_tokens_per_s: Speed of reading since the length before.
        cache_bytes: Bytes that the caches hold.
        peak_bytes: Weights, caches, and the most that reading took on top.
        count: Tokens whose loss counts.
        loss: Their mean loss in nats.
        perplexity: ``exp(loss)``.
        since: The token from which on they count: the length before.
        low: Lower end of the 95% interval of the loss.
        high: Its upper end.
    """

    length: int
    ms: float
    ms_low: float
    ms_high: float
    prefill_tokens_per_s: float
    cache_bytes: int
    peak_bytes: int
    count: int
    loss: float
    perplexity: float
    since: int = field(metadata={"key": "from"})
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class MethodResult:
    """What was measured of one method.

    Attributes:
        tokens: Tokens that it has read.
        stopped: Why it went no further, or ``None``.
        at: The measurements, by ascending length.
    """

    tokens: int
    stopped: str | None
    at: tuple[Measurement, ...]


@dataclass(frozen=True, slots=True)
class BesideRecompute:
    """A method and recomputing on the same sampled tokens, all past the first eviction.

    Attributes:
        count: Tokens.
        perplexity: Of the method.
        recompute: Perplexity of recomputing.
        difference: Mean loss of the method minus that of recomputing, in nats.
        low: Lower end of its 95% interval.
        high: Its upper end.
    """

    count: int
    perplexity: float
    recompute: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Score:
    """How many questions of one needle test a method answered right.

    Attributes:
        test: `NEEDLE` or `LINES`.
        place: Where the fact lies, in words.
        distance: Tokens between the fact and the answer.
        method: A name of `methods.NAMES`.
        right: Right answers.
        trials: Questions.
    """

    test: str
    place: str
    distance: int
    method: str = field(metadata={"key": "arm"})
    right: int
    trials: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model: its name, the tokens it was trained on if known, the bytes of its weights."""

    name: str
    context: int | None
    weights: int


@dataclass(frozen=True, slots=True)
class TextInfo:
    """The text: its name, and its length in tokens."""

    name: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Results:
    """A comparison, finished or not.

    Attributes:
        command: The command line.
        date: When it began, ISO 8601.
        machine: What it ran on.
        model: The model.
        text: What was read.
        config: Sinks and window of the methods that have them.
        lengths: Tokens at which everything is measured, ascending.
        trials: Questions for each place and method.
        choices: Answers to choose from.
        finished: It ran to its end.
        methods: By name; also those that the model cannot have.
        beside_recompute: By name of the method.
        scores: Of the needle tests.
    """

    command: str
    date: str
    machine: Machine
    model: ModelInfo
    text: TextInfo
    config: SinkConfig
    lengths: tuple[int, ...]
    trials: int
    choices: int
    finished: bool
    methods: Mapping[str, MethodResult] = field(metadata={"key": "arms"})
    beside_recompute: Mapping[str, BesideRecompute]
    scores: tuple[Score, ...] = field(metadata={"key": "recall"})

    def to_dict(self) -> dict[str, Any]:
        """Return the results as a JSON-ready dictionary."""
        values: dict[str, Any] = {VERSION_KEY: VERSION, **records.to_dict(self)}
        values["config"]["capacity"] = self.config.capacity
        return values

    @classmethod
    def from_dict(cls, values: object) -> Results:
        """Return the results that JSON from outside holds.

        Raises:
            InputError: It holds none, they are of another version, or they cannot be shown.
        """
        version = None
        if isinstance(values, dict):
            version = cast("dict[str, object]", values).get(VERSION_KEY)
        if version is None:
            raise InputError("it holds no results of a comparison")
        if version != VERSION or version is True:
            raise InputError(f"it is of version {version!r}: this one reads {VERSION}")
        results = records.from_dict(cls, values)
        results._check()
        return results

    def _check(self) -> None:
        """Raise unless everything can be drawn."""
        if not self.lengths or any(b <= a for a, b in pairwise((0, *self.lengths))):
            raise InputError(f"lengths must ascend, got {list(self.lengths)}")
        if self.choices < 1:
            raise InputError(f"choices must be at least 1, got {self.choices}")
        names = {*self.methods, *self.beside_recompute, *(score.method for score in self.scores)}
        unknown = sorted(names - NAMES.keys())
        if unknown:
            raise InputError(f"unknown method {unknown[0]!r}: expected one of {list(NAMES)}")
        for name, method in self.methods.items():
            for i, measurement in enumerate(method.at):
                _check_measurement(measurement, f"arms.{name}.at[{i}]")
        for i, score in enumerate(self.scores):
            if score.test not in (NEEDLE, LINES):
                raise InputError(f"recall[{i}].test must be {NEEDLE!r} or {LINES!r}")
            if score.trials < 1:
                raise InputError(f"recall[{i}].trials must be at least 1, got {score.trials}")
            if not 0 <= score.right <= score.trials:
                raise InputError(
                    f"recall[{i}].right must be 0 to {score.trials}, got {score.right}"
                )


def _check_measurement(measurement: Measurement, place: str) -> None:
    for key, value in records.to_dict(measurement).items():
        if value < 0:
            raise InputError(f"{place}.{key} must be at least 0, got {value}")
    for key in ("loss", "low", "high"):
        value = getattr(measurement, key)
        if value > LARGEST_LOSS:
            raise InputError(f"{place}.{key} must be at most {LARGEST_LOSS}, got {value}")
