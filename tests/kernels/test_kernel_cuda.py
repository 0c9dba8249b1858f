"""The kernel text on CUDA: what MLX would hand to NVIDIA's compiler, compiled but never run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import packed_case
import pytest
from cuda_unit import CudaKernel, nvcc, said_of
from decode_case import Case, ring_at, run

from mlx_sink.attention.dispatch import sink_attention
from mlx_sink.attention.kernels import check_decode, source, trust
from mlx_sink.attention.kernels import decode as kernel
from mlx_sink.attention.kernels import decode_packed as packed
from mlx_sink.attention.layout import layout_of
from mlx_sink.attention.rope import Rotation

RING = (ring_at(4, 90, 215, epoch=100),)
CASES = {
    "float32": Case(RING, mx.float32, 64, splits=1),
    "float16, GQA, splits": Case(RING, mx.float16, 128, group=4, splits=3),
    "bfloat16, staged tiles": Case(RING, mx.bfloat16, 128, group=8, n=8, splits=2),
    "float16, odd sizes": Case(RING, mx.float16, 80, 48, group=5, n=3, interleaved=True),
    "bfloat16, learned sinks, softcap": Case(
        RING, mx.bfloat16, 256, n=2, learned=True, softcap=30.0, splits=2
    ),
    "float32, learned sinks at once": Case(RING, mx.float32, 96, learned=True, rotated=32),
}

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="there is no nvcc on this machine")


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with CUDA, as the library sees it."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx.fast, "cuda_kernel", CudaKernel)
    kernel.forget()
    yield
    kernel.forget()


def texts(case: Case) -> list[str]:
    """What a call would compile."""
    run(case)
    passes = [kernel._pass_1(), kernel._pass_2()]
    assert all(isinstance(built, CudaKernel) for built in passes)
    return [text for built in passes for text in built.texts]


@needs_nvcc
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_compiles(case: Case, tmp_path: Path):
    made = texts(case)
    assert len(made) == (1 if case.splits == 1 else 2)
    for text in made:
        assert said_of(text, tmp_path) == ""


@needs_nvcc
@pytest.mark.parametrize("bits", [(8, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("name", ["float32", "bfloat16, staged tiles"])
def test_a_quantised_ring_compiles(name: str, bits: tuple[int, int], tmp_path: Path):
    packed.forget()
    case = CASES[name]
    packed_case.run(case, packed_case.quantised(case, bits, 32))
    built = packed._pass_1()
    assert isinstance(built, CudaKernel)
    assert [said_of(text, tmp_path) for text in built.texts] == [""]
    packed.forget()


@needs_nvcc
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("__shared__ float given_o", "threadgroup float given_o"),
        ("simd_shuffle_xor(top, bit)", "simd_max(top, bit)"),
        ("k_strides[2]", "k_steps[2]"),
    ],
)
def test_a_mistake_does_not_compile(good: str, bad: str, tmp_path: Path):
    (text,) = texts(CASES["float32"])
    assert good in text
    assert "error" in said_of(text.replace(good, bad), tmp_path)


def test_same_text_without_the_words_for_address_spaces():
    """Every one is gone, and shared variables are shared: all that differs from Metal's text."""
    for name in {*kernel.TEXTS, *packed.TEXTS}:
        made = source.for_cuda(source.text(name))
        assert not re.search(r"\b(device|constant|threadgroup|thread)\b", made)
        back = made.replace("__shared__ ", "")
        words = re.sub(r"\b(?:device|constant|threadgroup|thread)\s+", "", source.text(name))
        assert back == words
    assert source.for_cuda(source.text("decode")).count("__shared__ ") == 3
    defined = re.findall(r"#define (\w+)", source.cuda_header())
    assert not {"device", "constant", "thread", "threadgroup"} & set(defined)


def test_a_name_tells_the_text(monkeypatch: pytest.MonkeyPatch):
    """MLX keeps compiled CUDA on disk by name alone, for all versions of a text."""
    run(CASES["float32"])
    first = kernel._pass_1()
    kernel.forget()
    text = source.text
    monkeypatch.setattr(source, "text", lambda name: text(name) + "\n")
    run(CASES["float32"])
    again = kernel._pass_1()
    assert isinstance(first, CudaKernel)
    assert isinstance(again, CudaKernel)
    assert first.name != again.name


def test_it_serves_only_where_it_matches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The stand-in gives zeros, as a kernel might that compiles and is wrong."""
    monkeypatch.setattr(source, "device", lambda: mx.Device(mx.cpu))
    monkeypatch.setenv(trust.FOLDER, str(tmp_path))
    monkeypatch.delenv(trust.SWITCH, raising=False)
    check_decode.forget()
    rotation = Rotation([1.0, 0.5, 0.25, 0.1, 1.0, 0.5, 0.25, 0.1])
    layout = layout_of(RING[0], 2)
    q, k = mx.ones((1, 2, 2, 16)), mx.ones((1, 2, RING[0].live + 2, 16))
    with pytest.warns(RuntimeWarning, match="is not used on this machine: its results are off"):
        out = sink_attention(q, k, k, layout=layout, rotation=rotation, scale=0.5)
    assert mx.allclose(out, mx.ones_like(out)), "the plain operations served"
    (kept,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert kept["backend"] == "cuda"
    check_decode.forget()
