"""attach: what it reports, what mlx-lm then does, and every model that it refuses."""

from __future__ import annotations

import json
from typing import Any

import made_up
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every import tiny
from mlx_lm import stream_generate
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tiny import FAMILIES, VOCABULARY, build, every, mixed, plain, random_tokens, run
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mlx_sink import CacheError, ConfigError, SinkConfig, UnsupportedModelError, attach, detach
from mlx_sink.attention.rope import Rotation
from mlx_sink.cache.group import leaves
from mlx_sink.cache.sink_cache import SinkCache
from mlx_sink.models.attach import make_cache
from mlx_sink.models.hook import HOOKED, MARK
from mlx_sink.models.trace import WatchedCache

CONFIG = SinkConfig(3, 10, epoch=17)


def refusal(model: nn.Module, config: SinkConfig = CONFIG) -> str:
    """Return the one line with which a model is refused, and check that nothing is left set."""
    with pytest.raises(UnsupportedModelError) as caught:
        attach(model, config)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__cause__ is None
    assert "make_cache" not in vars(model)
    return message


# What it reports and sets.


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, mx.float32) for family in FAMILIES),
        ("llama", mx.float16),
        ("stablelm", mx.bfloat16),
    ],
    ids=str,
)
def test_reported_bytes_are_the_bytes_of_full_caches(family: str, dtype: mx.Dtype):
    """Users plan memory by this number: it must be right to the byte."""
    model = build(family, 2)
    model.set_dtype(dtype)
    report = attach(model, CONFIG)
    caches = model.make_cache()
    run(model, random_tokens(20), caches)
    assert [layer.nbytes for layer in report.layers] == [cache.nbytes for cache in caches]
    assert report.nbytes == sum(cache.nbytes for cache in caches)
    assert [layer.slots for layer in report.layers] == [CONFIG.capacity] * 2


def test_report():
    """The table folds layers that are alike, and the dictionary holds everything."""
    model = build("smollm3", 5, no_rope_layers=[1, 1, 0, 1, 1])
    report = attach(model, CONFIG)
    assert [layer.positions for layer in report.layers] == ["rope", "rope", "none", "rope", "rope"]
    assert report.model_type == "smollm3"
    first, _, *table = str(report).splitlines()
    assert first == "smollm3: 3 sinks + window 10 = 13 tokens, 8.32 kB when full"
    assert [line.split() for line in table] == [
        ["4", "sink", "ring", "mlx_sink", "rope", "13", "128", "6656", "0-1,", "3-4"],
        ["1", "sink", "ring", "mlx_sink", "none", "13", "128", "1664", "2"],
    ]
    as_json = json.loads(json.dumps(report.to_dict()))
    assert as_json["bytes"] == report.nbytes == 8320
    assert as_json["config"] == CONFIG.to_dict()
    assert [layer["bytes"] for layer in as_json["layers"]] == [1664] * 5


def test_mlx_lm_makes_our_caches():
    """Everything built on mlx-lm must get the bounded cache without knowing."""
    model = build("llama", 2)
    attach(model, CONFIG)
    with pytest.warns(RuntimeWarning, match="max_kv_size=8 is not used"):
        sized = make_prompt_cache(model, max_kv_size=8)
    for caches in (make_prompt_cache(model), sized):
        assert [type(cache) for cache in caches] == [SinkCache, SinkCache]
        assert all(cache.empty() and cache.ring.capacity == 13 for cache in caches)
    first, second = make_prompt_cache(model), make_prompt_cache(model)
    run(model, random_tokens(5), first)
    assert [cache.tokens for cache in (*first, *second)] == [5, 5, 0, 0]


def test_weights_and_parameters_stay():
    """Saving or converting an attached model must write what it would have written."""
    model = build("llama", 2)
    before = {name: np.array(w) for name, w in nn.utils.tree_flatten(model.parameters())}
    attach(model, CONFIG)
    after = dict(nn.utils.tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(np.array_equal(np.array(after[name]), before[name]) for name in before)


def test_layers_with_equal_rope_share_a_rotation():
    """Angles are kept per rotation: one per layer would work them out again in each."""
    model = build("smollm3", 4, no_rope_layers=[1, 0, 1, 0])
    attach(model, CONFIG)
    a, b, c, d = (cache.rotation for cache in model.make_cache())
    assert a is c
    assert b is d
    assert a is not b


def test_attaching_twice_replaces_the_settings():
    """Also across threads of an app: the last settings count, and hooks do not pile up."""
    model = build("llama", 2)
    attach(model, CONFIG)
    hook = getattr(llama, HOOKED)
    old = model.make_cache()
    attach(model, SinkConfig(1, 5))
    assert getattr(llama, HOOKED) is hook
    assert [cache.ring.capacity for cache in model.make_cache()] == [6, 6]
    tokens = random_tokens(40)
    alone = run(model, tokens, model.make_cache(), mixed(4, 1))
    run(model, tokens, old, mixed(7, 1))
    assert [cache.ring.capacity for cache in old] == [13, 13]
    assert np.array_equal(run(model, tokens, model.make_cache(), mixed(4, 1)), alone)


def test_detach_restores_mlx_lm():
    """Afterwards the model must be as if it had never been attached."""
    model, tokens = build("llama", 2), random_tokens(40)
    before = plain(model, tokens)
    detach(model)
    attach(model, CONFIG)
    detach(model)
    detach(model)
    caches = make_prompt_cache(model)
    assert [type(cache) for cache in caches] == [KVCache, KVCache]
    assert np.array_equal(run(model, tokens, caches), before)


def test_other_models_do_not_notice():
    """The hook lies in mlx-lm's module: other models of the family go through it unchanged."""
    attached, other, tokens = build("llama", 2), build("llama", 2, seed=1), random_tokens(40)
    attach(attached, CONFIG)
    assert getattr(getattr(llama, HOOKED), MARK)
    hooked = plain(other, tokens, mixed(7, 1))
    unhooked = getattr(llama, HOOKED).__wrapped__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, HOOKED, unhooked)
        assert np.array_equal(plain(other, tokens, mixed(7, 1)), hooked)


def test_the_default_config_fits_the_trained_context():
    model = build("llama", max_position_embeddings=100)
    assert attach(model).config == SinkConfig(4, 96)
    assert attach(build("llama", max_position_embeddings=None)).config == SinkConfig(4, 1024)


def test_capacity_beyond_the_trained_context_is_refused():
    """Distances that the model never saw in training; the settings from before stay."""
    model = build("llama", max_position_embeddings=100)
    attach(model, SinkConfig(4, 96))
    with pytest.raises(ConfigError, match="more than the 100 tokens the model was trained on"):
        attach(model, SinkConfig(4, 97))
    assert model.make_cache()[0].ring.capacity == 100


# mlx-lm's own generation.


def greedy(model: nn.Module, prompt: np.ndarray, n: int, **options: Any) -> list[int]:
    """Return what mlx-lm's `generate_step` makes of a prompt ``[1, n]``."""
    steps = generate_step(mx.array(prompt[0]), model, max_tokens=n, **options)
    return [token for token, _ in steps]


@pytest.mark.parametrize("family", ["llama", "phi3", "smollm3"])
def test_generates_what_mlx_lm_generates_before_the_wrap(family: str):
    model, prompt = build(family, 2), random_tokens(12)
    theirs = greedy(model, prompt, 20)
    attach(model, SinkConfig(4, 28))
    assert greedy(model, prompt, 20, prefill_step_size=5) == theirs


def test_generates_the_stream_after_the_wrap():
    """mlx-lm's loop, one step ahead and prefilling in its own pieces, against plain steps."""
    model, text = build("llama", 2), random_tokens(50)
    attach(model, CONFIG)
    ours, caches = [], model.make_cache()
    logits = run(model, text, caches)
    for _ in range(40):
        ours.append(int(logits[0, -1].argmax()))
        logits = run(model, np.array([[ours[-1]]]), caches)
    for size in (13, 2048):
        assert greedy(model, text, 40, prefill_step_size=size) == ours


def test_stream_generate():
    """The entry that chats and apps use, with the number of tokens past many wraps."""
    model = build("llama", 2)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), unk_token="w0"
    )
    wrapper, prompt = TokenizerWrapper(tokenizer, eos_token_ids=[VOCABULARY]), random_tokens(9)
    attach(model, CONFIG)
    responses = list(stream_generate(model, wrapper, prompt[0].tolist(), max_tokens=60))
    assert [response.token for response in responses] == greedy(model, prompt, 60)
    assert responses[-1].finish_reason == "length"


def test_batches_of_uneven_prompts_are_refused():
    """Rows that do not move in step would share one position."""
    model = build("llama", 2)
    attach(model, CONFIG)
    generator = BatchGenerator(model)
    generator.insert([[1, 2, 3], [4, 5]], max_tokens=[5, 5])
    with pytest.raises(ValueError, match=r"SinkCache.*does not yet support batching"):
        generator.next()


def test_speculative_decoding_is_refused():
    """After the wrap mlx-lm would go on from drafts that it rejected: it must not even start."""
    model, draft, prompt = build("llama", 2), build("llama", seed=5), random_tokens(10)
    attach(model, SinkConfig(2, 30))
    with pytest.raises(ValueError, match="trimmable"):
        next(speculative_generate_step(mx.array(prompt[0]), model, draft, max_tokens=60))


# How often it calls the model.


def calls_of(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Note every call of a kind of model from now on: its tokens, and whether it is watched."""
    calls: list[tuple[int, bool]] = []
    original = kind.__call__

    def call(self: nn.Module, tokens: mx.array, cache: Any = None) -> mx.array:
        is_watched = any(isinstance(part, WatchedCache) for part in leaves(cache or []))
        calls.append((tokens.shape[1], is_watched))
        return original(self, tokens, cache=cache)

    monkeypatch.setattr(kind, "__call__", call)
    return calls


WATCHED_ONCE = [(2, True), (1, True), (2, False)]
"""A chunk and a token are watched; a chunk goes through the caches that are planned."""


def test_a_known_model_is_watched_once(monkeypatch: pytest.MonkeyPatch):
    model = build("llama", 2)
    calls = calls_of(llama.Model, monkeypatch)
    attach(model, CONFIG)
    assert calls == WATCHED_ONCE


@pytest.mark.parametrize("known", [False, True], ids=["of nobody", "with a foreign part"])
def test_an_unknown_model_is_watched_once(known: bool, monkeypatch: pytest.MonkeyPatch):
    """The check of the contract goes by what was seen: its own calls are real ones."""
    model = build("llama", 2) if known else made_up.Model(made_up.Attention)
    if known:
        model.layers[1].self_attn.rope = type("Rope", (nn.RoPE,), {})(8)
    calls = calls_of(type(model), monkeypatch)
    attach(model, CONFIG)
    assert calls[:3] == WATCHED_ONCE
    assert calls[3:]
    assert not any(is_watched for _, is_watched in calls[3:])


def test_caches_are_made_without_the_model(monkeypatch: pytest.MonkeyPatch):
    """A server makes some for every request."""
    model = build("llama", 2)
    attach(model, CONFIG)
    calls = calls_of(llama.Model, monkeypatch)
    caches = [model.make_cache(), make_cache(model), make_prompt_cache(model)]
    assert not calls
    assert len({id(cache) for layers in caches for cache in layers}) == 6


# What it refuses.


def test_a_refused_architecture_runs_on_in_mlx_lm():
    model = tiny("afm7")
    tokens, config = random_tokens(5), SinkConfig()
    before = model(mx.array(tokens), cache=make_prompt_cache(model))
    assert refusal(model, config).startswith("afm7 is not supported: a norm with weights comes")
    assert mx.array_equal(model(mx.array(tokens), cache=make_prompt_cache(model)), before)


def test_sliding_layers_keep_their_window():
    """A window ring of that length, in the report and in fact; the others get the sinks."""
    kinds = ["full_attention", "sliding_attention"]
    model = build("llama", 2, layer_types=kinds, sliding_window=8)
    report = attach(model, CONFIG)
    assert [layer.cache for layer in report.layers] == ["sink ring", "window ring"]
    sinks, window = (cache.ring for cache in model.make_cache())
    assert (sinks.num_sinks, sinks.window, sinks.epoch) == (3, 10, 17)
    assert (window.num_sinks, window.window, window.epoch) == (0, 8, 17)


def test_dynamic_rope_is_refused():
    """Its frequencies change with the length: no turn makes up for that."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model = build("llama", rope_scaling=scaling, max_position_embeddings=64)
    assert refusal(model) == (
        "llama is not supported: its position embedding is not a fixed rotation: "
        "it changes with the position (layer 0)"
    )


def test_a_bypass_that_begins_later_raises():
    """The trace sees one path; another one must not run wrong in silence either."""
    model = build("llama", 2)
    attach(model, CONFIG)
    caches = model.make_cache()
    run(model, random_tokens(5), caches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama, HOOKED, getattr(llama, HOOKED).__wrapped__)
        run(model, random_tokens(1), caches)
        with pytest.raises(CacheError, match="does not attend through mlx_sink"):
            run(model, random_tokens(1), caches)


def test_a_cache_with_another_rotation_shows():
    """The equality tests would pass for any turn if the turn did not matter."""
    model, tokens = build("llama", 2), random_tokens(40)
    attach(model, CONFIG)
    right = run(model, tokens, model.make_cache(), every(1))
    still = [SinkCache(CONFIG, Rotation([])) for _ in model.layers]
    assert np.abs(run(model, tokens, still, every(1)) - right)[:, 20:].max() > 0.05
