"""A small kernel of the project's own kind, on which the runner is tested."""

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
