"""The kernels on this machine's GPU, where it has one: right in every variant that models ask for.

Elsewhere their text runs on the CPU (`test_kernel_*`).
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

import mlx_sink
from mlx_sink import SinkConfig
from mlx_sink.attention.kernels import check_decode, check_prefill, source, trust
from mlx_sink.attention.kernels.check_decode import DecodeVariant
from mlx_sink.attention.kernels.check_prefill import PrefillVariant
from mlx_sink.commands.doctor.models import SHAPES, AttentionShape

pytestmark = pytest.mark.skipif(
    not source.is_available(), reason="MLX has no GPU here that runs the kernels"
)
needs_metal = pytest.mark.skipif(source.backend() != "metal", reason="a kernel for Metal alone")

dtypes = pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.model)


@dtypes
@shapes
@pytest.mark.parametrize("n", [1, 4])
def test_decode(shape: AttentionShape, dtype: mx.Dtype, n: int):
    group, D, learned = shape.n_heads // shape.n_kv_heads, shape.head_dim, shape.learned_sinks
    variant = DecodeVariant(dtype, group, D, D, n, D, False, learned_sinks=learned)
    verdict = check_decode.check(variant)
    assert verdict.passed, verdict.reason


@dtypes
@pytest.mark.parametrize("packed", [(8, 8, 64), (8, 4, 32), (4, 4, 128)], ids=str)
def test_decode_of_a_quantised_ring(dtype: mx.Dtype, packed: tuple[int, int, int]):
    verdict = check_decode.check(DecodeVariant(dtype, 4, 128, 128, 1, 128, False, packed=packed))
    assert verdict.passed, verdict.reason


@dtypes
def test_decode_with_a_softcap_and_partial_rotation(dtype: mx.Dtype):
    verdict = check_decode.check(DecodeVariant(dtype, 2, 96, 96, 1, 48, True, softcap=True))
    assert verdict.passed, verdict.reason


@needs_metal
@dtypes
@shapes
def test_prefill(shape: AttentionShape, dtype: mx.Dtype):
    D, learned = shape.head_dim, shape.learned_sinks
    verdict = check_prefill.check(PrefillVariant(dtype, D, D, D, False, learned_sinks=learned))
    assert verdict.passed, verdict.reason


def test_a_stream_is_served_by_the_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Forced, they serve or raise; the tokens are those of the plain operations."""
    monkeypatch.setenv(trust.FOLDER, str(tmp_path))
    model, tokenizer = mlx_sink.load("demo", SinkConfig(4, 60))
    prompt = "Once upon a time there was a cat. " * 12
    texts: list[str] = []
    for mode in ("on", "off"):
        monkeypatch.setenv(trust.SWITCH, mode)
        check_decode.forget()
        check_prefill.forget()
        texts.append(mlx_sink.generate(model, tokenizer, prompt, max_tokens=40))
    assert texts[0] == texts[1]
    assert list(tmp_path.glob("decode-*.json")), "the kernels have served"
