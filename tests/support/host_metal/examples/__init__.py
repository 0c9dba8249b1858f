"""A small kernel of the project's own kind, on which the runner is tested."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import HostKernel, metal_kernel

_FOLDER = Path(__file__).parent
FILES = {path.name: path.read_text() for path in sorted(_FOLDER.glob("*.metal"))}
SOURCE = FILES["rms_norm.metal"]
HEADER = FILES["common.metal"]


def rms_norm_kernel(source: str = SOURCE, header: str = HEADER, **options: Any) -> HostKernel:
    """The example kernel, or a changed text of it."""
    return metal_kernel(
        name="rms_norm",
        input_names=["x", "weight", "eps"],
        output_names=["out", "rms"],
        source=source,
        header=header,
        files=FILES,
        **options,
    )


def run_rms_norm(
    kernel: HostKernel, x: mx.array, weight: mx.array, simdgroups: int = 2, **options: Any
) -> list[mx.array]:
    """Normalise the rows of x."""
    rows, D = x.shape
    return kernel(
        inputs=[x, weight, mx.array(1e-5)],
        template=[("T", x.dtype), ("D", D), ("NSG", simdgroups)],
        grid=(32 * simdgroups, rows, 1),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[x.shape, (rows,)],
        output_dtypes=[x.dtype, mx.float32],
        **options,
    )


@dataclass
class Planted:
    """A mistake put into the example's text in place of what is right.

    Attributes:
        kind: The kind of error that must name it.
        good: A part of the text that occurs once.
        bad: What takes its place, in as many lines.
        noticed: A part of the line that shows the mistake, if that is not the planted one.
    """

    kind: str
    good: str
    bad: str
    noticed: str | None = None

    def text(self, original: str) -> str:
        """The text with the mistake."""
        assert original.count(self.good) == 1, f"not exactly once in the example: {self.good}"
        assert self.good.count("\n") == self.bad.count("\n")
        return original.replace(self.good, self.bad)

    def line(self, original: str) -> int:
        """The line that the error must name."""
        return original[: original.index(self.noticed or self.good)].count("\n") + 1
