"""The strict pass refuses, by file and line, what Metal's own front end would refuse."""

import mlx.core as mx
import pytest
from host_metal import TextError
from host_metal.examples import HEADER, SOURCE, Planted, rms_norm_kernel, run_rms_norm

X = mx.ones((2, 256))
SUM = "simd_sum(sum_of_squares<E>(values))"
SQUARES = "sum_of_squares<E>(values)"

# What is planted: good text, bad text, and what marks the line if that is another one.
IN_SOURCE = {
    # Address spaces: of the wrong kind, missing, cast away.
    "constant pointer to device memory": (
        ("rms[row] = scale", "const constant T* p = x; rms[row] = p[0]")
    ),
    "pointer without a space to device memory": (
        ("rms[row] = scale", "const T* p = x; rms[row] = p[0]")
    ),
    "thread pointer for a device parameter": (
        ("load_run<T, E>(x + row * D + first", "load_run<float, E>(values")
    ),
    "device pointer for a thread parameter": (SQUARES, "sum_of_squares<E>(x)"),
    "threadgroup pointer for a thread parameter": (SQUARES, "sum_of_squares<NSG>(partial)"),
    "a cast from one space to another": (
        ("total += partial[i]", "total += *(const thread float*)&partial[i]")
    ),
    "threadgroup variable with an initialiser": ("partial[NSG];", "partial = 0.0f;"),
    "a store to an input": ("rms[row] = scale", "x[row] = scale"),
    # Types.
    "a sum of 64-bit integers": (SUM, "simd_sum(long(lane))"),
    "max of int and uint": ("total / D", "total / max(D, lane)"),
    "as_type to another size": ("total / D", "total / as_type<float>(ulong(D))"),
    # Names that C, C++ or OpenCL have and Metal lacks.
    "expf": ("precise::rsqrt(", "1.0f / expf("),
    "erf": ("precise::rsqrt(", "erf("),
    "get_global_id": ("sg == 0 && lane", "sg == 0 && get_global_id(0)"),
    "printf": ("rms[row] = scale", 'printf("x")'),
    "a misspelled attribute": ("= threadgroup_position_in_grid.y", "= threadgroup_position.y"),
}
IN_HEADER = {
    "threadgroup variable in a helper": (
        ("float sum = 0.0f", "threadgroup float none[1]; float sum = 0.0f")
    ),
    "a variable of the whole program": (
        ("// N values from device memory", "float table[2] = {1, 2}; //")
    ),
    "a pointer to a function": (("float sum = 0.0f", "float (*f)(float) = exp; float sum = f(0)")),
    "a parameter without a space": ("const device T* from", "const T* from", "reinterpret_cast"),
}


def test_the_good_version_passes():
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        run_rms_norm(rms_norm_kernel(lint=False), X.astype(dtype), X[0].astype(dtype))


def refusal(planted: Planted, original: str) -> TextError:
    name = "source" if original is SOURCE else "header"
    kernel = rms_norm_kernel(**{name: planted.text(original)}, lint=False)
    with pytest.raises(TextError) as caught:
        run_rms_norm(kernel, X, X[0])
    assert caught.value.kind == "strict", caught.value
    return caught.value


@pytest.mark.parametrize("name", IN_SOURCE)
def test_refused_in_the_source(name):
    planted = Planted("strict", *IN_SOURCE[name])
    assert refusal(planted, SOURCE).where == f"rms_norm.metal:{planted.line(SOURCE)}"


@pytest.mark.parametrize("name", IN_HEADER)
def test_refused_in_the_header(name):
    planted = Planted("strict", *IN_HEADER[name])
    assert refusal(planted, HEADER).where == f"common.metal:{planted.line(HEADER)}"


def test_float_becomes_bfloat_only_by_a_cast():
    planted = Planted("strict", "= static_cast<T>(values", "= (values")
    kernel = rms_norm_kernel(planted.text(SOURCE))
    run_rms_norm(kernel, X.astype(mx.float16), X[0].astype(mx.float16))
    with pytest.raises(TextError) as caught:
        run_rms_norm(kernel, X.astype(mx.bfloat16), X[0].astype(mx.bfloat16))
    assert caught.value.kind == "strict"
    assert caught.value.where == f"rms_norm.metal:{planted.line(SOURCE)}"


def test_the_compiler_names_the_line_too():
    planted = Planted("compile", "precise::rsqrt(", "1.0f / expf(")
    kernel = rms_norm_kernel(planted.text(SOURCE), strict=False)
    with pytest.raises(TextError) as caught:
        run_rms_norm(kernel, X, X[0])
    assert caught.value.kind == "compile"
    assert caught.value.where == f"rms_norm.metal:{planted.line(SOURCE)}"
    assert "expf" in caught.value.message
