"""Measure which ``num_sinks`` and ``window`` a model wants, on a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from mlx_sink.config import SinkConfig
from mlx_sink.errors import InputError
from mlx_sink.io import terminal
from mlx_sink.measure.losses import chunk_losses, cut
from mlx_sink.measure.sink_share import SinkShare, sink_share
from mlx_sink.models.attach import attach, detach, make_cache
from mlx_sink.models.checkpoints.settings import Settings
from mlx_sink.models.vocabulary import vocabulary
from mlx_sink.stream.text.encode import Encoder, Piece
from mlx_sink.stream.text.tokens import token_ids

SINKS = (0, 1, 2, 4, 8)
WINDOWS = 5
"""Sizes of the window that are tried, each half of the next."""
TOLERANCE = 0.01
"""Loss in nats, 1 % of perplexity, that counts as none."""
NEIGHBOURS = 16
"""Neighbouring tokens whose losses count as one when their spread is estimated."""
SIGNIFICANT = 3
"""Standard errors: one of five candidates is the best by chance too."""
CHUNK = 256
MIN_TOKENS, MAX_TOKENS = 128, 16_384
SHARE_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Candidate:
    """One pair of settings, measured.

    Attributes:
        num_sinks: As in `SinkConfig`.
        window: As in `SinkConfig`.
        loss: Mean loss in nats, over the same tokens for all candidates of a table.
        over_best: How much that is above the best candidate of the table.
        error: Standard error of `over_best`, from the means of 16 neighbouring tokens each.
        cache_bytes: Bytes of a full cache for one sequence.
    """

    num_sinks: int
    window: int
    loss: float
    over_best: float
    error: float
    cache_bytes: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured, and what it recommends.

    Attributes:
        tokens: Tokens of the text that were read.
        sinks: Candidates of one capacity that differ in their sinks.
        sinks_from: The first token whose loss counts for them: all have evicted some by then.
        windows: Candidates that differ in their window.
        windows_from: The first token whose loss counts for these.
        share: Attention on the first tokens.
        settings: What is recommended.
        sinks_matter: Without sinks the loss is higher, by more than `TOLERANCE` and by more than
            three standard errors.
        is_levelled: The loss had stopped falling within the windows that were tried. Where it had
            not and the text was too short for larger ones, the default window is recommended if
            that is larger.
    """

    tokens: int
    sinks: tuple[Candidate, ...]
    sinks_from: int
    windows: tuple[Candidate, ...]
    windows_from: int
    share: SinkShare
    settings: Settings
    sinks_matter: bool
    is_levelled: bool

    @property
    def verdict(self) -> str:
        """The result in a few sentences."""
        without, best = self.sinks[0], min(self.sinks, key=lambda candidate: candidate.loss)
        s = self.settings
        if self.sinks_matter:
            ratio = math.exp(without.loss - best.loss)
            lines = [
                f"Sinks matter for this model: without them its perplexity is {ratio:.2f} times "
                f"as high ({without.over_best:.3f} ± {without.error:.3f} nats)."
            ]
        else:
            lines = [
                "Sinks are not shown to matter for this model on this text: without them its loss "
                f"is {without.over_best:.3f} ± {without.error:.3f} nats above the best."
            ]
        lines.append(f"Recommended: num_sinks {s.num_sinks}, window {s.window}.")
        if not self.is_levelled:
            lines.append(
                "The loss still falls at the largest window tried; a longer text can try more."
            )
        return " ".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return it as a JSON-ready dictionary."""
        share = self.share
        return {
            "tokens": self.tokens,
            "recommended": asdict(self.settings),
            "sinks_matter": self.sinks_matter,
            "is_levelled": self.is_levelled,
            "sinks": [asdict(candidate) for candidate in self.sinks],
            "sinks_from": self.sinks_from,
            "windows": [asdict(candidate) for candidate in self.windows],
            "windows_from": self.windows_from,
            "share": {
                "tokens": share.tokens,
                "since": share.since,
                "layers": list(share.layers),
                "on_first_token": share.of_layer(1),
                "on_first_4": share.of_layer(4),
                "uniform_4": share.uniform(4),
            },
        }


def calibrate(
    model: nn.Module, tokenizer: Any, text: str, *, context: int | None = None
) -> Calibration:
    """Measure a model on a text: attention on the first tokens, and loss by sinks and by window.

    Every candidate streams the same tokens, and the losses of those past every candidate's first
    eviction are compared. ``num_sinks`` is the smallest number, and ``window`` the smallest size,
    whose loss is within 1 % of perplexity of the best one.

    Args:
        model: A model from mlx-lm. What it was attached with is taken back.
        tokenizer: Its tokenizer.
        text: At least 128 tokens; of more than 16,384 the first are taken.
        context: Positions the model was trained on, in tokens, or ``None`` if unknown.

    Raises:
        InputError: The text is too short, or has tokens that the model does not.
        UnsupportedModelError: The contract cannot be kept for this model.
    """
    tokens = token_ids(read(tokenizer, text), vocabulary(model), tokenizer)
    n = len(tokens)
    reach = min(context or n, n)
    capacity, largest = _power_of_two(min(reach, n // 4)), _power_of_two(min(reach, 2 * n // 3))
    tried = [s for s in SINKS if 2 * s < capacity]
    sizes = [largest >> i for i in reversed(range(WINDOWS)) if largest >> i > 2 * max(tried)]
    total = (len(tried) + len(sizes)) * (n - 1)
    try:
        with terminal.bar(total, "calibrating", "tok") as bar:

            def measured(configs: Sequence[SinkConfig], since: int) -> tuple[Candidate, ...]:
                return _candidates(model, tokens, configs, since, bar)

            share = sink_share(model, tokens[: min(reach, SHARE_TOKENS)])
            sinks = measured([SinkConfig(s, capacity - s) for s in tried], capacity)
            num_sinks = _smallest(sinks).num_sinks
            windows = measured([SinkConfig(num_sinks, c - num_sinks) for c in sizes], largest)
    finally:
        detach(model)
    chosen = _smallest(windows)
    could_be_larger = context is None or context >= 2 * largest
    is_levelled = chosen is not windows[-1] or not could_be_larger
    window = chosen.window
    if not is_levelled:
        window = max(window, SinkConfig.for_context(context, num_sinks).window)
    without = sinks[0]
    matter = without.over_best > max(TOLERANCE, SIGNIFICANT * without.error)
    settings = Settings(num_sinks, window)
    return Calibration(n, sinks, capacity, windows, largest, share, settings, matter, is_levelled)


def read(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that are measured: at most the first 16,384.

    Control tokens that stand in it are text: it comes from a file.

    Raises:
        InputError: There are fewer than 128.
    """
    tokens = Encoder(tokenizer).encode(Piece(text), first=True)[:MAX_TOKENS]
    if len(tokens) < MIN_TOKENS:
        raise InputError(
            f"calibration needs a text of at least {MIN_TOKENS} tokens, got {len(tokens)}"
        )
    return tokens


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


def _smallest(candidates: Sequence[Candidate]) -> Candidate:
    """Return the first candidate, in rising order of size, that is as good as the best."""
    return next(candidate for candidate in candidates if candidate.over_best <= TOLERANCE)


def _candidates(
    model: nn.Module,
    tokens: list[int],
    configs: Sequence[SinkConfig],
    since: int,
    bar: tqdm[Any],
) -> tuple[Candidate, ...]:
    """Stream the tokens with each configuration, and compare the losses of those from since on."""
    sizes: list[int] = []
    losses: list[np.ndarray] = []
    for config in configs:
        sizes.append(attach(model, config).nbytes)
        losses.append(_losses(model, tokens, bar)[since:])
    best = min(losses, key=lambda loss: float(loss.mean()))
    return tuple(
        Candidate(
            num_sinks=config.num_sinks,
            window=config.window,
            loss=float(loss.mean()),
            over_best=float((loss - best).mean()),
            error=_error(loss - best),
            cache_bytes=nbytes,
        )
        for config, nbytes, loss in zip(configs, sizes, losses, strict=True)
    )


def _error(difference: np.ndarray) -> float:
    """Return the standard error of a mean over a text, whose neighbouring tokens correlate."""
    parts = np.array_split(difference, len(difference) // NEIGHBOURS)
    means = np.array([part.mean() for part in parts])
    return float(means.std(ddof=1) / math.sqrt(len(means)))


def _losses(model: nn.Module, tokens: list[int], bar: tqdm[Any]) -> np.ndarray:
    """Return the loss of every next token of a stream in nats, float64 ``[n - 1]``."""
    inputs, targets = cut(tokens, None)
    parts: list[np.ndarray] = []
    for _, losses in chunk_losses(model, make_cache(model), inputs, targets, CHUNK):
        parts.append(losses[0].astype(np.float64))
        bar.update(losses.size)
    return np.concatenate(parts)
