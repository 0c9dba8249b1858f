"""A model's rotary embedding as a fixed rotation that a query can be turned by.

RoPE multiplies each pair of dimensions by a rotation whose angle is the position times the
pair's frequency. Rotations add up, so ``R(b) rope(x, a) = rope(x, a + b)``, whatever else the
embedding does to its input (a constant scale, as YaRN and longrope have it, passes through).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sink.errors import UnsupportedModelError

Rope = Callable[..., mx.array]


class Rotation:
    """The rotation part of a rotary embedding.

    Args:
        frequencies: Radians per position of each pair, ``[dims / 2]``.
        interleaved: Pairs are ``(0, 1), (2, 3), ...`` (MLX's ``traditional``) rather than
            ``(0, dims / 2), (1, dims / 2 + 1), ...``.

    Dimensions from ``dims`` on are left alone (partial rotary).

    Attributes:
        is_identity: True for a layer without positions: no turn changes anything.
    """

    def __init__(self, frequencies: Sequence[float] | np.ndarray, interleaved: bool = False):
        self.frequencies = np.asarray(frequencies, dtype=np.float64)
        self.interleaved = interleaved
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
            positions: How far to turn each of the L rows; may be negative.
            key: Stands for ``positions`` among the recent ones.

        Returns:
            ``[B, n_heads, L, head_dim]`` in x's dtype; worked out in float32.
        """
        exact = x.astype(mx.float32)
        if len(positions) == 1:
            # A decode step: one small product costs less than many smaller operations.
            (matrix,) = self._recall(key, lambda: (self._matrix(positions[0], x.shape[-1]),))
            return (exact @ matrix).astype(x.dtype)
        cos, sin = self._recall(key, lambda: self._table(positions))
        head = exact[..., : self.dims] if self.dims < x.shape[-1] else exact
        turned = head * cos + self._partner(head) * sin
        if self.dims < x.shape[-1]:
            turned = mx.concatenate([turned, exact[..., self.dims :]], axis=-1)
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
        made = self._recent.get(key)
        if made is None:
            made = make()
            if len(self._recent) >= 4:
                del self._recent[next(iter(self._recent))]
            self._recent[key] = made
        return made

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

    def _matrix(self, position: int, head_dim: int) -> mx.array:
        """Return the rotation as a matrix for rows, ``[head_dim, head_dim]`` in float32."""
        angles = position * self.frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        matrix = np.zeros((head_dim, head_dim), np.float32)
        diagonal = matrix.ravel()[:: head_dim + 1]
        diagonal[self.dims :] = 1
        step = 1 if self.interleaved else self.dims // 2
        first = slice(0, self.dims, 2) if self.interleaved else slice(0, step)
        second = slice(first.start + step, self.dims, first.step)
        diagonal[first] = diagonal[second] = cos
        # Beside the diagonal, a pair's distance away, rows and columns are exchanged.
        matrix.ravel()[step :: head_dim + 1][first] = sin
        matrix.ravel()[step * head_dim :: head_dim + 1][first] = -sin
        return mx.array(matrix)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotation:
        return self

    @classmethod
    def of(cls, rope: Rope | None) -> Rotation:
        """Read the rotation from a rope module of MLX or mlx-lm.

        Args:
            rope: ``None`` for a layer without positions; a module with ``base``, ``scale``
                (`mlx.nn.RoPE`); or one with ``_freqs``, positions per radian, and ``dims``
                or ``dim`` (Llama 3, YaRN, longrope, proportional). Anything else is taken
                for the identity, which `check` then confirms or refuses.
        """
        if isinstance(rope, nn.RoPE):
            powers = np.arange(0, rope.dims, 2) / rope.dims
            return cls(rope.scale * float(rope.base) ** -powers, bool(rope.traditional))
        periods = getattr(rope, "_freqs", None)
        if periods is not None:
            with np.errstate(divide="ignore"):
                frequencies = 1.0 / np.array(periods.astype(mx.float32), np.float64)
            return cls(frequencies, bool(getattr(rope, "traditional", False)))
        return cls([])

    def check(self, rope: Rope | None, head_dim: int, farthest: int) -> None:
        """Hold the rotation against the module it was read from.

        Verifies ``R(b) rope(x, a) == rope(x, a + b)`` near and far.

        Args:
            rope: The module, called as ``rope(x, offset=a)``.
            head_dim: Last dimension of the queries and keys.
            farthest: The largest position that the module will see.

        Raises:
            UnsupportedModelError: The module is not a fixed rotation.
        """
        if rope is None:
            return
        x = mx.random.normal((1, 1, 2, head_dim), key=mx.random.key(0))
        # float32 angles are off by up to half a unit in the last place of the position.
        for a, b in ((0, 1), (7, 90), (3, farthest // 2), (farthest // 2, farthest // 2 - 2)):
            turned = self.turn(rope(x, offset=a), [b, b], key=None if b == 1 else ("check", b))
            error = mx.abs(turned - rope(x, offset=a + b)).max()
            difference = cast("float", error.item())
            if not difference <= 1e-3 + 1e-6 * (a + b):
                raise UnsupportedModelError(
                    f"its position embedding ({type(rope).__name__}) is not a fixed rotation: "
                    f"from position {a} to {a + b} it is off by {difference:.2g}"
                )
