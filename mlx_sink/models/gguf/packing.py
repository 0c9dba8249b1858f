"""A tensor's bytes in GGUF as MLX's arrays: three types as they are, the others expanded.

MLX's affine layout says ``scale * q + bias``, with q from 0 on, groups of 32 along a row, and the
bits of q in words of 32 bits, the first element in the lowest. A block of 32 elements of GGUF is

    Q4_0    d f16, 16 bytes         d (q - 8)       element i is the low half of byte i,
    Q4_1    d f16, m f16, 16 bytes  d q + m         element 16 + i the high half
    Q8_0    d f16, 32 bytes         d q, q signed

so scales and words are moved, and no weight changes: -8 d and -128 d are exact.

Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_sink.errors import ModelError
from mlx_sink.io.gguf import Tensor

GROUP_SIZE = 32

PACKED = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
"""Types that MLX's layout holds bit for bit, and their bits."""

PLAIN = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}

NEEDS = "which needs the package gguf to expand: pip install 'mlx-sink[gguf]'"


def parts_of(
    tensor: Tensor, dtype: mx.Dtype, rows: np.ndarray | None = None
) -> dict[str, mx.array]:
    """Return a tensor's arrays by what follows its name: ``weight``, and ``scales``, ``biases``.

    Args:
        tensor: The tensor.
        dtype: Of numbers that are not packed.
        rows: The order in which its rows are wanted; as they lie by default.

    Raises:
        ModelError: The type needs a package that is not installed, or is not known to it.
    """
    data, is_list = tensor.data(), len(tensor.shape) == 1
    if rows is not None and not is_list:
        data = data[rows]
    if tensor.kind in PACKED and not is_list:
        words, scales, biases = packed(data, tensor.kind)
        shaped = (x.reshape(*tensor.shape[:-1], -1) for x in (words, scales, biases))
        arrays = [mx.array(cast("Any", x)) for x in shaped]
        exact = [arrays[0], *(x.astype(dtype) for x in arrays[1:])]
        return dict(zip(("weight", "scales", "biases"), exact, strict=True))
    weight = mx.reshape(_expanded(tensor, data), tensor.shape).astype(dtype)
    if rows is not None and is_list:
        weight = weight[mx.array(cast("Any", rows))]
    return {"weight": weight}


def packed(data: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return words, scales and biases of rows of blocks.

    Args:
        data: ``[rows, bytes of a row]`` uint8.
        kind: ``Q4_0``, ``Q4_1`` or ``Q8_0``.

    Returns:
        Words ``[rows, columns * bits / 32]`` uint32; scales and biases ``[rows, columns / 32]``
        float32, whose values float16 holds.
    """
    heads = 2 if kind == "Q4_1" else 1
    size = 2 * heads + 4 * PACKED[kind]
    blocks = data.reshape(len(data), -1, size)
    numbers = np.ascontiguousarray(blocks[..., : 2 * heads]).view("<f2").astype(np.float32)
    q, scales = blocks[..., 2 * heads :], numbers[..., 0]
    if kind == "Q8_0":
        words, zero = q ^ np.uint8(0x80), 128
    else:
        both = np.concatenate([q & 0x0F, q >> 4], axis=-1)
        words, zero = both[..., 0::2] | (both[..., 1::2] << 4), 8
    with np.errstate(invalid="ignore"):  # a damaged file's scales may be no numbers
        biases = numbers[..., 1] if kind == "Q4_1" else -zero * scales
    flat = np.ascontiguousarray(words).reshape(len(data), -1)
    return flat.view("<u4"), scales, biases


def zeros_of(tensor: Tensor, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return arrays of the shapes and types of `parts_of`, which nothing computes or reads."""
    if tensor.kind not in PACKED or len(tensor.shape) < 2:
        return {"weight": mx.zeros(tensor.shape, dtype)}
    *rows, columns = tensor.shape
    scales = (*rows, columns // GROUP_SIZE)
    words = (*rows, columns * PACKED[tensor.kind] // 32)
    return {
        "weight": mx.zeros(words, mx.uint32),
        "scales": mx.zeros(scales, dtype),
        "biases": mx.zeros(scales, dtype),
    }


def _expanded(tensor: Tensor, data: np.ndarray) -> mx.array:
    if tensor.kind in PLAIN:
        like = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.kind]
        array = mx.array(cast("Any", np.ascontiguousarray(data).view(like)))
        return array.view(mx.bfloat16) if tensor.kind == "BF16" else array
    what = f"tensor {tensor.name!r} of {str(tensor.path)!r} is of type {tensor.kind}"
    try:
        library = cast("Any", import_module("gguf"))
    except ImportError:
        raise ModelError(f"{what}, {NEEDS}") from None
    try:
        rows = library.quants.dequantize(data, library.GGMLQuantizationType[tensor.kind])
    except (KeyError, NotImplementedError, ValueError) as error:
        raise ModelError(f"{what}, which the package gguf does not expand ({error})") from None
    return mx.array(rows.astype(np.float32))
