"""Speculative decoding: the model's own text whatever the draft guesses, in bounded memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every import tiny
from folder import make_folder
from mlx.utils import tree_map
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from tiny import TOLERANCE, build

import mlx_sink
from mlx_sink import CacheError, ConfigError, InputError, SinkConfig, Stream, attach
from mlx_sink.commands.generate.command import main
from mlx_sink.models.attach import make_cache
from mlx_sink.models.load import load_draft
from mlx_sink.stream.loop import Loop, Made
from mlx_sink.stream.sampler import Sampling
from mlx_sink.stream.speculative import Draft

S, W, E = 2, 7, 17
CAPACITY = S + W
PROMPT = [5, 9, 2, 44, 17, 5, 5, 30, 8, 1, 60, 2, 7]
SAMPLED = Sampling(make_sampler(0.9, top_p=0.95))
PENALISED = Sampling(make_sampler(0.0), make_logits_processors(repetition_penalty=1.4))


def small(rollback: int = 5, noise: float = 0.0, **options: Any) -> Any:
    """A model; with noise it is one that often chooses otherwise."""
    model = build("llama", **{"layers": 2, **options})
    mx.random.seed(11)
    weights = model.parameters()
    model.update(tree_map(lambda x: x + noise * x.std() * mx.random.normal(x.shape), weights))
    attach(model, SinkConfig(S, W, epoch=E, rollback=rollback))
    return model


def loop(model: Any, draft: Any = None, n: int = 3, seed: int = 3) -> Loop:
    guess = None if draft is None else Draft(draft, make_cache(draft), n)
    made = Loop(model, make_cache(model), key=mx.random.key(seed), penalty_window=9, draft=guess)
    made.read(PROMPT, 5)
    return made


def take(loop: Loop, n: int, sampling: Sampling | None = None) -> list[Made]:
    return [made for _, made in zip(range(n), loop.tokens(sampling or Sampling()), strict=False)]


def tokens(loop: Loop, n: int, sampling: Sampling | None = None) -> list[int]:
    return [made.token for made in take(loop, n, sampling)]


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED, PENALISED], ids=["greedy", "p", "pen"])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_the_text_of_the_model_alone(n: int, sampling: Sampling):
    """For 20 times the capacity, past wraps and epochs; as many guesses right as wrong."""
    model, draft = small(), small(noise=0.15)
    expected = take(loop(model), 20 * CAPACITY, sampling)
    mine = loop(model, draft, n)
    full = sum(c.nbytes for c in (*make_full(model), *make_full(draft)))
    made: list[Made] = []
    for step in mine.tokens(sampling):
        made.append(step)
        assert mine.position == len(PROMPT) + len(made)
        if len(made) == len(expected):
            break
    assert [m.token for m in made] == [m.token for m in expected]
    for a, b in zip(made[::7], expected[::7], strict=True):
        np.testing.assert_allclose(np.array(a.logprobs), np.array(b.logprobs), atol=TOLERANCE)
    assert mine.draft
    assert 0.03 < mine.draft.acceptance < 0.97
    assert sum(m.from_draft for m in made) <= mine.draft.right
    caches = [*mine.caches, *mine.draft.caches]
    assert sum(c.nbytes for c in caches) == full
    assert max(c.offset for c in caches) < E + n + 1
    assert len(set(m.token for m in made)) > 5


def make_full(model: Any) -> list[Any]:
    caches = make_cache(model)
    model(mx.zeros((1, 5 * CAPACITY), mx.int32), cache=caches)
    return caches


@pytest.mark.parametrize("seed", range(2))
def test_any_draft_will_do(seed: int):
    """One that is always wrong, one that is always right, and one of another shape."""
    model = small()
    expected = tokens(loop(model, seed=seed), 90, SAMPLED)
    same, other = loop(model, small(), seed=seed), loop(model, small(seed=5), seed=seed)
    smaller = loop(model, small(layers=1, vocab_size=40, hidden_size=16), seed=seed)
    for mine in (same, other, smaller):
        assert tokens(mine, 90, SAMPLED) == expected
    assert same.draft.acceptance > 0.99, "the same random numbers"
    assert other.draft.acceptance < 0.5
    assert all(0 <= mine.draft.acceptance <= 1 for mine in (same, other, smaller))


class Chain(nn.Module):
    """A model for which the next token depends on the newest alone."""

    def __init__(self, seed: int, vocabulary: int = 5):
        super().__init__()
        shape, key = (vocabulary, vocabulary), mx.random.key(seed)
        self.logits = mx.random.normal(shape, key=key)
        self.most = 0

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        self.most = max(self.most, tokens.max().item())
        return self.logits[tokens]


@pytest.mark.parametrize("words", [3, 5, 8])
def test_each_reads_only_words_that_it_knows(words: int):
    """An index beyond the embedding reads anything, and MLX does not say so."""
    model, draft = Chain(1), Chain(2, words)
    mine = Loop(model, [], key=mx.random.key(1), draft=Draft(draft, [], 2))
    mine.read([0, 4, 2])
    assert len(set(tokens(mine, 100, Sampling(make_sampler(1.0))))) == 5
    assert model.most == 4
    assert draft.most == min(words, 5) - 1


def test_without_a_key_of_its_own_the_distribution_is_the_model_s():
    """Drawn from MLX's state there is no text to compare, but how often what follows what.

    Drawing anew after a wrong guess, for one, would make what the draft likes more frequent.
    """
    model, draft = Chain(1), Chain(2)
    mine = Loop(model, [], key=None, draft=Draft(draft, [], 1))
    mine.read([0])
    mx.random.seed(1)
    text = [0, *tokens(mine, 4000, Sampling(make_sampler(1.0)))]
    assert 0.1 < mine.draft.acceptance < 0.9
    counts = np.zeros((5, 5))
    np.add.at(counts, (text[:-1], text[1:]), 1)
    share = np.array(mx.softmax(model.logits, axis=-1))
    times = counts.sum(axis=1, keepdims=True)
    assert (np.abs(counts - times * share) / np.sqrt(times * share * (1 - share))).max() < 4


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 7, 23, 50])
def test_breaking_off_in_the_middle_of_a_round(at: int):
    """What was read ahead is taken back: feeding, copying and another sampler go on exactly."""
    model, draft = small(), small(noise=0.15)
    straight, mine = loop(model), loop(model, draft)
    assert tokens(mine, at, SAMPLED) == tokens(straight, at, SAMPLED)
    fork = mine.fork()
    for each in (straight, mine, fork):
        each.read([4, 8, 15])
    for each in (mine, fork):
        np.testing.assert_allclose(
            np.array(each.logits), np.array(straight.logits), atol=TOLERANCE
        )
    expected = tokens(straight, 40)
    assert tokens(mine, 40) == tokens(fork, 40) == expected
    mine.settle()
    assert mine.position == straight.position == mine.caches[0].tokens
    unread = len(mine.draft._unread)
    assert mine.draft.caches[0].tokens + unread == mine.position


def test_taking_back_and_drafting_share_the_slots():
    model, draft = small(rollback=8), small(rollback=8, noise=0.15)
    straight, mine = loop(model), loop(model, draft)
    expected = tokens(straight, 60)
    assert tokens(mine, 30) == expected[:30]
    n = min(4, mine.spare)
    assert n >= 3
    mine.rollback(n)
    assert tokens(mine, 34) == expected[30 - n : 64 - n]


# mlx-lm's own speculative decoding over our caches.


@pytest.mark.parametrize("n", [1, 4])
def test_mlx_lm_s_own_drafting_is_exact(n: int):
    """It asks whether a cache can be trimmed, and then trims: past the wrap too."""
    model, draft = small(rollback=4), small(rollback=4, noise=0.15)
    prompt = mx.array(PROMPT)
    expected = [int(t) for t, _ in generate_step(prompt, model, max_tokens=100)]
    made = list(
        speculative_generate_step(prompt, model, draft, num_draft_tokens=n, max_tokens=100)
    )
    assert [int(token) for token, _, _ in made] == expected
    assert 0 < sum(from_draft for _, _, from_draft in made) < 100


def test_mlx_lm_s_own_drafting_is_never_wrong_in_silence():
    """With too few spare slots it raises; without any it refuses at once."""
    prompt = mx.array(PROMPT)
    for rollback, error, words in ((2, CacheError, "only 2"), (0, ValueError, "trimmable")):
        model, draft = small(rollback), small(rollback, noise=0.5)
        with pytest.raises(error, match=words):
            list(speculative_generate_step(prompt, model, draft, num_draft_tokens=4))


# The stream and the command.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a draft, which is the model with noise on its weights."""
    root = tmp_path_factory.mktemp("models")
    model, draft = make_folder(root / "model"), make_folder(root / "draft")
    weights = mx.load(str(draft / "model.safetensors"))
    mx.random.seed(2)
    noisy = {k: x + 0.1 * x.std() * mx.random.normal(x.shape) for k, x in weights.items()}
    mx.save_safetensors(str(draft / "model.safetensors"), noisy, {"format": "mlx"})
    return model, draft


def test_a_stream_with_a_draft(folders: tuple[Path, Path], tmp_path: Path):
    """The same text as without, saved and resumed on the way, and who guessed what."""
    config = SinkConfig(4, 20, epoch=40, rollback=4)
    model, tokenizer = mlx_sink.load(folders[0], config)
    draft, _ = mlx_sink.load(folders[1], config)
    options: dict[str, Any] = {"sampler": make_sampler(0.8), "ignore_eos": True, "flush": False}
    alone = Stream(model, tokenizer, seed=4)
    alone.feed("the cat went")
    expected = [r.token for r in alone.generate(120, **options)]
    mine = Stream(model, tokenizer, seed=4, draft_model=draft, num_draft_tokens=4)
    mine.feed("the cat went")
    responses = list(mine.generate(50, **options))
    mine.save(tmp_path / "s")
    for resumed in (
        Stream.resume(tmp_path / "s", model, tokenizer),
        Stream.resume(tmp_path / "s", model, tokenizer, draft_model=draft, num_draft_tokens=4),
        mine,
    ):
        more = list(resumed.generate(70, **options))
        assert [r.token for r in (*responses, *more)] == expected
        assert any(r.from_draft for r in more) == (resumed.drafted[0] > 0)
    guessed, right = mine.drafted
    assert 0 < right < guessed
    assert mine.nbytes == 2 * alone.nbytes
    assert alone.drafted == (0, 0)


def test_what_a_stream_refuses(folders: tuple[Path, Path]):
    model, tokenizer = mlx_sink.load(folders[0], SinkConfig(4, 20, rollback=2))
    draft, _ = mlx_sink.load(folders[1], SinkConfig(4, 20))
    with pytest.raises(CacheError, match=r"the model has 2: attach it with .*rollback=3"):
        Stream(model, tokenizer, draft_model=draft, num_draft_tokens=3)
    with pytest.raises(CacheError, match=r"the draft model has 0: attach it"):
        Stream(model, tokenizer, draft_model=draft, num_draft_tokens=2)
    with pytest.raises(InputError, match="num_draft_tokens must be at least 1, got 0"):
        Stream(model, tokenizer, draft_model=draft, num_draft_tokens=0)
    with pytest.raises(InputError, match=r"draft_model does not go .* use Stream"):
        list(mlx_sink.stream_generate(model, tokenizer, "the", draft_model=draft))


def test_a_layer_that_cannot_take_tokens_back(folders: tuple[Path, Path]):
    draft, tokenizer = mlx_sink.load(folders[0], SinkConfig(4, 20, rollback=2))
    model = tiny("qwen3_next")
    attach(model, SinkConfig(4, 20))
    with pytest.raises(
        CacheError, match=r"the model cannot take tokens back.*layer 0 has an? Arr"
    ):
        Stream(model, tokenizer, draft_model=draft, num_draft_tokens=2)


def test_a_draft_keeps_what_its_own_context_holds(
    folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
):
    """It may be trained on less; and its ring is never quantised."""
    short = make_folder(tmp_path_factory.mktemp("models") / "short", max_position_embeddings=16)
    _, tokenizer = mlx_sink.load(folders[0])
    config = SinkConfig(4, 40, rollback=3, kv_bits=8)
    draft = load_draft(short, tokenizer, config)
    assert draft.make_cache.config == SinkConfig(4, 12, rollback=3)
    with pytest.raises(ConfigError, match="context of 16 tokens does not hold the 16 sinks"):
        load_draft(short, tokenizer, SinkConfig(16, 20))


def test_the_command(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    """The same text with a draft as without; the acceptance rate in the statistics."""
    command = ["--model", str(folders[0]), "-p", "the cat", "--window", "20", "-m", "100"]
    command += ["--ignore-eos", "--temp", "0.8", "--seed", "3"]
    assert main(command) == 0
    alone = capsys.readouterr().out
    command += ["--draft-model", str(folders[1]), "--num-draft-tokens", "2"]
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert out == alone
    drafted = json.loads(err.splitlines()[-1])["draft"]
    assert 0 < drafted["accepted"] < drafted["guessed"]
    rate = drafted["accepted"] / drafted["guessed"]
    assert drafted["acceptance_rate"] == pytest.approx(rate, abs=1e-4)
    assert main(command) == 0
    assert f"guessed {drafted['guessed']} tokens" in capsys.readouterr().err
