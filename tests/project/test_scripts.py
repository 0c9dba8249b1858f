"""The measuring scripts, run on tiny models: their JSON has its shape, their figures are real."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folder import make_folder
from mlx.utils import tree_flatten

from mlx_sink.attention.kernels import source

TEXT = "the cat and the dog went to the sea and the cat sat down. " * 40
SMALL = shlex.split("""
    --layers 2 --hidden 32 --intermediate 48 --heads 4 --kv-heads 2 --head-dim 8 --vocab 64
    --windows 8 24 --window 16 --steps 3 --warmup 1 --prefill 48 --chunk 16 --rounds 2
    --reading 80 --chunks 8 32
""")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def numbers(value: Any) -> Iterator[float]:
    """Yield every number in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def test_bench_measures_every_section(capsys: pytest.CaptureFixture[str]):
    import bench_stream

    assert bench_stream.main(SMALL) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    sections = {"position", "decode", "prefill", "reading", "bytes"}
    assert {"machine", "options", *sections} == result.keys()
    assert all(map(math.isfinite, numbers(result)))
    assert [row["window"] for row in result["decode"]] == [8, 24]
    assert [(row["chunk"], row["rounds"]) for row in result["reading"]] == [(8, 7), (32, 1)]
    pairs = [*result["decode"], result["prefill"]["attention"], result["prefill"]["model"]]
    pairs += result["reading"]
    assert all(pair["ours_ms"] > 0 and pair["speedup"] > 0 for pair in pairs)
    for name in ("one_epoch", "two_epochs"):
        assert result["position"][name]["late_over_early"] > 0
        assert 999_900 < result["position"][name]["position"] <= 1_000_000
    assert result["bytes"]["equal"] is True


def test_moved_rings_stand_where_decoding_would_leave_them():
    """Late positions are injected; the slots must be those of the real stream."""
    from bench_stream import move

    from mlx_sink import SinkCache, SinkConfig
    from mlx_sink.attention.ring import Ring
    from mlx_sink.attention.rope import Rotation

    cache = SinkCache(SinkConfig(3, 5, epoch=20), Rotation([]))
    ring = Ring.from_config(SinkConfig(3, 5, epoch=20))
    for _ in range(11):
        ring = ring.advanced(1)
    cache.ring, late = ring, ring
    while late.tokens < 221:
        late = late.advanced(1)
    assert move([cache], 225, late.position) == 221
    assert cache.ring == late
    assert cache.ring.slot(220) == ring.slot(10)


def test_eval_measures_every_arm(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import eval_stream

    figures, picture = tmp_path / "out.json", tmp_path / "out.png"
    sizes = shlex.split("--tokens 48 --streams 2 --num-sinks 2 --window 6 --chunk 16 --every 5")
    outputs = ["--json", str(figures), "--plot", str(picture), "--edges", "16", "32"]
    status = eval_stream.main(
        ["--model", str(model), "--text", str(text), "--full-tokens", "32", *sizes, *outputs]
    )
    assert status == 0
    table = capsys.readouterr().out
    assert all(row in table for row in ("0-16", "16-32", "32-48", "ratio"))
    result = json.loads(figures.read_text())
    assert all(map(math.isfinite, numbers(result)))
    arms = result["arms"]
    assert {name: arm["count"] for name, arm in arms.items()} == {
        "full": 64,
        "rotating": 96,
        "window": 96,
        "recompute": 18,
        "ours": 96,
    }
    for arm in arms.values():
        assert arm["perplexity"] == pytest.approx(math.exp(arm["loss"]))
        assert sum(bucket["count"] for bucket in arm["buckets"]) == arm["count"]
    assert result["same_tokens"]["ratio"] == pytest.approx(1, abs=0.2)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_before_eviction_every_arm_says_the_same(model: Path, text: Path, tmp_path: Path):
    import eval_stream

    figures = tmp_path / "out.json"
    sizes = shlex.split("--tokens 24 --streams 3 --window 20 --every 1 --dtype float32")
    arguments = ["--model", str(model), "--text", str(text), "--json", str(figures), *sizes]
    assert eval_stream.main(arguments) == 0
    losses = [arm["loss"] for arm in json.loads(figures.read_text())["arms"].values()]
    assert losses == pytest.approx([losses[0]] * 5, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (["--tokens", "100000"], "tokens for each of 1 streams, not 100000"),
        (["--window", "100"], "more than the 64 tokens"),
        (["--text", "missing.txt"], "No such file"),
        (["--model", "missing-model/"], "missing-model"),
    ],
)
def test_eval_says_in_a_line_what_is_wrong(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str], change: list[str], reason: str
):
    import eval_stream

    arguments = ["--model", str(model), "--text", str(text), "--window", "8", *change]
    assert eval_stream.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert reason in error


@pytest.mark.parametrize(("layers", "start"), [(1, 0), (3, (1 << 31) + 1)])
def test_soak_goes_on_and_drifts_nowhere(
    layers: int, start: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A short form of it, stopped half-way; times are printed, not judged."""
    import soak

    figures = tmp_path / "soak.json"
    argv = ["--layers", str(layers), "--start", str(start), "--state", str(tmp_path / "state")]
    argv += shlex.split("--bucket 3000 --read 480 --make 16 --pair-every 3 --window 20")
    assert soak.main([*argv, "--tokens", "6000"]) == 0
    capsys.readouterr()
    assert soak.main([*argv, "--tokens", "15000", "--json", str(figures)]) == 0
    table = capsys.readouterr().out.splitlines()
    result = json.loads(figures.read_text())
    rows = result["rows"]
    assert len(rows) == 5 == len(table) - 3
    assert rows[-1]["to"] - start > 15_000
    assert [row["run"] for row in rows] == [1, 1, 2, 2, 2]
    assert 0 < max(row["drift"] for row in rows) < 1e-3
    active = [row["active_mb"] for row in rows]
    assert max(active) - min(active) < 0.1
    assert set(result["slopes_percent"]) == set(soak.COLUMNS) - {"drift"}


def test_soak_refuses_other_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import soak

    argv = shlex.split(f"--layers 1 --bucket 100 --read 60 --make 8 --state {tmp_path}")
    assert soak.main([*argv, "--tokens", "100"]) == 0
    assert soak.main([*argv, "--tokens", "200", "--window", "30"]) == 2
    assert "other" in capsys.readouterr().err.splitlines()[-1]


def test_the_float64_oracle_is_mlx_lm_s_model_before_the_wrap():
    """And past it, for one layer, what plain mlx-lm says of the visible tokens alone."""
    import _oracle
    import soak

    model = soak.random_llama(3, 50, 1)
    weights = {k: np.array(v, np.float64) for k, v in tree_flatten(model.parameters())}
    tokens = np.random.default_rng(0).integers(0, 50, 40).tolist()

    def mlx_lm_s(model: Any, tokens: list[int]) -> np.ndarray:
        logits = np.array(model(mx.array([tokens]))[0, -1], np.float64)
        return logits - np.log(np.exp(logits).sum())

    exact = _oracle.logprobs(weights, model.args, tokens[:4], tokens, 40, 60)
    np.testing.assert_allclose(exact, mlx_lm_s(model, tokens), atol=1e-4)
    one = soak.random_llama(1, 50, 2)
    weights = {k: np.array(v, np.float64) for k, v in tree_flatten(one.parameters())}
    exact = _oracle.logprobs(weights, one.args, tokens[:4], tokens[-9:], 40, 9)
    np.testing.assert_allclose(exact, mlx_lm_s(one, tokens[:4] + tokens[-9:]), atol=1e-4)
    other = _oracle.logprobs(weights, one.args, tokens[:4], tokens[-9:], 40, 8)
    assert np.abs(other - exact).max() > 1e-2


def test_measure_counts_and_times(capsys: pytest.CaptureFixture[str]):
    import measure_kernel

    assert measure_kernel.main(["--shapes", "2", "--calls", "20", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert all(map(math.isfinite, numbers(result)))
    for row in result["counts"]:
        assert row["ours"]["kv_loaded_over_minimum"] <= 1.02
        assert row["mlx"]["kv_loaded_over_minimum"] == pytest.approx(row["group"] * row["n"])
        # A sum for each key, and what joins the simdgroups.
        assert 5 < row["mlx"]["shuffles_a_key_and_row"] < 7
    assert [row["bytes_stored"] for row in result["counts"]] == [[528, 128], [4224, 1024]]
    assert len(result["python_us"]) == 4
    assert measure_kernel.main(["--shapes", "1", "--calls", "1"]) == 0
    assert "1.000 (1.000)" in capsys.readouterr().out


def test_measured_beside_mlx_text_that_is_right():
    """What is counted is MLX's attention: its results say so."""
    import _mlx_sdpa

    q, k, v = (
        mx.random.normal(shape, key=mx.random.key(i))
        for i, shape in enumerate([(1, 4, 2, 64), (1, 1, 70, 64), (1, 1, 70, 64)])
    )
    ran = _mlx_sdpa.run(q, k, v)
    assert ran is not None
    wanted = mx.fast.scaled_dot_product_attention(q, k, v, scale=64**-0.5)
    assert mx.allclose(ran[0], wanted, atol=1e-5)


def test_sweep_reports_what_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import sweep_kernel

    assert sweep_kernel.main(["--calls", "2"]) == 0
    assert capsys.readouterr().out.endswith("0 failed\n")
    text = source.text
    monkeypatch.setattr(source, "text", lambda name: text(name).replace("* fade +", "+"))
    assert sweep_kernel.main(["--calls", "2"]) == 1
    assert "off by" in capsys.readouterr().out


def test_bench_convert_measures_every_converter(capsys: pytest.CaptureFixture[str]):
    """Its code for a process of its own is a text, which no linter reads."""
    import bench_convert

    argv = ["--megabytes", "1", "--shard-megabytes", "1", "--rounds", "1"]
    assert bench_convert.main(argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["runs"]) == {"lazy", "mlx_lm", "synced", "ours"}
    assert all(run["seconds"] > 0 for runs in result["runs"].values() for run in runs)
    assert all(map(math.isfinite, numbers(result)))
