"""Each mistake that a GPU would keep to itself is planted, and must be named with its line."""

import mlx.core as mx
import pytest
from host_metal import RunError, metal_kernel
from host_metal.examples import HEADER, SOURCE, Planted, rms_norm_kernel, run_rms_norm

X = mx.random.normal((3, 256), key=mx.random.key(0))
WEIGHT = mx.random.normal((256,), key=mx.random.key(1))

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SUM = "simd_sum(sum_of_squares<E>(values))"
READ = "total += partial[i]"


@pytest.fixture(scope="module", autouse=True)
def good_version():
    """The example as it stands breaks no rule."""
    out, rms = run_rms_norm(rms_norm_kernel(), X, WEIGHT)
    assert mx.allclose(out, mx.fast.rms_norm(X, WEIGHT, 1e-5), atol=1e-5)
    assert mx.allclose(rms, mx.rsqrt(mx.mean(X * X, axis=1) + 1e-5), rtol=1e-5)


RUN_TIME = {
    # Order within a threadgroup.
    "no barrier": Planted("uninitialised", BARRIER, "", READ),
    "barrier without a flag": Planted(
        "race", BARRIER, "threadgroup_barrier(mem_flags::mem_none);", READ
    ),
    "barrier for the other memory": Planted(
        "race", BARRIER, "threadgroup_barrier(mem_flags::mem_device);", READ
    ),
    "barrier of one simdgroup": Planted(
        "uninitialised", BARRIER, "simdgroup_barrier(mem_flags::mem_threadgroup);", READ
    ),
    "memory used again without a barrier": Planted(
        "race", "const float scale =", "partial[sg] = total; const float scale =", READ
    ),
    "device memory used without a barrier": Planted(
        "race", "if (sg == 0 && lane == 0)", "if (sg == 0 && lane == 1 && out[row * D] != 0)"
    ),
    "two simdgroups on one element": Planted("race", "out[row * D + column]", "out[column % 128]"),
    # Order between threadgroups: there is none.
    "two threadgroups on one element": Planted(
        "race", "out[row * D + column]", "out[row / 2 * D + column]"
    ),
    # Rendezvous that some do not reach.
    "barrier that half the lanes skip": Planted(
        "barrier-divergence", "float total =", f"if (lane < 16) {BARRIER} float total ="
    ),
    "barrier that a simdgroup skips": Planted(
        "barrier-divergence", "float total =", f"if (sg == 1) {BARRIER} float total ="
    ),
    "barrier after an early return": Planted(
        "barrier-divergence", BARRIER, f"if (sg == 1) return; {BARRIER}"
    ),
    "simd operation that half the lanes skip": Planted(
        "simd-divergence", SUM, f"lane < 16 ? {SUM} : 0.0f"
    ),
    "simd operation that all but one lane skip": Planted(
        "simd-divergence", "rms[row] = scale", "rms[row] = simd_max(scale)"
    ),
    "simd operation after an early return": Planted(
        "simd-divergence", SUM, f"lane == 5 ? 0 : {SUM}; if (lane == 5) return"
    ),
    "two simd operations in two branches": Planted(
        "simd-divergence", SUM, "lane < 16 ? simd_sum(1.0f) : simd_max(1.0f)"
    ),
    "shuffle from a lane that is not there": Planted(
        "simd-absent-lane", SUM, f"simd_shuffle({SUM}, lane + 1)"
    ),
    # Places that are none of the kernel's.
    "read beyond an input": Planted("out-of-bounds", "weight[column]", "weight[column + 1]"),
    "read before an input": Planted("out-of-bounds", "weight[column]", "weight[int(column) - 1]"),
    "read beyond a shape": Planted("out-of-bounds", "total / D", "total / x_shape[2]"),
    "write beyond an output": Planted("out-of-bounds", "rms[row]", "rms[row + 3]"),
    "index beyond a threadgroup array": Planted("out-of-bounds", "partial[sg] =", "partial[2] ="),
    "pointer beyond a threadgroup array": Planted(
        "out-of-bounds", "partial[sg] =", "(&partial[0])[sg + 1] ="
    ),
    "index beyond a private array": Planted(
        "out-of-bounds", "values[i] * scale", "values[i + 1] * scale"
    ),
    "pointer beyond a private array": Planted(
        "out-of-bounds", "partial[sg] =", "((thread float*)values)[lane + E] ="
    ),
    "write to an input": Planted(
        "write-to-input", "rms[row] = scale", "rms[row] = *(device T*)&x[row] = scale"
    ),
    "vector load off its alignment": Planted(
        "misaligned", "partial[sg] = sum", "partial[sg] = (*(const device float4*)(x + 1)).x"
    ),
    "threadgroup vector off its alignment": Planted(
        "misaligned", READ, "total += (*(const threadgroup float2*)(&partial[0] + 1)).x"
    ),
    "private vector off its alignment": Planted(
        "misaligned", "values[i] * scale", "(*(const thread float2*)(&values[0] + 1)).x * scale"
    ),
    # Values that nobody has made.
    "threadgroup memory partly written": Planted(
        "uninitialised", "if (lane == 0) {", "if (lane == 0 && sg == 0) {", READ
    ),
    "output partly written": Planted(
        "unwritten-output", "rms[row] = scale;", "if (row) rms[row] = scale;"
    ),
    # Resources and arithmetic.
    "33 KB of threadgroup memory": Planted(
        "threadgroup-memory", "partial[NSG];", "partial[33 * 256];"
    ),
    "endless loop": Planted("timeout", READ, f"{READ} * 0.5f; i -= 1", "; ++i"),
    "division by zero": Planted("undefined", "total / D", "total / (D / int(row))"),
    "overflow of a product": Planted("undefined", "/ D +", "/ ((D + int(row)) * 0x1000000) +"),
    "overflow of a shift": Planted("undefined", "/ D +", "/ ((D + int(row)) << 28) +"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUN_TIME)
def test_run_names_the_mistake_and_its_line(name):
    planted = RUN_TIME[name]
    # Not the strict pass: nothing in these texts is for a compiler to find.
    kernel = rms_norm_kernel(planted.text(SOURCE), strict=False, cpu_seconds=0.5)
    with pytest.raises(RunError) as caught:
        run_rms_norm(kernel, X, WEIGHT)
    assert caught.value.kind == planted.kind, caught.value
    lines = {planted.line(SOURCE)}
    if name == "endless loop":  # stopped anywhere within it
        lines |= {planted.line(SOURCE) + 1}
    assert caught.value.where in {f"rms_norm.metal:{line}" for line in lines}, caught.value


def test_run_names_a_line_of_the_header():
    planted = Planted("out-of-bounds", "(from + i)", "(from + i + N * (1 << 20))")
    with pytest.raises(RunError) as caught:
        run_rms_norm(rms_norm_kernel(header=planted.text(HEADER)), X, WEIGHT)
    assert caught.value.kind == "out-of-bounds"
    line = planted.line(HEADER)
    # The load itself is on the line that names the address, or the one that uses it.
    assert caught.value.where in (f"common.metal:{line}", f"common.metal:{line + 2}")


def test_run_finds_inputs_that_only_their_elements_align():
    kernel = rms_norm_kernel()
    with pytest.raises(RunError) as caught:
        run_rms_norm(kernel, X, WEIGHT, misalign=True)
    assert caught.value.kind == "misaligned"
    one_by_one = plant_scalar_load()
    run_rms_norm(rms_norm_kernel(header=one_by_one), X, WEIGHT, misalign=True)


def plant_scalar_load() -> str:
    vector = "const vec<T, 4> part = *reinterpret_cast<const device vec<T, 4>*>(from + i);"
    return Planted("", vector, "const device T* part = from + i;").text(HEADER)


def test_schedules_agree():
    outs = [run_rms_norm(rms_norm_kernel(), X, WEIGHT, seed=seed)[0] for seed in range(4)]
    assert all(mx.array_equal(outs[0], out) for out in outs)


@pytest.mark.parametrize("seed", range(3))
def test_a_race_is_found_in_every_schedule(seed):
    planted = RUN_TIME["memory used again without a barrier"]
    with pytest.raises(RunError, match="race"):
        run_rms_norm(rms_norm_kernel(planted.text(SOURCE)), X, WEIGHT, seed=seed)


SWAP = """
    uint t = thread_index_in_threadgroup;
    threadgroup float s[64];
    s[t] = a[t];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float other = s[t ^ DISTANCE];
    BARRIER;
    s[t] = other;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[t] = s[t];
"""


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("distance", "barrier", "flag", "orders"),
    [
        (1, "simdgroup_barrier", "threadgroup", True),
        (1, "simdgroup_barrier", "none", False),
        (1, "simdgroup_barrier", "device", False),
        (33, "simdgroup_barrier", "threadgroup", False),
        (33, "threadgroup_barrier", "threadgroup", True),
        (33, "threadgroup_barrier", "none", False),
    ],
)
def test_a_write_after_reads_needs_a_barrier(distance, barrier, flag, orders, seed):
    source = SWAP.replace("BARRIER", f"{barrier}(mem_flags::mem_{flag})")
    source = source.replace("DISTANCE", str(distance))
    # None of the repository's files: a line of theirs that is the same would be named instead.
    kernel = metal_kernel("swap", ["a"], ["out"], source, files={})
    x = mx.arange(64).astype(mx.float32)
    launch = {"grid": (64, 1, 1), "threadgroup": (64, 1, 1), "seed": seed}
    output = {"output_shapes": [(64,)], "output_dtypes": [mx.float32]}
    if orders:
        (out,) = kernel(inputs=[x], **launch, **output)
        assert out.tolist() == [i ^ distance for i in range(64)]
        return
    with pytest.raises(RunError) as caught:
        kernel(inputs=[x], **launch, **output)
    assert caught.value.kind == "race"
    assert caught.value.where in ("swap.metal:6", "swap.metal:8")
    if barrier == "threadgroup_barrier" or distance == 1:  # all have read before one writes
        assert caught.value.where == "swap.metal:8"
        assert "after a read" in caught.value.message
