"""The stand-in for a kernel made by mx.fast.metal_kernel: same constructor, same call."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkout import ROOT

from .build import build_runner
from .host_unit import host_unit
from .lint import lint_launch, lint_text
from .runner import Buffer, Options, Report, run
from .strict import check_strict
from .text import Place, places, read_metal_files, with_line_markers, without_comments
from .trace import Traced, trace

METAL_FILES = ROOT / "metal"

# Kept from before a test puts ours in its place.
_mlx_metal_kernel = mx.fast.metal_kernel

_STORED_AS = {mx.bfloat16: mx.uint16}  # numpy has no bfloat16


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    **options: Any,
) -> "HostKernel":
    """Make a kernel that runs on the CPU, checked; stands for `mx.fast.metal_kernel`.

    The keywords beyond that function's own are those of `HostKernel`.
    """
    if atomic_outputs:
        raise NotImplementedError("host_metal has no atomics: no kernel here uses them")
    return HostKernel(
        name, input_names, output_names, source, header, ensure_row_contiguous, **options
    )


class HostKernel:
    """A kernel whose calls compile the text that MLX generates, check it, and run it.

    Attributes:
        report: What the latest call did.
        last_text: The text that MLX generated for it.
    """

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        *,
        files: dict[str, str] | None = None,
        compile_options: dict[str, Any] | None = None,
        strict: bool = True,
        lint: bool = True,
        **run_options: Any,
    ):
        """Take what `mx.fast.metal_kernel` takes, and how to check.

        Args:
            name: The kernel's name.
            input_names: As for MLX.
            output_names: As for MLX.
            source: The body.
            header: What stands before the kernel.
            ensure_row_contiguous: As for MLX.
            files: Text of the .metal files by name, so that mistakes are named by their lines;
                the repository's own by default.
            compile_options: As for MLX; the CPU has one math mode.
            strict: Type-check with address spaces as types.
            lint: Refuse what Metal's front end, or this project, refuses.
            run_options: Fields of `Options`: `seed`, `misalign`, `cpu_seconds`, ...
        """
        if files is None:
            files = read_metal_files(METAL_FILES)
        extra = {"compile_options": compile_options} if compile_options else {}
        self._kernel = _mlx_metal_kernel(
            name=name,
            input_names=list(input_names),
            output_names=list(output_names),
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            **extra,
        )
        self._input_names = list(input_names)
        self._output_names = list(output_names)
        self._source, self._header = source, header
        self._marked_source = with_line_markers(source, f"{name}.metal", files)
        self._marked_header = with_line_markers(header, f"{name}.header.metal", files)
        self._contiguous = ensure_row_contiguous
        self._strict, self._lint = strict, lint
        self._options = Options(**run_options)
        self._runners: dict[str, Path] = {}
        self.report = Report()
        self.last_text = ""

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
        **run_options: Any,
    ) -> list[mx.array]:
        """Run the kernel, as a call of MLX's would.

        Raises:
            TextError: The text is wrong.
            RunError: What it did is wrong.
        """
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        launch: dict[str, Any] = {
            "output_shapes": output_shapes,
            "output_dtypes": output_dtypes,
            "grid": tuple(grid),
            "threadgroup": tuple(threadgroup),
        }
        if template:
            launch["template"] = template
        if init_value is not None:
            launch["init_value"] = init_value
        traced = trace(self._kernel, arrays, self._header, self._source, **launch)
        self.last_text = traced.text
        if verbose:
            print(traced.text)
        if self._lint:
            lint_launch(traced, grid, threadgroup)
        runner = self._compile(traced)
        buffers = self._input_buffers(traced, arrays)
        outputs = [
            _output_buffer(*output, init_value)
            for output in zip(self._output_names, output_shapes, output_dtypes, strict=True)
        ]
        self.report = run(
            runner,
            grid,
            # As MLX: a threadgroup is never larger than the grid.
            [min(t, g) for t, g in zip(threadgroup, grid, strict=True)],
            [*buffers, *outputs],
            replace(self._options, **run_options),
            self._first_mention,
        )
        return [
            _as_array(buffer.data, shape, dtype)
            for buffer, shape, dtype in zip(outputs, output_shapes, output_dtypes, strict=True)
        ]

    def _compile(self, traced: Traced) -> Path:
        """Check and compile a specialisation, once."""
        if traced.text not in self._runners:
            if self._lint:
                lint_text(traced, self._marked_header, self._marked_source)
            # First, for its messages name what Metal would: g++ knows no address space.
            if self._strict:
                check_strict(traced, self._marked_header, self._marked_source)
            unit = host_unit(traced, self._marked_header, self._marked_source)
            self._runners[traced.text] = build_runner(unit)
        return self._runners[traced.text]

    def _input_buffers(self, traced: Traced, arrays: list[mx.array]) -> list[Buffer]:
        """Inputs, each with the shape, strides and rank that its signature asks for."""
        asked = {parameter.name for parameter in traced.buffers}
        out = []
        for name, array in zip(self._input_names, arrays, strict=True):
            data, strides = _memory_of(array, self._contiguous)
            out.append(Buffer(name, "input", data))
            for suffix, values, dtype in (
                ("_shape", array.shape, np.int32),
                ("_strides", strides, np.int64),
                ("_ndim", [array.ndim], np.int32),
            ):
                if name + suffix in asked:
                    out.append(Buffer(name + suffix, "input", np.array(values, dtype)))
        return out

    def _first_mention(self, name: str) -> Place:
        """The first line of the body that mentions a buffer."""
        lines = without_comments(self._marked_source).split("\n")
        origin = places(self._marked_source)
        mentions = [i for i, line in enumerate(lines) if re.search(rf"\b{name}\b", line)]
        return origin[mentions[0] if mentions else 0]


def _memory_of(array: mx.array, contiguous: bool) -> tuple[np.ndarray, list[int]]:
    """The memory that a kernel would see behind an array, flat, and its strides in elements."""
    view = array.view(_STORED_AS.get(array.dtype, array.dtype))
    if contiguous:
        view = mx.contiguous(view)
    seen = np.asarray(memoryview(view)) if array.size else np.array(view)
    strides = [stride // seen.itemsize for stride in seen.strides]
    if any(stride < 0 for stride in strides):
        raise NotImplementedError("host_metal: an input with negative strides")
    span = 1 + sum((n - 1) * s for n, s in zip(seen.shape, strides, strict=True))
    flat = np.lib.stride_tricks.as_strided(seen, (span if seen.size else 0,), (seen.itemsize,))
    return flat.copy(), strides


def _output_buffer(
    name: str, shape: Sequence[int], dtype: mx.Dtype, init_value: float | None
) -> Buffer:
    size = int(np.prod(shape, dtype=np.int64))
    filled = mx.full((size,), 0 if init_value is None else init_value, dtype)
    data = np.array(filled.view(_STORED_AS.get(dtype, dtype)))
    return Buffer(name, "output" if init_value is None else "filled", data)


def _as_array(data: np.ndarray, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    return mx.array(data.reshape(shape)).view(dtype)
