"""When the kernel serves, and when it does not: the switch, the self-check, what is kept of it.

The machine pretends to have Metal, with the runner in the place of MLX's compiler.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host_metal
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from folder import make_folder

import mlx_sink
from mlx_sink import SinkConfig
from mlx_sink.attention import dispatch as attention
from mlx_sink.attention.dispatch import sink_attention
from mlx_sink.attention.kernels import check_decode, check_prefill, source, trust
from mlx_sink.attention.kernels import decode as kernel
from mlx_sink.attention.layout import layout_of
from mlx_sink.attention.packed import packed
from mlx_sink.attention.ring import Ring
from mlx_sink.attention.rope import Rotation
from mlx_sink.commands.generate.command import main
from mlx_sink.errors import ConfigError, KernelError
from mlx_sink.models.trace import rope_call

ROTATION = Rotation.of(rope_call(nn.RoPE(16, base=100.0), 16))
RING = Ring(num_sinks=2, window=9, epoch=20, tokens=65, start=60, previous=40)


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


class Runner(host_metal.HostKernel):
    """The runner, whose refusals look like those of MLX."""

    def __call__(self, **launch: Any) -> list[mx.array]:
        try:
            return super().__call__(**launch)
        except host_metal.KernelError as error:
            raise RuntimeError(
                f"[metal::Device] Unable to build metal library\n{error}"
            ) from error


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with Metal, whose GPU is the runner, and on which the prefill kernel is slow."""
    monkeypatch.setattr(mx.fast, "metal_kernel", Runner)
    monkeypatch.setattr(check_prefill, "speedup", lambda spec: 0.5)
    monkeypatch.setattr(source, "backend", lambda: "metal")
    monkeypatch.setattr(source, "device", lambda: mx.Device(mx.cpu))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that the kernel served in attention."""
    served: list[tuple[int, ...]] = []
    decode = attention.decode

    def counted(queries: mx.array, *rest: Any, **options: Any) -> mx.array:
        served.append(tuple(queries.shape))
        return decode(queries, *rest, **options)

    monkeypatch.setattr(attention, "decode", counted)
    return served


def plant(monkeypatch: pytest.MonkeyPatch, good: str, bad: str) -> None:
    """Put a mistake into the kernel's text."""
    text = source.text

    def planted(name: str) -> str:
        return text(name).replace(good, bad)

    assert any(good in text(name) for name in ("decode", "decode_common"))
    monkeypatch.setattr(source, "text", planted)


def attend(
    n: int = 1,
    head_dim: int = 16,
    dtype: mx.Dtype = mx.float32,
    **options: Any,
) -> np.ndarray:
    """One call on a ring that needs both kinds of turns."""
    layout = layout_of(RING, n)
    rows = sum(run.length for run in layout.runs)
    q, k, v = (
        mx.random.normal((1, heads, length, head_dim), key=mx.random.key(length)).astype(dtype)
        for heads, length in ((4, n), (2, rows), (2, rows + 1))
    )
    # A rotation of its own: what one remembers for a layout is for one head_dim.
    rotation = Rotation(ROTATION.frequencies)
    out = sink_attention(
        *(q, k, v[:, :, 1:]), layout=layout, rotation=rotation, scale=0.5, **options
    )
    return np.array(out.astype(mx.float32))


def verdicts() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in trust.folder().glob("*.json")]


def test_without_metal_nothing_changes(launches: list[tuple[int, ...]]):
    attend()
    assert not launches
    assert not trust.folder().exists()


@pytest.mark.usefixtures("metal")
def test_decode_steps_go_to_the_kernel_once_checked(launches: list[tuple[int, ...]]):
    out = attend()
    assert launches == [(1, 4, 1, 16)]
    (kept,) = verdicts()
    assert kept["kernel"] == "decode-float32-d16-gqa2-n1-rope16-halves"
    assert kept["passed"]
    assert kept["error"] < 2e-6
    assert attend(head_dim=24).shape == (1, 4, 1, 24)
    assert attend(n=9).shape == (1, 4, 9, 16)
    assert len(launches) == 1, "chunks, and heads that 16 does not divide, are served by ops"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(trust.SWITCH, "off")
        check_decode.forget()
        np.testing.assert_allclose(out, attend(), atol=1e-6)
    assert len(launches) == 1


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("n", range(2, 9))
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}], ids=["plain", "softcap"])
def test_a_few_new_tokens_go_to_the_kernel(
    n: int,
    options: dict[str, Any],
    launches: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
):
    """Each number of tokens under a verdict of its own; the ops say what it must give."""
    wanted = _ops(monkeypatch, n=n, **options)
    assert not launches
    np.testing.assert_allclose(attend(n, **options), wanted, atol=2e-6)
    assert launches == [(1, 4, n, 16)]
    (kept,) = verdicts()
    assert f"-n{n}-" in kept["kernel"]


@pytest.mark.usefixtures("metal")
def test_the_end_of_a_chunk_is_not_a_decode_step(
    launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    """Blocks of a chunk that are small by chance would each ask for a kernel of their own."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    attend(n=9)
    assert not launches
    attend(n=7)
    assert launches == [(1, 4, 4, 16), (1, 4, 3, 16)]


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(("n", "most"), [(1, 1), (3, 2)])
def test_keys_in_too_many_ranges_go_to_the_ops(
    n: int, most: int, launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    """By rule, not by the launcher's error."""
    wanted = _ops(monkeypatch, n=n)
    monkeypatch.setattr(kernel, "MAX_RANGES", most)
    np.testing.assert_array_equal(attend(n), wanted)
    assert not launches


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(
    ("good", "bad"),
    [("token > query - sight.reach", "true"), ("token <= query", "true"),
     ("* L + row % L) * DIMS", "* L + 0) * DIMS")],
    ids=["evicted keys seen", "later keys seen", "turn of another query"],
)  # fmt: skip
def test_mistakes_that_only_several_tokens_show(
    good: str, bad: str, launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    plant(monkeypatch, good, bad)
    attend(1)
    assert len(launches) == 1, "a single token sees all that is in its ranges"
    with pytest.warns(RuntimeWarning, match="n3.* is not used .*its results are off by"):
        attend(3)
    assert len(launches) == 1


@pytest.mark.usefixtures("metal")
def test_a_verdict_is_kept_for_its_text(monkeypatch: pytest.MonkeyPatch):
    checked: list[str] = []
    check = check_decode.check

    def counted(spec: check_decode.DecodeVariant) -> trust.Verdict:
        checked.append(spec.name)
        return check(spec)

    monkeypatch.setattr(check_decode, "check", counted)
    for times in (1, 1):
        attend()
        check_decode.forget()
        assert len(checked) == times
    (path,) = trust.folder().glob("*")
    path.write_text("{")
    attend()
    assert len(checked) == 2, "a damaged file is as good as none"
    assert verdicts()[0]["passed"]
    check_decode.forget()
    monkeypatch.setattr(source, "stamp", lambda *names: "another text")
    attend()
    assert len(checked) == 3
    assert len(verdicts()) == 2


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        ("second ? sine : -sine", "second ? -sine : sine", "its results are off by"),
        ("rows.m[r] = top;", "rows.m[r] = topp;", "it failed to run"),
    ],
)
def test_a_kernel_that_fails_its_check_does_not_serve(
    good: str,
    bad: str,
    reason: str,
    launches: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
):
    """One warning a process, whether the verdict is new or kept, and the ops serve."""
    wanted = _ops(monkeypatch)
    plant(monkeypatch, good, bad)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            np.testing.assert_array_equal(attend(), wanted)
            np.testing.assert_array_equal(attend(), wanted)
        assert len(said) == 1
        assert re.search(f"gqa2.* is not used .*{reason}.*doctor", str(said[0].message))
        check_decode.forget()
    assert not launches
    (kept,) = verdicts()
    assert not kept["passed"]
    monkeypatch.setenv(trust.SWITCH, "on")
    with pytest.raises(KernelError, match=reason):
        attend()


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("wrong_splits", [1, 3])
def test_a_kernel_that_gives_nan_does_not_serve(
    wrong_splits: int, launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
):
    """NaN compares false with every tolerance; one of the two launches is enough."""
    wanted = _ops(monkeypatch)
    decode = kernel.decode

    def broken(*arrays: Any, splits: int, **options: Any) -> mx.array:
        out = decode(*arrays, splits=splits, **options)
        return mx.where(out == out.max(), mx.nan, out) if splits == wrong_splits else out

    monkeypatch.setattr(kernel, "decode", broken)
    with pytest.warns(RuntimeWarning, match="its results are not finite"):
        np.testing.assert_array_equal(attend(), wanted)
    assert not launches
    (kept,) = verdicts()
    assert kept["error"] is None


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(
    ("name", "value", "good", "bad"),
    [
        ("softcap", 1.5, "cap * precise::tanh(score)", "precise::tanh(score)"),
        ("learned", mx.array([1.0, 4.0, -1.0, 2.0]), "logit * M_LOG2E_F", "logit"),
    ],
)
def test_softcap_and_learned_sinks_are_checked_for_themselves(
    name: str,
    value: object,
    good: str,
    bad: str,
    launches: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
):
    """A kernel that is right without them may be wrong with them."""
    options: dict[str, Any] = {"softcap" if name == "softcap" else "learned_sinks": value}
    wanted = _ops(monkeypatch, **options)
    np.testing.assert_allclose(attend(**options), wanted, atol=2e-6)
    assert len(launches) == 1
    (kept,) = verdicts()
    assert kept["kernel"] == f"decode-float32-d16-gqa2-n1-rope16-halves-{name}"
    plant(monkeypatch, good, bad)
    check_decode.forget()
    attend()
    assert len(launches) == 2
    with pytest.warns(RuntimeWarning, match=f"{name} is not used .*its results are off by"):
        np.testing.assert_array_equal(attend(**options), wanted)
    assert len(launches) == 2


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize("n", [1, 3])
def test_a_quantised_ring_goes_to_its_own_kernel(n: int, monkeypatch: pytest.MonkeyPatch):
    """Under a verdict of its own; the ops, on the expanded rows, say what it must give."""
    layout, rotation = layout_of(RING, n), Rotation.of(rope_call(nn.RoPE(32, base=100.0), 32))
    rows = sum(run.length for run in layout.runs)
    q, k, v = (
        mx.random.normal((1, heads, length, 32), key=mx.random.key(length + heads))
        for heads, length in ((4, n), (2, rows), (2, rows))
    )
    held = packed(k, RING.num_sinks, 8, 32), packed(v, RING.num_sinks, 4, 32)
    options: dict[str, Any] = {"layout": layout, "rotation": rotation, "scale": 0.5}

    def attend_packed() -> np.ndarray:
        return np.array(sink_attention(q, *(x.expanded() for x in held), packed=held, **options))

    with monkeypatch.context() as patch:
        patch.setenv(trust.SWITCH, "off")
        check_decode.forget()
        wanted = attend_packed()
    check_decode.forget()
    served: list[int] = []
    decode_packed = attention.decode_packed

    def counted(queries: mx.array, *rest: Any, **given: Any) -> mx.array:
        served.append(queries.shape[2])
        return decode_packed(queries, *rest, **given)

    monkeypatch.setattr(attention, "decode_packed", counted)
    np.testing.assert_allclose(attend_packed(), wanted, atol=2e-6)
    assert served == [n]
    (kept,) = verdicts()
    assert kept["kernel"] == f"decode-float32-d32-gqa2-n{n}-rope32-halves-k8v4g32"
    assert kept["passed"]
    assert kept["error"] < 2e-6
    text = source.text
    wrong = "(unit >> (j * BITS + 1))"
    monkeypatch.setattr(
        source, "text", lambda name: text(name).replace("(unit >> (j * BITS))", wrong)
    )
    check_decode.forget()
    with pytest.warns(RuntimeWarning, match="k8v4g32 is not used .*its results are off by"):
        # The plain kernel, on the expanded rows, still may.
        np.testing.assert_allclose(attend_packed(), wanted, atol=2e-6)
    assert served == [n]


def _ops(monkeypatch: pytest.MonkeyPatch, **options: Any) -> np.ndarray:
    with monkeypatch.context() as patch:
        patch.setenv(trust.SWITCH, "off")
        check_decode.forget()
        out = attend(**options)
    check_decode.forget()
    return out


def test_on_without_metal_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(trust.SWITCH, "on")
    with pytest.raises(KernelError, match="MLX_SINK_KERNEL is on, but MLX has no Metal"):
        attend()


def test_a_word_that_the_switch_does_not_know(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(trust.SWITCH, "yes")
    with pytest.raises(ConfigError, match="MLX_SINK_KERNEL must be auto, on or off, got 'yes'"):
        attend()


@pytest.mark.usefixtures("metal")
def test_a_folder_that_cannot_be_written_costs_no_more_than_a_check(
    launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(trust.FOLDER, str(tmp_path / "file" / "verdicts"))
    attend()
    assert len(launches) == 1


@pytest.mark.usefixtures("metal")
def test_same_tokens_as_the_ops(
    launches: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """Greedy tokens of a stream that wraps, from the API; and the command's text."""
    folder = make_folder(tmp_path / "model", head_dim=16)
    model, tokenizer = mlx_sink.load(folder, SinkConfig(2, 12, epoch=20))
    command = ["--model", str(folder), "--prompt", "the cat", "--window", "12", "--num-sinks", "2"]
    command += ["--max-tokens", "16", "--temp", "0", "--ignore-eos"]
    outcomes: list[object] = []
    for mode in ("off", "on"):
        monkeypatch.setenv(trust.SWITCH, mode)
        check_decode.forget()
        assert not launches
        stream = mlx_sink.stream_generate(model, tokenizer, "the cat", 36, ignore_eos=True)
        outcomes.append([response.token for response in stream])
        main(command)
        outcomes.append(capsys.readouterr().out)
    assert outcomes[:2] == outcomes[2:]
    assert len(launches) > 2 * 25, "two layers, and all steps after the wrap"
