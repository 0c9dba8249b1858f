"""The text of the Metal kernels: found, cleared of comments, and built."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx

_COMMENT = re.compile(r"[ \t]*//[^\n]*")


class Kernel(Protocol):
    """What `mx.fast.metal_kernel` returns."""

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Launch the kernel; MLX compiles it once for each template and set of dtypes."""
        ...


def is_available() -> bool:
    """Tell whether MLX can run the kernels on this machine."""
    return mx.metal.is_available()


def device() -> mx.Device:
    """Return the device that the kernels run on."""
    return mx.Device(mx.gpu)


@functools.cache
def folder() -> Path:
    """Return where the text is: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "metal", package.parent / "metal") if path.is_dir())


@functools.cache
def text(name: str) -> str:
    """Return a file of kernel text without its comments.

    MLX hashes the text at every call, and looks for names of its own in comments too.
    """
    raw = (folder() / f"{name}.metal").read_text(encoding="ascii")
    return "\n".join(line for line in _COMMENT.sub("", raw).splitlines() if line.strip()) + "\n"


@functools.cache
def build(
    name: str, header: str, input_names: tuple[str, ...], output_names: tuple[str, ...]
) -> Kernel:
    """Build the kernel of a file of text, once.

    Its inputs are taken as they lie, strided or not: MLX would otherwise copy a strided one at
    every call, and say nothing.

    Args:
        name: The file of its body, and its name; MLX adds the template's values to it, so that
            every specialisation has a name of its own.
        header: The file of the functions that it calls.
        input_names: Its inputs, in order.
        output_names: Its outputs, in order.
    """
    kernel = mx.fast.metal_kernel(
        name=f"mlx_sink_{name}",
        input_names=list(input_names),
        output_names=list(output_names),
        source=text(name),
        header=text(header),
        ensure_row_contiguous=False,
    )
    return cast("Kernel", kernel)


def stamp(*names: str) -> str:
    """Return a hash of files of kernel text: what was found about one text holds for no other."""
    return hashlib.sha256("\0".join(map(text, names)).encode()).hexdigest()[:16]
