"""What MLX hands over, how it is taken apart, and the rules that only the lint knows."""

import sys

import mlx.core as mx
import pytest
from host_metal import TextError, ToolError, build, metal_kernel
from host_metal.errors import KernelError
from host_metal.examples import FILES, HEADER, SOURCE, rms_norm_kernel, run_rms_norm
from host_metal.host_unit import share_variables
from host_metal.text import Place, places, with_line_markers
from host_metal.trace import trace

GOLDEN = """\
template <typename T> T same(T x) { return x; }
template <typename T, int D, bool F>
[[kernel]] void {name}(
  const device float16_t* a [[buffer(0)]],
  const constant int* a_shape [[buffer(1)]],
  const constant float* b [[buffer(2)]],
  const constant int64_t* b_strides [[buffer(3)]],
  const constant float& s [[buffer(4)]],
  device float16_t* out [[buffer(5)]],
  device float* more [[buffer(6)]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 thread_position_in_grid [[thread_position_in_grid]]) {
uint i = thread_position_in_grid.x; uint l = thread_index_in_simdgroup;
out[i] = a[i] + a_shape[0] + b_strides[0] * s; more[0] = l;
}

template [[host_name("{name}")]] [[kernel]] decltype({name}{values}) {name}{values};
""".replace("{values}", "<float16_t, 64, 1>")


def test_mlx_hands_over_the_text_it_would_compile():
    """The export callback is experimental: a new form of it must be noticed here first."""
    header, _, rest = GOLDEN.partition("\n")
    source = rest.partition(") {\n")[2].partition("\n}\n\n")[0]
    kernel = mx.fast.metal_kernel(
        name="golden",
        input_names=["a", "b", "s"],
        output_names=["out", "more"],
        header=header + "\n",
        source=source,
    )
    traced = trace(
        kernel,
        [mx.zeros((16,), mx.float16), mx.zeros((3,)), mx.array(1.0)],
        header + "\n",
        source,
        template=[("T", mx.float16), ("D", 64), ("F", True)],
        grid=(16, 1, 1),
        threadgroup=(16, 1, 1),
        output_shapes=[(16,), (1,)],
        output_dtypes=[mx.float16, mx.float32],
    )
    assert traced.name.startswith("custom_kernel_golden_")
    assert traced.text == GOLDEN.replace("{name}", traced.name)
    assert traced.template == (
        ("typename", "T", "float16_t"),
        ("int", "D", "64"),
        ("bool", "F", "1"),
    )
    names = ["a", "a_shape", "b", "b_strides", "s", "out", "more"]
    assert [parameter.name for parameter in traced.buffers] == names
    assert [parameter.form for parameter in traced.buffers] == ["*"] * 4 + ["&"] + ["*"] * 2
    attributes = [p.attribute for p in traced.parameters if p.attribute]
    assert attributes == ["thread_index_in_simdgroup", "thread_position_in_grid"]


def test_line_markers_follow_each_line_to_its_file():
    joined = HEADER + "\n" + SOURCE
    stripped = "\n".join(line for line in joined.split("\n") if not line.startswith("//"))
    marked = with_line_markers(stripped, "joined.metal", FILES)
    files = {name: text.split("\n") for name, text in FILES.items()}
    named = 0
    for place, line in zip(places(marked), marked.split("\n"), strict=True):
        if line and not line.startswith("#line"):
            assert files[place.file][place.line - 1] == line
            named += 1
    assert named > 30


def test_line_markers_survive_a_change_and_unknown_text():
    changed = SOURCE.replace("float total = 0.0f;", "float total = 1.0f; // changed")
    marked = with_line_markers(changed, "x.metal", FILES)
    at = next(i for i, line in enumerate(marked.split("\n")) if "changed" in line)
    wanted = SOURCE[: SOURCE.index("float total")].count("\n") + 1
    assert places(marked)[at] == Place("rms_norm.metal", wanted)
    assert places(with_line_markers("a;\nb;", "x.metal", FILES))[2] == Place("x.metal", 2)


@pytest.mark.parametrize(
    ("declared", "names"),
    [
        ("threadgroup float a[4];", ["a"]),
        ("int x;\n  threadgroup float a[N * 2], b[8][D];", ["a", "b"]),
        ("{ threadgroup vec<T, 4> a[4]; }", ["a"]),
        ("/* shared */ threadgroup float a;", ["a"]),
        ("threadgroup float* p = a;", []),
        ("threadgroup const float4* p = (threadgroup float4*)a;", []),
        ("f(x); // threadgroup float a[4];", []),
        ("f((threadgroup float*)a);", []),
    ],
)
def test_threadgroup_variables_are_shared_and_pointers_are_not(declared, names):
    shared = share_variables(declared)
    assert shared.count("hm::threadgroup_variable") == len(names)
    assert all(f'"{name}")' in shared for name in names)
    assert shared.count("\n") == declared.count("\n")
    assert names or shared == declared


# What the lint refuses, by the text that takes the place of the line `const uint lane = ...;`.
LINT = {
    "a character beyond ASCII": ("// \N{MULTIPLICATION SIGN}", "ASCII"),
    "a pointer without an address space": ("float* p = values;", "no address space: float* p"),
    "a reference without an address space": ("float& r = values[0];", "no address space"),
    "a pointer to a template's type": ("const T *p = nullptr;", "no address space"),
    "a cast without an address space": ("float z = *((float*)values);", "no address space"),
    "a lambda": ("auto f = [=](float a) { return a; };", "lambda"),
    "goto": ("goto end;", "goto"),
    "double": ("double d = 0;", "double"),
    "the C++ library": ("float m = std::max(1.0f, 2.0f);", "std"),
    "operator new": ("thread float* p = new float[2];", "no such C++"),
    "an include": ("\n#include <metal_stdlib>\n", "include"),
    "a variable named as an attribute": ("uint grid_size = 3;", "parameter that MLX adds"),
    "an attribute in a longer name": ("uint my_grid_size = 3;", "no code uses it"),
    "an attribute in a comment": ("// not thread_position_in_grid", "no code uses it"),
    "a shape in a longer name": ("uint max_shape = 2;", "no code uses it"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINT)
def test_lint_names_the_line(name):
    text, message = LINT[name]
    good = "const uint lane = thread_index_in_simdgroup;"
    assert SOURCE.count(good) == 1
    with pytest.raises(TextError) as caught:
        run_rms_norm(rms_norm_kernel(SOURCE.replace(good, f"{good} {text}")), *_arrays())
    line = SOURCE[: SOURCE.index(good)].count("\n") + 1 + text.startswith("\n")
    assert (caught.value.kind, caught.value.where) == ("lint", f"rms_norm.metal:{line}")
    assert message in caught.value.message


def test_lint_looks_at_the_header_too():
    header = HEADER.replace("const thread float* values", "const float* values")
    with pytest.raises(TextError) as caught:
        run_rms_norm(rms_norm_kernel(header=header), *_arrays())
    assert (caught.value.kind, caught.value.where) == ("lint", "common.metal:3")


@pytest.mark.parametrize(
    ("simdgroups", "width", "message"),
    [(17, 17 * 128, "544 threads"), (0, 128, "must be positive")],
)
def test_lint_refuses_a_launch(simdgroups, width, message):
    x = mx.zeros((1, width))
    with pytest.raises(TextError, match=message):
        run_rms_norm(rms_norm_kernel(), x, x[0], simdgroups=simdgroups)


def test_512_threads_are_allowed():
    x = mx.random.normal((1, 16 * 128), key=mx.random.key(2))
    out, _ = run_rms_norm(rms_norm_kernel(), x, x[0], simdgroups=16)
    assert mx.allclose(out, mx.fast.rms_norm(x, x[0], 1e-5), atol=1e-5)


def test_a_missing_compiler_is_one_line(monkeypatch):
    build.compiler.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolError, match=r"needs g\+\+ 12.*'no-such-compiler' is not") as caught:
        run_rms_norm(rms_norm_kernel(SOURCE + "\n// a text that is not in the cache"), *_arrays())
    assert "\n" not in str(caught.value)
    build.compiler.cache_clear()


def test_a_missing_libclang_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HOST_METAL_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "clang", None)
    with pytest.raises(ToolError, match="pip install libclang") as caught:
        run_rms_norm(rms_norm_kernel(), *_arrays())
    assert "\n" not in str(caught.value)


def test_atomics_are_refused():
    with pytest.raises(NotImplementedError, match="atomics"):
        metal_kernel("t", ["a"], ["out"], "out[0] = a[0];", atomic_outputs=True)


def test_mistakes_share_one_base():
    assert issubclass(TextError, KernelError)
    assert not issubclass(ToolError, KernelError)


def _arrays() -> tuple[mx.array, mx.array]:
    return mx.ones((2, 256)), mx.ones((256,))
