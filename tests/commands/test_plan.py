"""An estimate from the configuration alone is what `attach` and MLX say of the real model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from every import WINDOW, config, tiny
from every_configs import OVERRIDES
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_sink import ConfigError, ModelError, SinkConfig, UnsupportedModelError, attach
from mlx_sink.commands import plan as command
from mlx_sink.commands.plan import main
from mlx_sink.io.units import parse_tokens, short
from mlx_sink.measure import budget
from mlx_sink.measure.costs import costs_of
from mlx_sink.measure.estimate import chips, estimate, working_set
from mlx_sink.measure.flops import after, per_key, step_of
from mlx_sink.models.lazy import build, weight_bytes

CONFIG = SinkConfig(4, 60)
LENGTHS = [256, 512]

HEADS = {"mha": {"num_key_value_heads": 4}, "gqa": {}, "mqa": {"num_key_value_heads": 1}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("qwen3", options) for name, options in HEADS.items()},
    "hybrid window": ("gpt_oss", {}),
    "hybrid chunks": ("llama4", {}),
    "window and recurrence": ("recurrent_gemma", {}),
    "recurrent": ("mamba2", {}),
    "recurrent and attention": ("qwen3_next", {}),
    "latent": ("deepseek_v3", {}),
    "latent, linear": ("kimi_linear", {}),
    "experts": ("mixtral", {}),
    "lent keys": ("gemma3n", {}),
}


def written(folder: Path, name: str, options: dict[str, Any], **more: Any) -> Path:
    """Write the configuration of a tiny model as a file."""
    path = folder / "config.json"
    fields = config(name, {**OVERRIDES.get(name, {}), **options}) | more
    path.write_text(json.dumps(fields))
    return path


def feed(model: nn.Module, caches: list[Any], tokens: int) -> int:
    """Feed tokens, the last one alone, and return what the caches hold."""
    for n in (tokens - 1, 1):
        mx.eval(model(mx.zeros((1, n), mx.int32), cache=caches))
        mx.eval([cache.state[:2] for cache in caches if not hasattr(cache, "caches")])
    return sum(cache.nbytes for cache in caches)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_attach_and_with_mlx_to_the_byte(case: str, tmp_path: Path):
    name, options = CASES[case]
    path = written(tmp_path, name, options)
    sizes = {"num_sinks": CONFIG.num_sinks, "window": CONFIG.window}
    result = estimate(str(path), **sizes, dtype="float32", lengths=LENGTHS)
    model = tiny(name, **options)
    native = [feed(model, make_prompt_cache(model), n) for n in LENGTHS]
    assert result.weights.nbytes == sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    assert result.report == attach(model, CONFIG)
    ours = [feed(model, model.make_cache(), n) for n in LENGTHS]
    assert list(result.cache_bytes["full"]) == native
    assert list(result.cache_bytes["sinks"]) == ours == [result.report.nbytes] * 2
    attach(model, SinkConfig(0, CONFIG.window))
    window = [feed(model, model.make_cache(), n) for n in LENGTHS]
    assert list(result.cache_bytes["window"]) == window


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "deepseek_v3"])
def test_work_is_what_mlx_multiplies(name: str):
    """The count for one more key gives the whole of a step at another length."""
    model = tiny(name)
    costs = costs_of(model, CONFIG)
    lengths = (2, 3, 30, 200)
    counts = [step_of(model, after(model, n - 1), 1).multiply_adds for n in lengths]
    expected = [costs.decode_work(n) for n in lengths]
    assert [c - counts[0] for c in counts] == [e - expected[0] for e in expected]


def test_work_by_hand():
    """Heads x (key + value) for each visible key, and for latent attention what it multiplies."""
    dense = per_key(tiny("qwen3", num_hidden_layers=1), [])[None]
    assert dense.decode == dense.prefill == 4 * (8 + 8)
    latent = per_key(tiny("deepseek_v3", n_layers=2), [])[None]
    assert latent.decode == 2 * 4 * (16 + 8 + 16)
    assert latent.prefill == 2 * 4 * (8 + 8 + 8)


def test_sums_of_work(tmp_path: Path):
    path = written(tmp_path, "gpt_oss", {})
    result = estimate(str(path), num_sinks=2, window=8, lengths=[1, 6, 7, 40])
    key = 4 * 16
    for kind, most in (("full", 40), ("sinks", 10)):
        token = [key * (min(t, most) + min(t, WINDOW)) for t in range(41)]
        assert result.decode_multiply_adds[kind] == tuple(token[n] for n in result.lengths)
        sums = tuple(sum(token[: n + 1]) for n in result.lengths)
        assert result.prefill_multiply_adds[kind] == sums


def test_reads_the_chosen_experts_alone():
    model = tiny("mixtral", num_local_experts=8, num_experts_per_tok=2)
    experts = sum(a.nbytes for path, a in tree_flatten(model.parameters()) if "switch_mlp" in path)
    assert step_of(model, after(model, 1), 1).read <= weight_bytes(model) - experts * 6 // 8
    assert step_of(model, after(model, 1), 1).read > weight_bytes(model) - experts


def test_quantised_weights(tmp_path: Path):
    wide = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "vocab_size": 192}
    settings = {
        "group_size": 64,
        "bits": 4,
        "model.layers.0.self_attn.q_proj": {"group_size": 32, "bits": 8},
    }
    read = config("qwen3", wide) | {"quantization": settings, "torch_dtype": "bfloat16"}
    real = tiny("qwen3", dtype=mx.bfloat16, **wide)

    def chosen(path: str, module: nn.Module) -> Any:
        return settings.get(path, hasattr(module, "to_quantized"))

    nn.quantize(real, 64, 4, class_predicate=chosen)
    assert weight_bytes(build(read)) == weight_bytes(real)


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "qwen3_next"])
def test_quantised_rings_are_what_mlx_holds(name: str, tmp_path: Path):
    path = written(tmp_path, name, {"head_dim": 64})
    sizes = {"num_sinks": 4, "window": 60, "lengths": [512], "dtype": "float32"}
    result = estimate(str(path), **sizes)
    model = tiny(name, head_dim=64)
    for bits in (8, 4):
        attach(model, SinkConfig(4, 60, kv_bits=bits))
        nbytes = feed(model, model.make_cache(), 512)
        assert result.cache_bytes[f"sinks_{bits}bit"] == (nbytes,)


def test_says_why_rings_are_not_quantised(tmp_path: Path):
    result = estimate(str(written(tmp_path, "qwen3", {})), window=60)
    assert result.cache_bytes["sinks_8bit"] == (None,) * 5
    assert any(note.startswith("no quantised rings: ") for note in result.notes)


@pytest.mark.parametrize("name", ["deepseek_v3", "mamba2", "qwen3_next"])
def test_weights_in_bfloat16(name: str, tmp_path: Path):
    """Some parameters stay in float32, as mlx-lm's converter leaves them."""
    read = json.loads(written(tmp_path, name, {}).read_text())
    held = [weight_bytes(tiny(name, dtype=dtype)) for dtype in (mx.float32, mx.bfloat16)]
    assert [weight_bytes(build(read, dtype)) for dtype in ("float32", "bfloat16")] == held


def test_nothing_is_computed():
    """A model of 600 GB: its weights would not fit anywhere."""
    big = {"hidden_size": 1 << 17, "intermediate_size": 1 << 19, "head_dim": 128}
    read = config("llama", big, 2) | {"layer_types": None}
    mx.reset_peak_memory()
    costs = costs_of(build(read, "bfloat16"), SinkConfig(4, 508))
    assert costs.weights > 500e9
    assert costs.report.nbytes == 512 * 2 * 2 * 2 * 128 * 2
    assert mx.get_peak_memory() < 50e6


def test_what_fits(tmp_path: Path):
    result = estimate(str(written(tmp_path, "gpt_oss", {})), num_sinks=2, window=8)
    fit = result.fits[0]
    room = working_set(8) - result.weights.nbytes
    grows = 2 * 2 * 8 * 2
    assert fit.full_tokens == (room - WINDOW * grows) // grows
    assert fit.streams == room // result.report.nbytes
    assert working_set(16) == (32 << 30) // 3
    assert working_set(64) == 48 << 30


def test_the_window_is_that_of_the_option(tmp_path: Path):
    """Of `--memory` on a machine with so much, cut to the trained context."""
    settings = {"max_position_embeddings": 1 << 20, "hidden_size": 64}
    path = written(tmp_path, "qwen3", settings)
    result = estimate(str(path), num_sinks=2, window=8, dtype="float32", lengths=[512])
    fits = {fit.memory_gib: fit.window for fit in result.fits}
    assert fits[64] == (1 << 20) - 2
    model = tiny("qwen3", **settings)
    assert fits[8] == budget.largest(model, working_set(8), SinkConfig(2, 8)).config.window
    assert 1 << 16 < fits[8] < (1 << 20) - 2


def test_a_model_that_bears_no_longer_window(tmp_path: Path):
    """llama4's attention changes with the position: from there on there is no window."""
    path = written(tmp_path, "llama4", {})
    result = estimate(str(path), num_sinks=4, window=60, dtype="float32", lengths=[512])
    assert {fit.window for fit in result.fits} == {512 - 2 - 4}


def test_bandwidth_is_shared_by_weights_and_cache(tmp_path: Path):
    path = written(tmp_path, "qwen3", {})
    result = estimate(str(path), num_sinks=4, window=60, lengths=[512])
    m1 = result.chips[0]
    assert (m1.chip.name, m1.chip.gb_per_s) == ("M1", 68.25)
    read = result.weights.read_by_a_token + result.report.nbytes
    assert m1.sinks == (pytest.approx(68.25e9 / read, rel=1e-6),)
    assert all(chip.source and chip.gb_per_s > 60 for chip in chips())


BAD: dict[str, tuple[dict[str, Any] | None, type[Exception], str]] = {
    "unknown type": ({"model_type": "nonesuch"}, ModelError, "unknown model_type 'nonesuch'"),
    "lacks fields": (
        {"model_type": "llama", "hidden_size": 8},
        ModelError,
        "lacks fields: num_hidden_layers, intermediate_size",
    ),
    "no type": ({}, ModelError, "names no model_type"),
    "refused": ({"model_type": "gpt2"}, UnsupportedModelError, "gpt2 is not supported: its pos"),
    "own code": ({"model_file": "x.py"}, ModelError, "model_file"),
    "wrong value": ({"hidden_size": "many"}, ModelError, "no 'qwen3' can be built"),
    "dtype": ({"torch_dtype": "int7"}, ModelError, "unknown torch_dtype 'int7'"),
    "mode": ({"quantization": {"mode": "q9"}}, ModelError, "unknown quantization mode 'q9'"),
    "bits": ({"quantization": {"bits": "4"}}, ModelError, "bits must be an integer, got '4'"),
    "quantization field": (
        {"quantization": {"bits": 4, "grup_size": 64}},
        ModelError,
        "unknown field 'grup_size' in quantization",
    ),
    "layers": (
        {"num_hidden_layers": 10**9},
        ModelError,
        "says num_hidden_layers is 1000000000: at most 10000",
    ),
    "text layers": ({"text_config": {"n_layers": 10**9}}, ModelError, "says n_layers is 100000"),
    "no such bits": ({"quantization": {"bits": 9}}, ModelError, "quantization"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations_are_named(case: str, tmp_path: Path):
    changes, kind, words = BAD[case]
    fields = {} if case in ("lacks fields", "no type") else config("qwen3", {"hidden_size": 64})
    (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}))
    with pytest.raises(kind) as caught:
        estimate(str(tmp_path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window", [{}, "x", 0, 1.5, True])
def test_a_window_that_is_no_number_of_tokens(window: Any, tmp_path: Path):
    path = written(tmp_path, "gpt_oss", {}, sliding_window=window)
    with pytest.raises(UnsupportedModelError, match=f"a window of {re.escape(repr(window))}, "):
        estimate(str(path), window=8)


def test_lengths():
    assert [parse_tokens(t) for t in ("500", "4K", "10m")] == [500, 4096, 10 << 20]
    assert [short(n) for n in (500, 4096, 1 << 20, 10 << 20)] == ["500", "4K", "1M", "10M"]
    for text in ("", "0", "-3", "4G", "1.5K", "many"):
        with pytest.raises(ConfigError, match="a length must be"):
            parse_tokens(text)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "plan.svg"
    assert main(["--window", "252", "--lengths", "4K", "1M", "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "4 sinks + window 252" in text
    assert "M4 Max" in text
    assert picture.read_text().startswith("<?xml")
    assert main(["--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == json.loads(json.dumps(estimate("demo").to_dict()))
    assert values["context"] == 512
    assert command.parser().prog == "python -m mlx_sink.plan"


def keys(value: Any) -> Any:
    """Return the keys of a JSON value, those of a list by its first item."""
    if isinstance(value, dict):
        return {key: keys(item) for key, item in value.items()}
    return [keys(value[0])] if isinstance(value, list) and value else None


def test_the_json_keeps_its_keys():
    """Programs read them; they are those that 165b64a wrote."""
    values = json.loads(json.dumps(estimate("demo", num_sinks=4, window=252).to_dict()))
    kinds = {"full": [None], "sinks": [None]}
    fit = ("memory_gib", "beside_weights", "full_tokens", "streams", "window")
    expected = {
        "model": None,
        "dtype": None,
        "dtype_assumed": None,
        "notes": None,
        "context": None,
        "weights": {"bytes": None, "read_by_a_token": None},
        "report": keys(values["report"]),
        "bytes_per_token": None,
        "lengths": [None],
        "cache_bytes": {
            "full": [None],
            "window": [None],
            "sinks": [None],
            "sinks_8bit": [None],
            "sinks_4bit": [None],
        },
        "decode_multiply_adds": kinds,
        "prefill_multiply_adds": kinds,
        "fits": [dict.fromkeys(fit)],
        "chips": [{"chip": None, "gb_per_s": None, "source": None, **kinds}],
    }
    assert keys(values) == expected
    assert list(values) == list(expected)
    assert values["report"] == estimate("demo", num_sinks=4, window=252).report.to_dict()
