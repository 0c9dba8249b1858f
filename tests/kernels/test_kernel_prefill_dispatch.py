"""When the prefill kernel serves: where it is right and faster. What whole streams get from it.

The machine pretends to have Metal, with the runner in the place of MLX's compiler.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host_metal
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from brute_force import Extras, Heads, Stream, attended, brute_force
from folder import make_folder

import mlx_sink
from mlx_sink import SinkConfig
from mlx_sink.attention import dispatch as attention
from mlx_sink.attention import reference
from mlx_sink.attention.dispatch import sink_attention
from mlx_sink.attention.kernels import check_decode, check_prefill, source, trust
from mlx_sink.attention.layout import layout_of
from mlx_sink.attention.ring import Ring
from mlx_sink.attention.rope import Rotation
from mlx_sink.errors import KernelError

ROPE = nn.RoPE(16, base=100.0)
FREQUENCIES = 100.0 ** -(np.arange(0, 16, 2) / 16)
RING = Ring(num_sinks=2, window=9, epoch=20, tokens=65, start=60, previous=40)
NAME = "prefill-float32-d16-rope16-halves"


def forget() -> None:
    check_decode.forget()
    check_prefill.forget()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing settled before, and verdicts kept in a folder of the test's own."""
    monkeypatch.delenv(trust.SWITCH, raising=False)
    monkeypatch.setenv(trust.FOLDER, str(tmp_path / "verdicts"))
    forget()
    yield
    forget()


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with Metal, whose GPU is the runner."""
    monkeypatch.setattr(mx.fast, "metal_kernel", host_metal.metal_kernel)
    monkeypatch.setattr(source, "backend", lambda: "metal")
    monkeypatch.setattr(source, "device", lambda: mx.Device(mx.cpu))


@pytest.fixture
def fast(metal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which the kernel is faster: the runner never is."""
    monkeypatch.setattr(check_prefill, "speedup", lambda spec: 2.5)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that the kernel served in attention."""
    served: list[tuple[int, ...]] = []
    prefill = attention.prefill

    def counted(queries: mx.array, *rest: Any, **options: Any) -> mx.array:
        served.append(tuple(queries.shape))
        return prefill(queries, *rest, **options)

    monkeypatch.setattr(attention, "prefill", counted)
    return served


def attend(
    n: int = 40, head_dim: int = 16, ring: Ring = RING, start: int = 0, **options: Any
) -> np.ndarray:
    """One call on a ring that needs both kinds of turns."""
    layout = layout_of(ring, n)
    rows = sum(run.length for run in layout.runs)
    q, k, v = (
        mx.random.normal((1, heads, length, head_dim), key=mx.random.key(length))
        for heads, length in ((4, n), (2, rows), (2, rows + 1))
    )
    rotation = Rotation(FREQUENCIES, start=start)
    out = sink_attention(
        *(q, k, v[:, :, 1:]), layout=layout, rotation=rotation, scale=0.5, **options
    )
    return np.array(out)


def by_ops(**options: Any) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(trust.SWITCH, "off")
        forget()
        out = attend(**options)
    forget()
    return out


def verdicts() -> dict[str, dict[str, Any]]:
    kept = [json.loads(path.read_text()) for path in trust.folder().glob("*.json")]
    return {verdict["kernel"]: verdict for verdict in kept}


@pytest.mark.usefixtures("fast")
def test_chunks_go_to_the_kernel_once_checked(launches: list[tuple[int, ...]]):
    wanted = by_ops()
    assert not launches
    np.testing.assert_allclose(attend(), wanted, atol=2e-6)
    assert launches == [(1, 4, 40, 16)]
    kept = verdicts()[NAME]
    assert kept["passed"]
    assert kept["error"] < 2e-6
    assert kept["speedup"] == 2.5
    attend(n=9)
    assert launches[1:] == [(1, 4, 9, 16)]
    attend(n=8)
    attend(head_dim=24)
    assert len(launches) == 2, "few tokens, and heads that 16 does not divide, are not for it"


def test_not_without_metal(launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch):
    """Nor with CUDA, which has no 8x8 fragments."""
    attend()
    monkeypatch.setattr(source, "backend", lambda: "cuda")
    monkeypatch.setattr(source, "device", lambda: mx.Device(mx.cpu))
    forget()
    attend()
    assert not launches
    assert not trust.folder().exists()


@pytest.mark.usefixtures("fast")
def test_not_what_its_text_does_not_know(launches: list[tuple[int, ...]]):
    """Chunked attention, and heads that do not begin with the rotated dimensions."""
    attend(ring=Ring(0, 9, 20, tokens=65, start=60, previous=40, chunked=True))
    attend(head_dim=32, start=16)
    assert not launches


@pytest.mark.usefixtures("metal")
def test_a_slower_kernel_does_not_serve(
    launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    """It is no mistake, so there is no warning; the verdict says how fast it was."""
    wanted = by_ops()
    monkeypatch.setattr(check_prefill, "speedup", lambda spec: 0.8)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(attend(), wanted)
        forget()
    assert not launches
    assert verdicts()[NAME]["speedup"] == 0.8
    monkeypatch.setenv(trust.SWITCH, "on")
    np.testing.assert_allclose(attend(), wanted, atol=2e-6)
    assert len(launches) == 1, "`on` asks for the kernel, whatever its speed"


@pytest.mark.usefixtures("metal")
def test_the_kernel_is_timed(launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch):
    """Both sides run, and what was measured decides."""
    small = Ring(num_sinks=4, window=20, epoch=40, tokens=90, start=80, previous=40)
    monkeypatch.setattr(check_prefill, "TIMED_RING", small)
    monkeypatch.setattr(check_prefill, "TIMED_CHUNK", 16)
    ran: list[str] = []
    for module, name in ((check_prefill.prefill, "prefill"), (reference, "attend")):
        whole = getattr(module, name)

        def noted(*given: Any, name: str = name, whole: Any = whole, **options: Any) -> mx.array:
            ran.append(name)
            return whole(*given, **options)

        monkeypatch.setattr(module, name, noted)
    attend()
    measured = verdicts()[NAME]["speedup"]
    assert measured > 0
    assert (len(launches) == 1) == (measured > 1)
    # One of each for the check, and one of each for the warm-up and every round.
    assert ran.count("prefill") == 1 + check_prefill.ROUNDS + 1
    assert ran.count("attend") >= 2 + check_prefill.ROUNDS + 1


MISTAKES = {
    "evicted keys seen": ("token > query - sight.reach);", "true);"),
    "an edge tile taken for full": (
        "const bool full = at >=",
        "const bool full = n == BK || at >=",
    ),
    "turn of another query": ("1 + tile * BQ + row", "1 + row"),
    "learned sink of another head": ("learned[h]", "learned[0]"),
    "softcap not scaled back": ("x = cap * precise::tanh(x)", "x = precise::tanh(x)"),
    "does not compile": ("sums.m = top;", "sums.m = topp;"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "learned sink of another head": {"learned_sinks": mx.array([1.0, 4.0, -1.0, 2.0])},
    "softcap not scaled back": {"softcap": 1.5},
}


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_kernel_does_not_serve(
    mistake: str, launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    """One warning a process, whether the verdict is new or kept, and the ops serve."""
    good, bad = MISTAKES[mistake]
    options = OPTIONS.get(mistake, {})
    wanted = by_ops(**options)
    text = source.text
    assert sum(good in text(name) for name in ("prefill", "prefill_common")) == 1

    class Refusing(host_metal.HostKernel):
        def __call__(self, **launch: Any) -> list[mx.array]:
            try:
                return super().__call__(**launch)
            except host_metal.KernelError as error:
                raise RuntimeError(str(error)) from error

    monkeypatch.setattr(mx.fast, "metal_kernel", Refusing)
    monkeypatch.setattr(source, "text", lambda name: text(name).replace(good, bad))
    reason = "it failed to run" if "compile" in mistake else "its results are off by"
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                np.testing.assert_array_equal(attend(**options), wanted)
        (warning,) = said
        assert f"{NAME}" in str(warning.message)
        assert reason in str(warning.message)
        forget()
    assert not launches
    monkeypatch.setenv(trust.SWITCH, "on")
    with pytest.raises(KernelError, match=reason):
        attend(**options)


@pytest.mark.usefixtures("fast")
def test_before_the_wrap_the_fused_attention_serves(
    launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    """Blocks that need no turn are MLX's; the others of the call go to the kernel together."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    ring = Ring(num_sinks=2, window=9, epoch=20)
    wanted = by_ops(ring=ring, n=30)
    np.testing.assert_allclose(attend(ring=ring, n=30), wanted, atol=2e-6)
    assert launches == [(1, 4, 22, 16)]
    attend(ring=ring, n=11)
    assert len(launches) == 1, "the context is just full"
    attend(ring=ring, n=12)
    assert launches[1:] == [(1, 4, 4, 16)]


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("extras", [None, Extras(2.0, (1.0, -2.0, 0.5, 3.0))], ids=["-", "all"])
def test_streams_do_not_depend_on_their_chunks(
    launches: list[tuple[int, ...]], extras: Extras | None
):
    """Chunks of 9 to three windows, alone and between decode steps, against float64."""
    config, stream = SinkConfig(3, 30, epoch=41), Stream.random(Heads(4, 2, 16, 16), 200)
    exact = brute_force(stream, config, ROPE, 0.5, extras)
    cuts = {
        "alone": [90, 90, 20],
        "growing": [9, 17, 31, 33, 34, 41],
        "after decode steps": [*[1] * 35, 9, 1, 30, 1, 1, 40],
        "mixed": itertools.chain.from_iterable([[1, 9, 1, 23]] * 9),
    }
    for name, lengths in cuts.items():
        launches.clear()
        out = attended(stream, config, ROPE, lengths, 0.5, extras)
        assert np.abs(out - exact).max() <= 1e-5, name
        assert launches, name


@pytest.mark.usefixtures("fast")
def test_same_tokens_as_the_ops(
    launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Greedy tokens after a prompt longer than the window."""
    folder = make_folder(tmp_path / "model", head_dim=16)
    model, tokenizer = mlx_sink.load(folder, SinkConfig(2, 12, epoch=20))
    prompt = "the cat and the dog went to the sea and the cat sat down. " * 4
    outcomes: list[list[int]] = []
    for mode in ("off", "on"):
        monkeypatch.setenv(trust.SWITCH, mode)
        forget()
        assert not launches
        stream = mlx_sink.stream_generate(model, tokenizer, prompt, 12, ignore_eos=True)
        outcomes.append([response.token for response in stream])
    assert outcomes[0] == outcomes[1]
    assert launches
