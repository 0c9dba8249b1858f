"""Calibration: attention shares against a plain computation, losses against plain mlx-lm."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, ClassVar

import every
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from folder import make_folder
from tiny import VOCABULARY, build, plain, random_tokens, recompute

import mlx_sink
from mlx_sink import InputError, SinkConfig
from mlx_sink.commands import plots
from mlx_sink.commands.convert import card as files
from mlx_sink.measure.calibrate import TOLERANCE, Calibration, Candidate, calibrate
from mlx_sink.measure.sink_share import FIRST, sink_share
from mlx_sink.models.architectures import VERIFIED
from mlx_sink.models.checkpoints.settings import Settings

WORDS = "the cat and the dog went to the sea and the cat sat down. "


class Ids:
    """A tokenizer for tests: the text is the ids, and no word is special."""

    added_tokens_decoder: ClassVar[dict[int, str]] = {}
    all_special_ids: ClassVar[list[int]] = []
    all_special_tokens: ClassVar[list[str]] = []
    bos_token = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(word) for word in text.split() if word.isdigit()]


def text_of(tokens: np.ndarray) -> str:
    return " ".join(map(str, tokens[0]))


def attention_by_hand(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return a llama's attention weights of layer 0, ``[n_heads, n, n]``, from its weights."""
    layer, args = model.layers[0], model.args
    x = layer.input_layernorm(model.model.embed_tokens(mx.array(tokens)))
    attention, n = layer.self_attn, tokens.shape[1]

    def heads(y: mx.array, count: int) -> mx.array:
        return attention.rope(y.reshape(1, n, count, -1).transpose(0, 2, 1, 3))

    q = np.array(heads(attention.q_proj(x), args.num_attention_heads))[0].astype(np.float64)
    k = np.array(heads(attention.k_proj(x), args.num_key_value_heads))[0].astype(np.float64)
    k = np.repeat(k, len(q) // len(k), axis=0)
    scores = q @ k.transpose(0, 2, 1) * attention.scale
    scores[:, ~np.tri(n, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("n", [40, 300, 513])
def test_shares_are_those_of_the_attention(n: int):
    """One chunk, two, and a last chunk of a single token."""
    model, tokens = build("llama", layers=2, max_position_embeddings=1024), random_tokens(n)
    share = sink_share(model, tokens[0].tolist())
    expected = attention_by_hand(model, tokens)[:, n // 2 :, :FIRST].mean(axis=1)
    assert share.layers == (0, 1)
    assert share.shares.shape == (2, 4, FIRST)
    assert np.abs(share.shares[0] - expected).max() < 1e-5
    assert share.of_layer(4)[0] == pytest.approx(expected[:, :4].sum(axis=1).mean(), abs=1e-5)
    assert share.uniform(4) == pytest.approx(np.mean([4 / t for t in range(n // 2 + 1, n + 1)]))


@pytest.mark.parametrize("name", sorted(VERIFIED))
def test_shares_of_every_architecture(name: str):
    """Where a layer attends through mlx_sink, its first tokens get something, and not all."""
    model = every.tiny(name)
    share = sink_share(model, random_tokens(40)[0].tolist())
    report = mlx_sink.attach(model, SinkConfig(1, 39))
    rings = {x.index: x.cache for x in report.layers if x.attention == "mlx_sink"}
    if len(rings) == len(share.shares):
        assert share.layers == tuple(rings)
    assert len(share.shares) > 0 or not rings
    assert ((share.shares >= 0) & (share.shares <= 1)).all()
    for index, shares in zip(share.layers, share.shares, strict=True):
        sees_all = rings.get(index) == "sink ring"
        assert not sees_all or (shares.sum(axis=1) > 0).any()
        if rings.get(index) == "window ring":
            assert shares.max() == 0  # its window of 6 has left them behind


def test_what_is_observed_is_what_is_attended_with():
    """The observer is gone after the block, and changes nothing."""
    from mlx_sink.attention.dispatch import observed

    model, tokens = build("llama", layers=2), random_tokens(30)
    seen: list[Any] = []
    mlx_sink.attach(model, SinkConfig(2, 9))
    quiet = np.array(model(mx.array(tokens), cache=model.make_cache()))
    with observed(seen.append):
        loud = np.array(model(mx.array(tokens), cache=model.make_cache()))
    model(mx.array(tokens), cache=model.make_cache())
    assert len(seen) == 2
    assert np.array_equal(quiet, loud)


def losses(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    logits, targets = mx.array(logits[0, :-1]), mx.array(tokens[0, 1:])
    return np.array(nn.losses.cross_entropy(logits, targets), np.float64)


def test_losses_are_those_of_recomputing():
    """In a model of one layer every loss is what plain mlx-lm makes of the visible tokens."""
    model, tokens = build("llama", layers=1), random_tokens(200)
    found = calibrate(model, Ids(), text_of(tokens), context=256)
    assert found.sinks_from == 32
    assert [(c.num_sinks, c.window) for c in found.sinks] == [
        (0, 32), (1, 31), (2, 30), (4, 28), (8, 24),
    ]  # fmt: skip
    assert [c.num_sinks + c.window for c in found.windows] == [32, 64, 128]
    assert found.windows_from == 128
    for candidates, since in ((found.sinks, 32), (found.windows, 128)):
        means = []
        for candidate in candidates:
            logits = recompute(model, tokens, SinkConfig(candidate.num_sinks, candidate.window))
            means.append(losses(logits, tokens)[since:].mean())
            assert candidate.loss == pytest.approx(means[-1], abs=1e-4)
        assert [candidate.over_best for candidate in candidates] == pytest.approx(
            np.array(means) - min(means), abs=1e-4
        )


def test_the_model_is_left_as_it_was():
    model, tokens = build("llama", layers=1), random_tokens(130)
    before = plain(model, tokens)
    calibrate(model, Ids(), text_of(tokens), context=64)
    assert "make_cache" not in model.__dict__
    assert np.array_equal(plain(model, tokens), before)


def made_by_hand(*, with_sink: bool) -> nn.Module:
    """Return a llama of one layer that predicts the word it just saw.

    With a sink, it puts its attention on token 0 and reads nothing there; without that token the
    attention falls on the others, whose values disturb the prediction. Without a sink, it spreads
    its attention and reads nothing anywhere.
    """
    model: Any = build("llama", layers=1, tie_word_embeddings=False, num_key_value_heads=4)
    attention, width = model.layers[0].self_attn, 32
    embedding = np.zeros((VOCABULARY, width), np.float32)
    embedding[:, : width // 2] = np.random.default_rng(0).normal(size=(VOCABULARY, width // 2))
    embedding[:, width - 1] = 1.0
    embedding[0] = 0.0
    embedding[0, width - 2] = 6.0
    eye = np.zeros((width, width), np.float32)
    model.model.embed_tokens.weight = mx.array(embedding)
    q, k, v, o = (eye.copy() for _ in range(4))
    for head in range(4):
        # The slowest pair of a head hardly turns, so distance does not count.
        q[head * 8 + 3, width - 1] = 4.0
        k[head * 8 + 3, width - 2] = 8.0 * with_sink
    v[:, : width // 2] = np.random.default_rng(1).normal(size=(width, width // 2))
    o[: width // 2] = 3 * with_sink * np.random.default_rng(2).normal(size=(width // 2, width))
    for name, matrix in (("q", q), ("k", k), ("v", v), ("o", o)):
        getattr(attention, f"{name}_proj").weight = mx.array(matrix)
    model.layers[0].mlp.down_proj.weight = mx.zeros_like(model.layers[0].mlp.down_proj.weight)
    head = np.zeros((VOCABULARY, width), np.float32)
    head[:, : width // 2] = embedding[:, : width // 2]
    model.lm_head.weight = mx.array(head)
    return model


def test_it_tells_a_model_with_a_sink_from_one_without():
    # Each word is said twice, and the model predicts the word it just saw.
    body = np.repeat(np.random.default_rng(3).integers(1, VOCABULARY, 150), 2)
    text = text_of(np.concatenate([[0], body])[None])
    with_sink = calibrate(made_by_hand(with_sink=True), Ids(), text, context=64)
    without = calibrate(made_by_hand(with_sink=False), Ids(), text, context=64)
    assert with_sink.share.of_layer(1)[0] > 0.9
    assert with_sink.sinks_matter
    assert with_sink.settings.num_sinks == 1
    assert "Sinks matter for this model: without them its perplexity is" in with_sink.verdict
    assert without.share.of_layer(1)[0] < 0.05
    assert not without.sinks_matter
    assert without.settings.num_sinks == 0
    assert "not shown to matter" in without.verdict


def test_short_texts_are_refused():
    with pytest.raises(InputError, match="at least 128 tokens, got 50"):
        calibrate(build("llama"), Ids(), text_of(random_tokens(50)))


def test_a_model_of_a_tiny_context():
    """Fewer candidates, and none that does not fit."""
    model = build("llama", max_position_embeddings=9)
    found = calibrate(model, Ids(), text_of(random_tokens(130)), context=9)
    assert [(a.num_sinks, a.window) for a in found.sinks] == [(0, 8), (1, 7), (2, 6)]
    assert [a.num_sinks + a.window for a in found.windows] == [8]


def candidate(num_sinks: int, window: int, over_best: float) -> Candidate:
    return Candidate(num_sinks, window, 3 + over_best, over_best, 0.0, 1000)


@pytest.mark.parametrize(
    ("context", "over", "window", "levelled"),
    [
        (None, [0.5, 0.2, 0.0], 1024, False),  # still falls: no smaller than the default
        (2048, [0.5, 0.2, 0.0], 1024, False),
        (128, [0.5, 0.2, 0.0], 128, True),  # the context ends there
        (None, [0.5, 0.009, 0.0], 64, True),
        (None, [0.5, 0.0, 0.2], 64, True),  # larger is not always better
    ],
)
def test_which_window_is_recommended(
    context: int | None,
    over: list[float],
    window: int,
    levelled: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    module = sys.modules["mlx_sink.measure.calibrate"]

    def made_up(model: Any, tokens: Any, configs: list[SinkConfig], since: int, bar: Any) -> Any:
        if len({c.num_sinks for c in configs}) > 1:
            return tuple(candidate(c.num_sinks, c.window, 0.0) for c in configs)
        assert [c.window for c in configs] == [32, 64, 128]
        return tuple(candidate(0, c.window, x) for c, x in zip(configs, over, strict=True))

    monkeypatch.setattr(module, "_candidates", made_up)
    found = calibrate(build("llama"), Ids(), text_of(random_tokens(200)), context=context)
    assert found.settings == Settings(0, window)
    assert found.is_levelled is levelled
    assert TOLERANCE == 0.01


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calibration]:
    folder = make_folder(tmp_path_factory.mktemp("models") / "calibrated")
    model, tokenizer = mlx_lm.load(str(folder))
    found = calibrate(model, tokenizer, WORDS * 20, context=64)
    assert files.write_calibration(folder, found, "words") == []
    return folder, found


def test_the_section_is_what_load_takes(calibrated: tuple[Path, Calibration]):
    folder, found = calibrated
    section = json.loads((folder / "config.json").read_text())["mlx_sink"]
    assert section["num_sinks"] == found.settings.num_sinks
    assert section["window"] == found.settings.window
    assert section["calibration"]["text"] == "words"
    _, _, report = mlx_sink.load(folder, return_report=True)
    assert report.config == SinkConfig(found.settings.num_sinks, found.settings.window)
    assert set(report.sources.values()) == {"config.json"}


def test_the_card_has_every_figure(calibrated: tuple[Path, Calibration]):
    folder, found = calibrated
    text = (folder / "SINK.md").read_text()
    assert found.verdict in text
    for one in (*found.sinks, *found.windows):
        assert f"| {one.loss:.4f} | {math.exp(one.loss):.2f} |" in text
    rows = [line for line in text.splitlines() if line.startswith(("| 0 |", "| 1 |"))]
    assert any(f"{found.share.of_layer(1)[1]:.4f}" in row for row in rows)
    assert "(SINK.png)" in text
    assert (folder / "SINK.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_rest_is_there(
    calibrated: tuple[Path, Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, found = calibrated
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(plots, "is_available", lambda: False)
    messages = files.write_calibration(tmp_path, found, "words")
    assert len(messages) == 1
    assert "mlx-sink[plot]" in messages[0]
    assert not (tmp_path / "SINK.png").exists()
    assert "SINK.png" not in (tmp_path / "SINK.md").read_text()
    assert "mlx_sink" in json.loads((tmp_path / "config.json").read_text())


def test_figures_are_json(calibrated: tuple[Path, Calibration]):
    figures = json.loads(json.dumps(calibrated[1].to_dict()))
    assert figures["recommended"].keys() == {"num_sinks", "window"}
    assert len(figures["sinks"]) == 5


def test_the_model_inside_has_a_sink():
    """Known of this model: it was trained to have one, and is lost without it."""
    model, tokenizer = mlx_lm.load(str(Path(mlx_sink.__file__).parent / "models" / "demo"))
    found = calibrate(model, tokenizer, files.sample_text()[:1500], context=512)
    assert found.sinks_matter
    assert found.settings.num_sinks == 1
    assert found.share.of_layer(1)[0] > 0.3
