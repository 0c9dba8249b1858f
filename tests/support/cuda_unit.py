"""The text that MLX hands to NVRTC for a call of a CUDA kernel, and a compiler that reads it.

Without CUDA, MLX makes no CUDA kernel at all, so its text cannot be asked for: this is written
from what MLX 0.32 does, with the two types of its headers that the text meets in the signature.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

_TYPES = {
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
}
_HEADERS = """
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/limits>
#define inf cuda::std::numeric_limits<float>::infinity()
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""


@dataclass
class CudaKernel:
    """Takes the place of `mx.fast.cuda_kernel`: notes the texts of its calls, computes nothing."""

    name: str
    input_names: list[str]
    output_names: list[str]
    source: str
    header: str
    ensure_row_contiguous: bool
    texts: list[str] = field(default_factory=list)

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        template: list[tuple[str, Any]],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
    ) -> list[mx.array]:
        # CUDA launches whole blocks: a ragged edge would run where Metal does not.
        assert not any(g % t for g, t in zip(grid, threadgroup, strict=True))
        parameters = []
        for name, x in zip(self.input_names, inputs, strict=True):
            parameters.append(f"const {_TYPES[x.dtype]}* {name}")
            for suffix, type_ in (("_shape", "Shape"), ("_strides", "Strides"), ("_ndim", "int")):
                if name + suffix in self.source and x.ndim:
                    parameters.append(f"const __grid_constant__ {type_} {name}{suffix}")
        for name, dtype in zip(self.output_names, output_dtypes, strict=True):
            parameters.append(f"{_TYPES[dtype]}* {name}")
        constants = "\n".join(_constant(*pair) for pair in template)
        opening = "namespace mlx::core::cu {\nnamespace cg = cooperative_groups;\n__global__ void "
        signature = f"{opening}{self.name}(\n{', '.join(parameters)}) {{\n{constants}\n"
        self.texts.append(_HEADERS + self.header + signature + self.source + "\n}\n}\n")
        shapes = zip(output_shapes, output_dtypes, strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in shapes]


def _constant(name: str, value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return f"  using {name} = {_TYPES[value]};"
    kind = "bool" if isinstance(value, bool) else "int"
    return f"  constexpr {kind} {name} = {str(value).lower()};"


@functools.cache
def nvcc() -> str | None:
    """Return the path of NVIDIA's compiler, if there is one."""
    return shutil.which("nvcc")


def said_of(text: str, folder: Path) -> str:
    """Compile a text for an A100; return what is wrong with it, warnings included, or nothing."""
    file = folder / "kernel.cu"
    file.write_text(text)
    command = [str(nvcc()), "-std=c++17", "-arch=sm_80", "-cubin", "-o", str(folder / "out")]
    result = subprocess.run([*command, str(file)], capture_output=True, text=True)
    return result.stdout + result.stderr if result.returncode or result.stderr else ""
