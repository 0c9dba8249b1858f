"""A model's rotary embedding as a fixed rotation that a query can be turned by.

RoPE multiplies each pair of dimensions by a rotation whose angle is the position times the
pair's frequency. Rotations add up, so ``R(b) rope(x, a) = rope(x, a + b)``, whatever else the
embedding does to its input (a constant scale, as YaRN and longrope have it, passes through).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_sink.errors import UnsupportedModelError

Rope = Callable[..., mx.array]

RECENT = 8
"""Turns that are kept: those of a step, which all layers of a model ask for."""

AT_ONCE = 16
"""Matrices that are made at once."""


@dataclass(frozen=True, eq=False)
class RopeCall:
    """What a model asked of ``mx.fast.rope``, where every rotary embedding of mlx-lm ends.

    Attributes:
        width: Last dimension of the input.
        dims: Rotated dimensions, the first ones.
        traditional: Pairs are neighbours.
        base: Base of the geometric frequencies, or ``None`` where ``freqs`` says them.
        scale: Factor on the positions.
        freqs: Positions per radian of each pair, ``[dims / 2]``.
    """

    width: int
    dims: int
    traditional: bool
    base: float | None
    scale: float
    freqs: mx.array | None

    def __call__(self, x: mx.array, offset: int) -> mx.array:
        """Rotate ``[B, n_heads, L, width]`` as the model would at positions from ``offset``."""
        return mx.fast.rope(
            x,
            self.dims,
            traditional=self.traditional,
            base=self.base,
            scale=self.scale,
            offset=offset,
            freqs=self.freqs,
        )

    def frequencies(self) -> np.ndarray:
        """Return radians per position of each pair, ``[dims / 2]`` float64."""
        if self.freqs is None:
            powers = np.arange(0, self.dims, 2) / self.dims
            return self.scale * float(cast("float", self.base)) ** -powers
        with np.errstate(divide="ignore"):
            return self.scale / np.array(self.freqs.astype(mx.float32), np.float64)

    def is_like(self, other: RopeCall) -> bool:
        """Tell whether both rotate alike."""
        pairs = self.width, self.dims, self.traditional
        if pairs != (other.width, other.dims, other.traditional):
            return False
        return np.array_equal(self.frequencies(), other.frequencies())


class Rotation:
    """The rotation part of a rotary embedding.

    Args:
        frequencies: Radians per position of each pair, ``[dims / 2]``.
        interleaved: Pairs are ``(0, 1), (2, 3), ...`` (MLX's ``traditional``) rather than
            ``(0, dims / 2), (1, dims / 2 + 1), ...``.
        start: The first rotated dimension; not 0 where a head begins with a part that has no
            position (latent attention).

    Dimensions before ``start`` and from ``start + dims`` on are left alone (partial rotary).

    Attributes:
        is_identity: True for a layer without positions: no turn changes anything.
    """

    def __init__(
        self,
        frequencies: Sequence[float] | np.ndarray,
        interleaved: bool = False,
        start: int = 0,
    ):
        self.frequencies = np.asarray(frequencies, dtype=np.float64)
        self.interleaved = interleaved
        self.start = start
        self.is_identity = not self.frequencies.any()
        self._recent: dict[object, tuple[mx.array, ...]] = {}

    @property
    def dims(self) -> int:
        """Rotated dimensions."""
        return 2 * len(self.frequencies)

    def turn(self, x: mx.array, positions: Sequence[int], key: object) -> mx.array:
        """Rotate each row of x further by a number of positions.

        Args:
            x: ``[B, n_heads, L, head_dim]``, any float dtype.
            positions: How far to turn each of the L rows, or all of them if it is only one; may
                be negative.
            key: Stands for ``positions`` among the recent ones.

        Returns:
            ``[B, n_heads, L, head_dim]`` in x's dtype; worked out in float32.
        """
        exact, width = x.astype(mx.float32), x.shape[-1]
        if len(positions) == 1:
            # A decode step: one small product costs less than many smaller operations.
            (matrix,) = self._recall(key, lambda: (self.matrix(positions[0], width),))
            return (exact @ matrix).astype(x.dtype)
        cos, sin = self._recall(key, lambda: self._table(positions))
        stop = self.start + self.dims
        part = exact[..., self.start : stop] if self.dims < width else exact
        turned = part * cos + self._partner(part) * sin
        if self.dims < width:
            turned = mx.concatenate([exact[..., : self.start], turned, exact[..., stop:]], axis=-1)
        return turned.astype(x.dtype)

    def _partner(self, x: mx.array) -> mx.array:
        """Return x with the two dimensions of every pair exchanged."""
        if self.interleaved:
            pairs = mx.reshape(x, (*x.shape[:-1], -1, 2))
            return mx.reshape(pairs[..., ::-1], x.shape)
        half = self.dims // 2
        return mx.concatenate([x[..., half:], x[..., :half]], axis=-1)

    def _recall(
        self, key: object, make: Callable[[], tuple[mx.array, ...]]
    ) -> tuple[mx.array, ...]:
        """Return what was made for a key: all layers of a model ask for the same in a step."""
        arrays = self._recent.get(key)
        if arrays is None:
            arrays = make()
            if len(self._recent) >= RECENT:
                # Streams of one model may run in several threads.
                keys = list(self._recent)
                self._recent.pop(keys[0], None)
            self._recent[key] = arrays
        return arrays

    def _table(self, positions: Sequence[int]) -> tuple[mx.array, mx.array]:
        """Return cos and signed sin, ``[L, dims]`` in float32, worked out in float64."""
        angles = np.multiply.outer(np.asarray(positions, np.float64), self.frequencies)
        cos, sin = np.cos(angles), np.sin(angles)
        if self.interleaved:
            cos, sin = np.repeat(cos, 2, axis=-1), np.stack([-sin, sin], axis=-1)
            sin = sin.reshape(cos.shape)
        else:
            cos, sin = np.tile(cos, 2), np.concatenate([-sin, sin], axis=-1)
        return mx.array(cos.astype(np.float32)), mx.array(sin.astype(np.float32))

    def matrix(self, position: int, head_dim: int, scale: float = 1.0) -> mx.array:
        """Return the rotation by a number of positions as a matrix for rows.

        Args:
            position: How far.
            head_dim: Rows and columns.
            scale: Factor on all of it.

        Returns:
            ``[head_dim, head_dim]`` float32; angles are worked out in float64.
        """
        # From step to step it changes by one position: those of the next steps are made at once.
        first = position - position % AT_ONCE
        key = "matrices", first, head_dim, scale
        matrices = self._recall(key, lambda: self._matrices(first, head_dim, scale))
        return matrices[position - first]

    def _matrices(self, first: int, head_dim: int, scale: float) -> tuple[mx.array, ...]:
        """Return the matrices of some positions. Streams in several threads share them.

        Nothing of them is left to compute: two threads must not compute the same array.
        """
        n, start = len(self.frequencies), self.start
        angles = np.multiply.outer(np.arange(first, first + AT_ONCE), self.frequencies)
        cos, sin = scale * np.cos(angles), scale * np.sin(angles)
        pair = np.arange(n)
        a = start + (2 * pair if self.interleaved else pair)
        b = a + (1 if self.interleaved else n)
        matrices = np.zeros((AT_ONCE, head_dim, head_dim), np.float32)
        diagonal = np.arange(head_dim)
        matrices[:, diagonal, diagonal] = scale
        matrices[:, a, a] = matrices[:, b, b] = cos
        # The two rows and columns of a pair.
        matrices[:, a, b], matrices[:, b, a] = sin, -sin
        return tuple(mx.array(cast("Any", matrix)) for matrix in matrices)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotation:
        return self

    @classmethod
    def of(cls, call: RopeCall | None, width: int = 0) -> Rotation:
        """Return the rotation of a rotary embedding.

        Args:
            call: What the embedding asks for; ``None`` for a layer without positions.
            width: Last dimension of the keys, if more than what the embedding gets: the parts
                without a position then come first.
        """
        if call is None:
            return cls([])
        return cls(call.frequencies(), call.traditional, max(0, width - call.width))

    def check(self, rope: Rope, head_dim: int, farthest: int) -> None:
        """Hold the rotation against the embedding it was read from.

        Verifies ``R(b) rope(x, a) == rope(x, a + b)`` near and far.

        Args:
            rope: The embedding, called as ``rope(x, offset=a)``.
            head_dim: Last dimension of its input.
            farthest: The largest position that it will see.

        Raises:
            UnsupportedModelError: It is not a fixed rotation.
        """
        x = mx.random.normal((1, 1, 2, head_dim), key=mx.random.key(0))
        # float32 angles are off by up to half a unit in the last place of the position.
        for a, b in ((0, 1), (7, 90), (3, farthest // 2), (farthest // 2, farthest // 2 - 2)):
            turned = self.turn(rope(x, offset=a), [b, b], key=None if b == 1 else ("check", b))
            error = mx.abs(turned - rope(x, offset=a + b)).max()
            difference = cast("float", error.item())
            if not difference <= 1e-3 + 1e-6 * (a + b):
                raise UnsupportedModelError(
                    "its position embedding is not a fixed rotation: "
                    f"from position {a} to {a + b} it is off by {difference:.2g}"
                )
