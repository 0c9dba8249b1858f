"""Find the text of the kernels, remove its comments, and build it for Metal or for CUDA."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx

_COMMENT = re.compile(r"[ \t]*//[^\n]*")
_SHARED = re.compile(r"^threadgroup\b", re.M)
"""A variable of a threadgroup; a pointer that names the space never begins a line."""
_SPACE = re.compile(r"\b(?:device|constant|threadgroup|thread)\s+")


class Kernel(Protocol):
    """What `mx.fast.metal_kernel` and `mx.fast.cuda_kernel` return."""

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


def backend() -> str:
    """Return what MLX runs kernels with on this machine: ``metal``, ``cuda`` or nothing."""
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else ""


def is_available() -> bool:
    """Tell whether MLX can run the kernels on this machine."""
    return bool(backend())


def device() -> mx.Device:
    """Return the device that the kernels run on."""
    return mx.Device(mx.gpu)


@functools.cache
def folder() -> Path:
    """Return where the text is: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[2]
    return next(path for path in (package / "metal", package.parent / "metal") if path.is_dir())


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all files of kernel text."""
    return tuple(sorted(path.stem for path in folder().glob("*.metal")))


@functools.cache
def text(name: str) -> str:
    """Return a file of kernel text without its comments.

    MLX hashes the text at every call, and looks for names of its own in comments too.
    """
    raw = (folder() / f"{name}.metal").read_text(encoding="ascii")
    return _cleared(raw)


def _cleared(raw: str) -> str:
    return "\n".join(line for line in _COMMENT.sub("", raw).splitlines() if line.strip()) + "\n"


def for_cuda(metal: str) -> str:
    """Return a text as CUDA reads it: pointers name no address space, shared variables do."""
    return _SPACE.sub("", _SHARED.sub("__shared__", metal))


@functools.cache
def cuda_header() -> str:
    """Return what stands for the Metal library before a text that goes to CUDA."""
    return _cleared((folder() / "cuda.h").read_text(encoding="ascii"))


@functools.cache
def build(
    bodies: tuple[str, ...],
    headers: tuple[str, ...],
    input_names: tuple[str, ...],
    output_names: tuple[str, ...],
) -> Kernel:
    """Build the kernel of some files of text, once.

    Its inputs are taken as they lie, strided or not: MLX would otherwise copy a strided one at
    every call, and say nothing.

    Args:
        bodies: The files of its body, in order. The first gives it its name; MLX adds the
            template's values to it, so that every variant has a name of its own.
        headers: The files of the functions that it calls.
        input_names: Its inputs, in order.
        output_names: Its outputs, in order.
    """
    # MLX keeps compiled CUDA on disk by the kernel's name alone: there the name tells the text.
    cuda = backend() == "cuda"
    body, header = ("".join(map(text, names)) for names in (bodies, headers))
    make = mx.fast.cuda_kernel if cuda else mx.fast.metal_kernel
    kernel = make(
        name=f"mlx_sink_{bodies[0]}" + (f"_{stamp(*bodies, *headers)}" if cuda else ""),
        input_names=list(input_names),
        output_names=list(output_names),
        source=for_cuda(body) if cuda else body,
        header=cuda_header() + for_cuda(header) if cuda else header,
        ensure_row_contiguous=False,
    )
    return cast("Kernel", kernel)


def stamp(*names: str) -> str:
    """Return a hash of files of kernel text, and of what stands before them on this machine.

    A verdict on one text holds for no other.
    """
    parts = [backend(), cuda_header(), *map(text, names)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
