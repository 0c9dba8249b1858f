"""`budget`: the window is the largest that fits, and MLX holds no more than that."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from folder import make_folder
from mlx.utils import tree_flatten
from tiny import VOCABULARY, build

from mlx_sink import ConfigError, SinkConfig, attach
from mlx_sink.io.units import parse_bytes
from mlx_sink.measure import budget
from mlx_sink.measure.budget import plan
from mlx_sink.models.attach import make_cache
from mlx_sink.stream.loop import Loop, Sampling


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("2GB", 2 * 10**9),
        ("2 gb", 2 * 10**9),
        ("1.5G", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("16kb", 16_000),
        ("1TB", 10**12),
        ("1000", 1000),
        ("1000B", 1000),
    ],
)
def test_bytes_as_people_write_them(text: str, n: int):
    assert parse_bytes(text) == n


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2XB", "2GBs", "1e9", "0", "nan", "2iB"])
def test_what_is_no_number_of_bytes(text: str):
    with pytest.raises(ConfigError, match="--memory must be bytes"):
        parse_bytes(text)


def peak(model: Any, capacity: int, step: int) -> int:
    """Return the most that MLX held while a long prompt was read and some tokens made."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loop = Loop(model, list(make_cache(model)), key=mx.random.key(0))
    loop.read([n % VOCABULARY for n in range(capacity + 3 * step)], step)
    list(itertools.islice(loop.tokens(Sampling()), 3))
    return mx.get_peak_memory() - before


LONG = {"max_position_embeddings": 100_000}
WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "head_dim": 32}


@pytest.mark.parametrize(
    ("family", "limit", "step", "options"),
    [
        ("llama", 1_000_000, 64, {}),
        ("llama", 9_000_000, 2048, {}),
        ("llama", 20_000_000, 512, {}),
        ("gemma", 8_000_000, 512, {}),
        ("qwen3", 60_000_000, 256, WIDE),
        ("phi3", 5_000_000, 512, {}),
        ("mixtral", 12_000_000, 512, {}),
    ],
)
def test_mlx_holds_no_more_than_planned(
    family: str, limit: int, step: int, options: dict[str, Any]
):
    """And not much less either: the budget is used."""
    model = build(family, layers=3, **LONG, **options)
    planned = plan(model, limit, prefill_step_size=step)
    assert planned.config.window > 20
    assert planned.total <= limit
    held = peak(model, planned.config.capacity, step) + planned.weights
    assert limit / 4 < held <= planned.total
    assert planned.report.nbytes == sum(c.nbytes for c in filled(model)) == planned.cache


def filled(model: Any) -> list[Any]:
    caches = make_cache(model)
    tokens = mx.zeros((1, caches[0].ring.capacity), mx.int32)
    mx.eval(model(tokens, cache=caches))
    return caches


def test_the_window_is_the_largest_that_fits():
    model = build("llama", layers=2, **LONG)
    found = plan(model, 3_000_000, SinkConfig(6, 1), prefill_step_size=64)
    assert found.config.num_sinks == 6
    assert model.make_cache.config == found.config
    window = found.config.window
    assert budget.check(model, 3_000_000, SinkConfig(6, window), 64).total == found.total
    with pytest.raises(ConfigError, match=f"not enough for a window of {window + 1}"):
        budget.check(model, 3_000_000, SinkConfig(6, window + 1), 64)


def test_more_sequences_get_a_smaller_window():
    model = build("llama", layers=2, **LONG)
    one, four = (plan(model, 6_000_000, batch=n, prefill_step_size=64) for n in (1, 4))
    assert four.cache == 4 * four.report.nbytes
    assert four.config.window < one.config.window / 3
    assert one.config.window < four.config.window * 6


def test_what_is_planned_follows_the_model():
    """Weights as they are, quantised or not, and the cache in the type of the activations."""
    model = build("llama", layers=2, **LONG, hidden_size=64)
    full = plan(model, 10_000_000, prefill_step_size=64)
    assert full.weights == sum(w.nbytes for _, w in tree_flatten(model.parameters()))
    model.set_dtype(mx.bfloat16)
    half = plan(model, 10_000_000, prefill_step_size=64)
    assert half.weights * 2 == full.weights
    assert half.report.layers[0].bytes_per_token * 2 == full.report.layers[0].bytes_per_token
    assert half.config.window > full.config.window


def test_never_beyond_what_the_model_was_trained_on():
    model = build("llama", layers=1, max_position_embeddings=512)
    assert plan(model, 10**9).config == SinkConfig(4, 508)
    # Some models do not keep it, and config.json says it.
    model = build("llama", layers=1, max_position_embeddings=None)
    assert plan(model, 10**9, context=256).config == SinkConfig(4, 252)


def test_too_little_says_what_would_do():
    model = build("llama", layers=2, **LONG)
    with pytest.raises(ConfigError) as caught:
        plan(model, 50_000)
    line = str(caught.value)
    assert "\n" not in line
    assert "50.00 kB does not hold this model" in line
    assert "holds a window of 1 (weights" in line
    assert "one of 1024" in line


def test_no_more_than_the_device_recommends(monkeypatch: pytest.MonkeyPatch):
    model = build("llama", layers=1)
    monkeypatch.setattr(budget, "_recommended", lambda: 2_000_000_000)
    with pytest.raises(ConfigError, match=r"64\.00 GB is more than .* at most 2\.00 GB"):
        plan(model, 64 * 10**9)
    assert plan(model, 2_000_000_000).config.window == 508


def test_the_recommendation_is_read_where_there_is_metal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    sizes = {"max_recommended_working_set_size": 12_345, "memory_size": 20_000}
    monkeypatch.setattr(mx, "device_info", lambda: sizes)
    assert budget._recommended() == 12_345
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert budget._recommended() is None


def test_the_plan_shows_layers_and_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from mlx_sink.commands.generate.command import main

    folder = make_folder(tmp_path / "m")
    argv = ["--model", str(folder), "-p", "the cat", "-m", "2", "--memory", "4MB"]
    argv += ["--prefill-step-size", "64"]
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert "bytes/token" in said
    assert "weights" in said
    assert "of 4.00 MB" in said
    assert main([*argv, "--json"]) == 0
    memory = json.loads(capsys.readouterr().err)["memory"]
    assert memory["total"] == sum(memory[name] for name in ("weights", "cache", "workspace"))
    report = attach(mlx_lm.load(str(folder))[0], SinkConfig(4, 60))
    assert memory["report"] == report.to_dict()
