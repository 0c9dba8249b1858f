"""Recall against oracles that share no code with it.

1. While all evicted blocks fit, it is mlx-lm's full attention, in deep models.
2. In a model of one layer a token's logits are those of plain mlx-lm fed what it sees: the sinks,
   the blocks that it chose, and its window.
3. The choice is that of float64 arithmetic over keys as the model made them.
4. Nothing depends on the cuts, on the epochs, on how far the stream is, on what was taken back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny import TOLERANCE, build, cut, every, mixed, moved, plain, random_tokens, run, stream

from mlx_sink import CacheError, ConfigError, SinkConfig, attach
from mlx_sink.attention import dispatch
from mlx_sink.attention.dispatch import Attended, observed
from mlx_sink.attention.layout import Block
from mlx_sink.attention.recall import Archived, Retrieved
from mlx_sink.attention.rope import Rotation
from mlx_sink.cache.archive import Archive

B = 16
CONFIG = SinkConfig(3, 20, recall=2 * B, recall_block=B, recall_bits=None)
N = 200

FAMILIES = (
    "llama",
    "qwen3, yarn",
    "llama, interleaved",
    "phi3, partial longrope",
    "smollm3",
    "phi3",
)
each_family = pytest.mark.parametrize("family", FAMILIES)


def edge(t: int, config: SinkConfig) -> int:
    """Return o(t), as the definition has it."""
    S, W = config.num_sinks, config.window
    return S + B * (max(0, t - W + 1 - S) // B)


@contextmanager
def choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[int]]]:
    """Note which blocks every token of a model with one layer chose."""
    seen: dict[int, list[int]] = {}
    original = dispatch.retrieve

    def noting(
        far: mx.array, archived: Archived, block: Block, most: int, rotation: Rotation
    ) -> Retrieved:
        out = original(far, archived, block, most, rotation)
        for i, row in enumerate(np.array(out.blocks[0])):
            if block.evicted[i]:
                seen[block.first + i] = row[: min(most, block.evicted[i])].tolist()
        return out

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "retrieve", noting)
        yield seen


@each_family
@pytest.mark.parametrize("cuts", [[], every(1), mixed(30, 1, 7)], ids=["whole", "steps", "mixed"])
def test_everything_in_reach_is_full_attention(family: str, cuts: Iterable[int]):
    """Oracle 1: nothing is lost, and nothing stands at a wrong distance."""
    model = build(family, layers=3, seed=1)
    config = replace(CONFIG, recall=12 * B)
    tokens = random_tokens(N)
    ours = stream(model, config, tokens, cuts)
    np.testing.assert_allclose(ours, plain(model, tokens), atol=TOLERANCE, rtol=0)


def recomputed(
    model: nn.Module, tokens: np.ndarray, config: SinkConfig, chosen: dict[int, list[int]]
) -> np.ndarray:
    """Return the logits of plain mlx-lm that is fed what each token sees, from position 0."""
    rows: list[np.ndarray] = []
    for t in range(tokens.shape[1]):
        sees = [a for a in range(config.num_sinks) if a <= t]
        for block in chosen.get(t, []):
            first = config.num_sinks + block * B
            sees += range(first, first + B)
        sees += range(edge(t, config), t + 1)
        logits = model(mx.array(tokens[:, sees]))[:, -1]
        rows.append(np.array(logits.astype(mx.float32)))
    return np.stack(rows, axis=1)


@each_family
def test_equals_the_recompute_oracle(family: str, monkeypatch: pytest.MonkeyPatch):
    """Oracle 2: sinks, chosen blocks and window, in order, at positions that follow on."""
    model = build(family, seed=2)
    tokens = random_tokens(N, seed=3)
    with choices(monkeypatch) as chosen:
        ours = stream(model, CONFIG, tokens, mixed(25, 1, 40))
    assert set(chosen) == set(range(3 + B + 20 - 1, N)), "every token with something evicted"
    assert all(row == sorted(set(row)) for row in chosen.values())
    assert any(row != [0, 1] for row in chosen.values()), "or there was nothing to choose"
    expected = recomputed(model, tokens, CONFIG, chosen)
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE, rtol=0)


def votes_by_hand(
    model: Any, queries: np.ndarray, raw: np.ndarray, t: int, start: int
) -> np.ndarray:
    """Return the votes for every evicted block in float64, from unrotated queries and keys."""
    attention = model.layers[0].self_attn
    H, D = queries.shape[0], queries.shape[1]
    base, scale = attention.rope.base, attention.scale
    frequencies = base ** (-np.arange(0, D, 2) / D)

    def rotated(x: np.ndarray, position: float) -> np.ndarray:
        a, b = x[..., : D // 2], x[..., D // 2 :]
        cos, sin = np.cos(position * frequencies), np.sin(position * frequencies)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    far = rotated(queries, CONFIG.window - (t - start))
    n = (edge(t, CONFIG) - 3) // B
    votes = np.zeros(n)
    for h in range(H):
        kv = h // (H // raw.shape[0])
        best = np.array(
            [
                max(
                    scale * far[h] @ rotated(raw[kv, 3 + j * B + i], i - (3 + j * B + i))
                    for i in range(B)
                )
                for j in range(n)
            ]
        )
        shares = np.exp(best - best.max())
        votes += shares / shares.sum()
    return votes


def test_the_choice_is_that_of_float64(monkeypatch: pytest.MonkeyPatch):
    """Oracle 3: by the best key of a block, at distance W, all heads of the layer together."""
    model = build("llama", seed=4)
    attach(model, replace(CONFIG, epoch=10_000))
    calls: list[Attended] = []
    tokens = random_tokens(N, seed=5)
    with choices(monkeypatch) as chosen, observed(calls.append):
        caches = model.make_cache()
        run(model, tokens, caches, [N])
    (call,) = calls
    queries, keys = np.array(call.queries[0], np.float64), np.array(call.keys[0], np.float64)
    ties = 0
    for t in range(40, N, 7):
        votes = votes_by_hand(model, queries[:, t], keys, t, 0)
        ranked = np.argsort(-votes, kind="stable")
        gap = votes[ranked[1]] - votes[ranked[2]] if len(votes) > 2 else 1
        ties += gap < 1e-5
        if gap >= 1e-5:
            assert chosen[t] == sorted(ranked[:2].tolist())
    assert ties < 3


@pytest.mark.parametrize("family", ["llama", "smollm3"])
@pytest.mark.parametrize("limit", [3, 100], ids=["full archive", "roomy archive"])
@pytest.mark.parametrize("cuts", [[1], [7], [64], [20], [60], [13, 1, 40]], ids=str)
def test_cuts_change_nothing(family: str, limit: int, cuts: list[int]):
    """Oracle 4: a deep model, over epochs, with an archive that wraps many times."""
    model = build(family, layers=3, seed=6)
    config = replace(CONFIG, epoch=70)
    attach(model, config)
    config = replace(config, recall_memory=(limit + 1) * bytes_per_block(model))
    tokens = random_tokens(400, seed=7)
    whole = stream(model, config, tokens)
    pieces = stream(model, config, tokens, [c for _ in range(400) for c in cuts])
    np.testing.assert_allclose(pieces, whole, atol=TOLERANCE, rtol=0)


def bytes_per_block(model: nn.Module) -> int:
    caches = model.make_cache()
    run(model, random_tokens(1), caches)
    return sum(cache.archive.bytes_per_block for cache in caches)


def test_dropped_blocks_are_not_chosen(monkeypatch: pytest.MonkeyPatch):
    """With room for three blocks a token chooses among the newest three that it does not see."""
    model = build("llama", seed=8)
    attach(model, CONFIG)
    config = replace(CONFIG, recall_memory=4 * bytes_per_block(model))
    with choices(monkeypatch) as chosen:
        attach(model, config)
        caches = model.make_cache()
        run(model, random_tokens(N, seed=9), caches, mixed(90, 1, 5))
    for t, blocks in chosen.items():
        evicted = (edge(t, CONFIG) - 3) // B
        assert set(blocks) <= set(range(max(0, evicted - 3), evicted))
    archive = caches[0].archive
    assert archive.held(caches[0].ring) == range(8, 11)
    assert archive.nbytes == archive.bytes_per_block * 4 == config.recall_memory


def test_far_positions():
    """A stream that has gone more than 2^31 tokens goes on as a young one."""
    model = build("llama", layers=2, seed=10)
    tokens = random_tokens(N, seed=11)
    config = replace(CONFIG, epoch=70)
    attach(model, config)
    config = replace(config, recall_memory=4 * bytes_per_block(model))
    expected = stream(model, config, tokens, mixed(60))
    caches = model.make_cache()
    run(model, tokens[:, :150], caches, [60, 50])
    # As many tokens as leave all in the same slots, of the ring and of the archive of 4 blocks.
    far = (20 + B - 1) * 4 * B * 1_000_000
    assert far > 2**31
    for cache in caches:
        moved(cache, far)
    ours = run(model, tokens[:, 150:], caches, [1, 3, 20])
    np.testing.assert_allclose(ours, expected[:, 150:], atol=TOLERANCE, rtol=0)


def test_what_was_never_written_is_never_read():
    """Slots of the archive beyond the blocks that came hold NaN here."""
    model = build("llama", layers=2, seed=12)
    tokens = random_tokens(N, seed=13)
    expected = stream(model, CONFIG, tokens, mixed(40, 20, 1))
    caches = model.make_cache()
    ours: list[np.ndarray] = []
    for piece in cut(N, mixed(40, 20, 1)):
        ours.append(run(model, tokens[:, piece], caches))
        for cache in caches:
            spoil(cache.archive, cache.ring.evicted(cache.tokens))
    np.testing.assert_array_equal(np.concatenate(ours, axis=1), expected)


def spoil(archive: Archive, blocks: int) -> None:
    for array in archive.state or []:
        if blocks * B < array.shape[2]:
            array[:, :, blocks * B :] = float("nan")


@pytest.mark.parametrize("n", [1, 5, 16, 20])
def test_what_was_taken_back_had_never_come(n: int):
    """Over every phase of a block: the blocks are archived again, with what came instead."""
    model = build("llama", layers=2, seed=14)
    config = replace(CONFIG, rollback=20, epoch=90)
    attach(model, config)
    config = replace(config, recall_memory=6 * bytes_per_block(model))
    tokens, others = random_tokens(N, seed=15), random_tokens(60, seed=16)
    expected = stream(model, config, tokens, every(9))
    for at in range(60, 130, 11):
        caches = model.make_cache()
        run(model, tokens[:, :at], caches, [40, 1, 7])
        run(model, others[:, :n], caches, [1, 3])
        for cache in caches:
            assert cache.trim(n) == n
        ours = run(model, tokens[:, at:], caches, mixed(2, 1, seed=at))
        np.testing.assert_allclose(ours, expected[:, at:], atol=TOLERANCE, rtol=0)


def test_sequences_of_a_batch_choose_for_themselves():
    model = build("llama", layers=2, seed=17)
    tokens = random_tokens(N, seed=18, batch=3)
    together = stream(model, CONFIG, tokens, mixed(50, 1, 3))
    for i in range(3):
        alone = stream(model, CONFIG, tokens[i : i + 1], mixed(50, 1, 3))
        np.testing.assert_allclose(together[i], alone[0], atol=TOLERANCE, rtol=0)


def test_a_batch_shares_the_memory():
    model = build("llama", seed=19)
    attach(model, CONFIG)
    attach(model, replace(CONFIG, recall_memory=6 * bytes_per_block(model)))
    with pytest.raises(CacheError, match="holds 1 blocks of each of 3 sequences, and 2 are"):
        run(model, random_tokens(5, batch=3), model.make_cache())


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.2)])
@pytest.mark.parametrize("cuts", [[1], [50, 7]], ids=str)
def test_quantised_archives(bits: int, most: float, cuts: list[int]):
    """They differ from plain ones by little, and are that much smaller."""
    model = build("llama", layers=2, seed=20, hidden_size=128, head_dim=32)
    options = {"recall": 12 * B, "kv_group_size": 32}
    tokens = random_tokens(N, seed=21)
    exact = stream(model, replace(CONFIG, **options), tokens)
    config = replace(CONFIG, **options, recall_bits=bits)
    attach(model, config)
    caches = model.make_cache()
    ours = run(model, tokens, caches, [c for _ in range(N) for c in cuts])
    error = np.sqrt(np.square(ours - exact).mean()) / exact.std()
    assert 0 < error < most
    assert caches[0].archive.bytes_per_block == B * 2 * 2 * (32 * bits // 8 + 2 * 4)


def test_layers_that_do_not_recall(monkeypatch: pytest.MonkeyPatch):
    """They see sinks and window; the report says which ones look back."""
    model = build("llama", layers=3, seed=22)
    report = attach(model, replace(CONFIG, recall_layers=(1,)))
    assert [bool(layer.archive_blocks) for layer in report.layers] == [False, True, False]
    assert [cache.archive is not None for cache in model.make_cache()] == [False, True, False]
    assert "recall 32 of the newest" in str(report)
    assert "in 1 of 3 layers" in str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recall": 20}, "recall must be a multiple of recall_block .16., got 20"),
        ({"recall": -16}, "recall must be at least 0, got -16"),
        ({"recall_block": 8}, "recall_block must be 16, 32 or 64, got 8"),
        ({"window": 15}, "the window must hold a block of 16 tokens, got 15"),
        ({"recall_bits": 3}, "recall_bits must be 8 or 4, got 3"),
        ({"recall_mode": "never"}, "recall_mode must be asked or always, got 'never'"),
        ({"recall_layers": ()}, "recall_layers must be a tuple of layers"),
        ({"recall_layers": (0, 9)}, "layer 9 of recall_layers cannot recall: .* such as 0"),
        ({"recall_memory": 100}, "recall_memory must hold the 32 tokens .*: at least"),
        ({"window": 480}, "is 530, more than the 512 tokens .* a window of at most 462"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], message: str):
    model = build("llama", layers=2)
    with pytest.raises(ConfigError, match=message):
        attach(model, replace(CONFIG, **options))


def test_without_recall_nothing_changes():
    """Off, the integers and the logits are those that were there before."""
    model = build("llama", layers=2, seed=23)
    tokens = random_tokens(N, seed=24)
    config = SinkConfig(3, 20)
    off = stream(model, config, tokens, mixed(40))
    np.testing.assert_array_equal(
        off, stream(model, replace(config, recall_block=64), tokens, mixed(40))
    )
    assert model.make_cache()[0].ring.slots == 23
