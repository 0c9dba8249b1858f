"""Count the multiply-adds of a step of a model and the bytes it reads, without computing it.

`mx.export_function` lists every operation of MLX's graph with the shapes of its inputs and
outputs. So no names of a model's parts are needed: the multiply-adds for each further key that a
token sees are the slope of the count over the number of keys.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx import utils

from mlx_sink.errors import UnsupportedModelError
from mlx_sink.models.layers import native_caches
from mlx_sink.models.lazy import parameters, set_parameters

VIEWS = frozenset(
    {
        "AsType",
        "Broadcast",
        "ExpandDims",
        "Flatten",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unflatten",
        "View",
    }
)
"""Operations that pass a parameter on without reading it."""

FAR = 4
"""Multiples of the longest window at which only layers with full attention still see more keys."""


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a model.

    Attributes:
        multiply_adds: Of the products of activations and weights or keys, but not of quantised
            weights and of experts, which do not depend on the keys.
        read: Bytes of the parameters that are read; of experts and of embeddings the part that
            is chosen.
    """

    multiply_adds: int
    read: int


@dataclass(frozen=True, slots=True)
class PerKey:
    """Multiply-adds of attention for one query and one key, summed over the layers of a kind.

    Attributes:
        decode: When tokens come one at a time.
        prefill: When they come in chunks; latent attention then multiplies other matrices.
    """

    decode: int
    prefill: int


def step_of(model: nn.Module, caches: Sequence[Any], n: int) -> Step:
    """Count a call with n new tokens of one sequence.

    Args:
        model: The model; its parameters are not computed.
        caches: mlx-lm's own, as `after` leaves them; they are changed.
        n: Tokens of the call.

    Raises:
        UnsupportedModelError: MLX cannot export an operation of the model.
    """
    named = parameters(model)
    counter = _Counter([a.nbytes for _, a in named])

    def call(tokens: mx.array, *weights: mx.array) -> mx.array:
        paths = (path for path, _ in named)
        set_parameters(model, list(zip(paths, weights, strict=True)))
        return model(tokens, cache=list(caches))

    tokens = mx.zeros((1, n), mx.int32)
    try:
        with _plain_graph():
            mx.export_function(counter.note, call, tokens, *(a for _, a in named))
    except ValueError as error:
        raise UnsupportedModelError(f"its work cannot be counted: {error}") from None
    finally:
        set_parameters(model, named)
    return Step(counter.multiply_adds, sum(counter.read.values()))


def after(model: nn.Module, tokens: int) -> list[Any]:
    """Return mlx-lm's own caches as they are after so many tokens, with nothing computed."""
    caches = copy.deepcopy(native_caches(model))
    with _plain_graph():
        model(mx.zeros((1, tokens), mx.int32), cache=caches)
    for cache in _parts(caches):
        cache.state = utils.tree_map(_blank, cache.state)
    return caches


def per_key(model: nn.Module, windows: Sequence[int]) -> dict[int | None, PerKey]:
    """Count the multiply-adds of attention for one more key, by kind of layer.

    Args:
        model: The model.
        windows: Lengths of the sliding windows that its layers have of their own.

    Returns:
        For each window, and for ``None``: the layers with full attention.
    """
    ends = sorted(set(windows))
    segments = [(1, 2), *((end + 4, end + 5) for end in ends[:-1])]
    if ends:
        segments.append((FAR * ends[-1], 2 * FAR * ends[-1]))
    slopes: list[tuple[int, int]] = []
    for low, high in segments:
        one, two, three = (_slope(model, n, low, high) for n in (1, 2, 3))
        # Work that is done once for a chunk and a key is in both counts.
        slopes.append((one, three - two))
    kinds: list[int | None] = [*ends, None]
    beyond = [*slopes[1:], (0, 0)]
    return {
        kind: PerKey(here[0] - then[0], here[1] - then[1])
        for kind, here, then in zip(kinds, slopes, beyond, strict=True)
    }


def _slope(model: nn.Module, n: int, low: int, high: int) -> int:
    counts = [step_of(model, after(model, at), n).multiply_adds for at in (low, high)]
    return (counts[1] - counts[0]) // (high - low)


class _Counter:
    """Sum the multiply-adds and the bytes read of the operations of a graph.

    Args:
        sizes: Bytes of the parameters, which are the inputs of the graph but for the first.
    """

    def __init__(self, sizes: Sequence[int]):
        self.multiply_adds = 0
        self.read: dict[int, int] = {}
        self._sizes = sizes
        self._parameter: dict[str, int] = {}

    def note(self, entry: dict[str, Any]) -> None:
        if entry["type"] == "inputs":
            names = [name for name, *_ in entry["inputs"]]
            self._parameter = {name: i for i, name in enumerate(names[1:])}
        elif entry["type"] == "primitive":
            self._primitive(entry["name"], entry["inputs"], entry["outputs"])

    def _primitive(self, name: str, inputs: list[Any], outputs: list[Any]) -> None:
        if name in ("Matmul", "AddMM"):
            self.multiply_adds += math.prod(outputs[0][1]) * inputs[0][1][-1]
        elif name == "ScaledDotProductAttention":
            (_, q, _), (_, k, _), (_, v, _) = inputs[:3]
            self.multiply_adds += math.prod(q[:3]) * k[2] * (q[3] + v[3])
        for place, (array, shape, _) in enumerate(inputs):
            i = self._parameter.get(array)
            if i is None:
                continue
            if name in VIEWS:
                self._parameter |= {output[0]: i for output in outputs}
                continue
            share = 1.0
            if name == "Gather" and place == 0:
                share = math.prod(outputs[0][1]) / max(1, math.prod(shape))
            elif name in ("GatherMM", "GatherQMM"):
                share = math.prod(inputs[-1][1]) / shape[0]
            read = round(min(1.0, share) * self._sizes[i])
            self.read[i] = max(self.read.get(i, 0), read)


@contextmanager
def _plain_graph() -> Generator[None]:
    """Keep the graph to MLX's own operations: no compiled functions, no GPU kernels."""
    device = mx.default_device()
    mx.disable_compile()
    mx.set_default_device(mx.Device(mx.DeviceType.cpu, 0))
    try:
        yield
    finally:
        mx.set_default_device(device)
        mx.enable_compile()


def _parts(caches: Sequence[Any]) -> list[Any]:
    return [part for cache in caches for part in getattr(cache, "caches", [cache])]


def _blank(value: Any) -> Any:
    return mx.zeros(value.shape, value.dtype) if isinstance(value, mx.array) else value
