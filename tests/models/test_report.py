"""The report of `attach`: rows for every kind of cache, numbers that are held in fact."""

from __future__ import annotations

import json

import pytest
from every import tiny
from feeding import feed, tokens_of

from mlx_sink import SinkConfig, attach
from mlx_sink.cache.group import leaves
from mlx_sink.io.units import format_bytes
from mlx_sink.models.report import LayerReport, Report, _ranges

CONFIG = SinkConfig(3, 10, epoch=17)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (
            "gemma3_text",
            {("window ring", "mlx_sink", "rope", 6), ("sink ring", "mlx_sink", "rope", 13)},
        ),
        (
            "llama4",
            {("chunk ring", "mlx_sink", "rope", 6), ("sink ring", "mlx_sink", "none", 13)},
        ),
        ("qwen3_next", {("state", "-", "-", 0), ("sink ring", "mlx_sink", "rope", 13)}),
        ("falcon_h1", {("state", "-", "-", 0), ("sink ring", "mlx_sink", "rope", 13)}),
        ("deepseek_v3", {("sink ring", "model", "rope", 13)}),
        ("mamba", {("state", "-", "-", 0)}),
    ],
)
def test_rows(name: str, rows: set[tuple[str, str, str, int]]):
    """What each kind of layer gets, and its bytes when it is full, to the byte."""
    model = tiny(name)
    report, caches = attach(model, CONFIG), model.make_cache()
    feed(model, tokens_of(model, 40), caches)
    kinds = {(r.cache, r.attention, r.positions, r.slots) for r in report.layers}
    assert kinds == rows
    full = [cache for cache in leaves(caches) if not cache.empty()]
    assert [layer.nbytes for layer in report.layers] == [cache.nbytes for cache in full]
    for layer in report.layers:
        is_state = layer.cache == "state"
        assert (layer.state_bytes > 0) == is_state
        assert (layer.bytes_per_token == 0) == is_state


def test_several_caches_of_a_layer_have_a_row_each():
    model = tiny("falcon_h1")
    indices = [layer.index for layer in attach(model, CONFIG).layers]
    assert indices == [i for i in range(len(model.layers)) for _ in range(2)]


def test_dictionary():
    """Everything that the table shows, for programs."""
    report = attach(tiny("qwen3_next"), CONFIG)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["bytes"] == report.nbytes == sum(row["bytes"] for row in values["layers"])
    assert {row["cache"] for row in values["layers"]} == {"state", "sink ring"}
    for row, layer in zip(values["layers"], report.layers, strict=True):
        assert row.pop("bytes") == layer.nbytes
        assert row == {name: getattr(layer, name) for name in LayerReport.__slots__}


def test_table():
    layers = [
        LayerReport(i, "sink ring", "-", "-", 13, 8, 3, 20)
        if i % 4 == 3
        else LayerReport(i, "state", "-", "-", 0, 0, state_bytes=100)
        for i in range(12)
    ]
    _, head, *rows = str(Report("m", CONFIG, tuple(layers))).splitlines()
    assert head.split()[:2] == ["layers", "cache"]
    assert [row.split()[0] for row in rows] == ["9", "3"]
    assert rows[0].endswith("  0-2, 4-6, 8-10")
    assert rows[1].endswith("  3, 7, 11")
    state, ring = (row.split() for row in rows)
    assert state[4:7] == ["0", "0", "900"]
    assert ring[5:8] == ["13", "8", str(3 * (10 * 8 + 3 * 20))]


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([0], "0"),
        ([0, 1], "0-1"),
        ([0, 1, 2, 3, 4], "0-4"),
        ([0, 2, 4], "0, 2, 4"),
        ([0, 2, 4, 6], "0, 2, ..., 6"),
        ([5, 11, 17, 23], "5, 11, ..., 23"),
        ([0, 1, 3, 4], "0-1, 3-4"),
        ([0, 1, 2, 4, 6], "0-2, 4, 6"),
    ],
)
def test_layers_in_words(indices: list[int], text: str):
    assert _ranges(indices) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (8_320_000, "8.32 MB")],
)
def test_bytes_in_words(n: int, text: str):
    assert format_bytes(n) == text


def test_bytes_beyond_giga_stay_there():
    assert format_bytes(2e12) == "2000.00 GB"
