"""What mlx-lm would do to our caches without a word is refused, and names what to do instead."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from every import tiny
from folder import make_folder
from mlx_lm.generate import generate_step, speculative_generate_step, stream_generate
from mlx_lm.models.cache import (
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.models.cache import LRUPromptCache as Kept
from tiny import build, random_tokens

import mlx_sink
from mlx_sink import CacheError, InputError, SinkConfig, attach, detach
from mlx_sink.cache.group import CacheGroup

CONFIG = SinkConfig(3, 10, epoch=17)

KINDS = {
    "deepseek_v3": "latent keys",
    "deepseek_v32": "a ring and an index in one layer",
    "falcon_h1": "a state and a ring in one layer",
    "gemma3_text": "windows of the model's own",
    "llama4": "chunked attention",
    "llama": "a ring",
    "longcat_flash": "two rings in one layer",
    "qwen3_next": "recurrent layers",
}
each_kind = pytest.mark.parametrize("name", KINDS, ids=[f"{n}: {k}" for n, k in KINDS.items()])


def attached(name: str) -> nn.Module:
    model = tiny(name)
    attach(model, CONFIG)
    return model


def caches_after(model: nn.Module, n: int) -> list[Any]:
    caches = make_prompt_cache(model)
    if n:
        model(mx.array(random_tokens(n)), cache=caches)
        mx.eval([cache.state for cache in caches])
    return caches


@each_kind
@pytest.mark.parametrize("tokens", [0, 9])
def test_a_prompt_cache_that_nothing_loads_is_not_written(name: str, tokens: int, tmp_path: Path):
    caches = caches_after(attached(name), tokens)
    with pytest.raises(ValueError, match=r"mlx_sink\.Stream\.save"):
        save_prompt_cache(str(tmp_path / "prompt.safetensors"), caches, {"model": name})
    assert not list(tmp_path.iterdir())


def test_a_group_without_a_ring_is_no_prompt_cache_either(tmp_path: Path):
    """mlx-lm knows the class no more than those of the rings."""
    group = CacheGroup(KVCache(), KVCache())
    with pytest.raises(ValueError, match=r"mlx_sink\.Stream\.save"):
        save_prompt_cache(str(tmp_path / "prompt.safetensors"), [group])


def test_what_mlx_lm_can_load_it_still_saves(tmp_path: Path):
    """A model of recurrent layers alone keeps mlx-lm's caches; so does one that was detached."""
    for name in ("mamba2", "llama"):
        model, file = attached(name), str(tmp_path / f"{name}.safetensors")
        if name == "llama":
            detach(model)
        caches, rest = caches_after(model, 9), mx.array(random_tokens(3, seed=1))
        save_prompt_cache(file, caches)
        assert mx.array_equal(
            model(rest, cache=load_prompt_cache(file)), model(rest, cache=caches)
        )


@each_kind
def test_states_are_evaluated_copied_and_put_back(name: str):
    """What mlx-lm does with a state beside saving it; its server keeps deep copies of caches."""
    model = attached(name)
    caches, rest = caches_after(model, 30), mx.array(random_tokens(3, seed=1))
    kept = Kept()
    kept.insert_cache(name, [1, 2], copy.deepcopy(caches))
    other, fresh = kept.fetch_nearest_cache(name, [1, 2])[0], make_prompt_cache(model)
    for cache, mine in zip(fresh, caches, strict=True):
        cache.state = copy.deepcopy(mine.state)
    expected = model(rest, cache=caches)
    assert mx.array_equal(model(rest, cache=other), expected)
    assert mx.array_equal(model(rest, cache=fresh), expected)


@each_kind
@pytest.mark.parametrize("start", [{}, {"quantized_kv_start": 0}], ids=["as usual", "at once"])
@pytest.mark.parametrize("length", [1, 9])
def test_kv_bits_is_refused_in_the_first_call(name: str, start: dict[str, int], length: int):
    """mlx-lm waits for an offset of 5,000, which a bounded one may never have."""
    prompt = mx.array(random_tokens(length)[0])
    with pytest.raises(CacheError, match=r"instead of mlx-lm's kv_bits, .*SinkConfig\(kv_bits="):
        next(generate_step(prompt, attached(name), kv_bits=8, **start))


def test_kv_bits_is_refused_for_a_draft_too():
    """Of the two models either may be the attached one."""
    config, prompt = SinkConfig(4, 20, rollback=4), mx.array(random_tokens(9)[0])
    for which in (0, 1):
        models = build("llama", 2), build("llama", seed=5)
        attach(models[which], config)
        with pytest.raises(CacheError, match="kv_bits"):
            next(speculative_generate_step(prompt, *models, kv_bits=8))


def test_without_kv_bits_nothing_is_asked():
    model = attached("llama")
    assert len(list(generate_step(mx.array(random_tokens(9)[0]), model, max_tokens=3))) == 3


def test_kv_bits_of_a_detached_model_is_mlx_lms_own():
    model = build("llama", head_dim=32)
    attach(model, CONFIG)
    detach(model)
    prompt = mx.array(random_tokens(9)[0])
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    steps = generate_step(prompt, model, max_tokens=3, **options)
    assert len(list(steps)) == 3


@pytest.mark.parametrize("size", [1, 12, 14, 4096])
def test_a_size_that_is_not_used_is_told_once(size: int):
    model = attached("llama")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            caches = make_prompt_cache(model, max_kv_size=size)
    (message,) = {str(warning.message) for warning in told}
    assert len(told) == 1
    assert message.startswith(f"max_kv_size={size} is not used: ")
    assert message.endswith("num_sinks + window = 13 tokens")
    assert told[0].filename == __file__
    assert max(cache.ring.capacity for cache in caches) == 13


def test_a_size_is_told_of_wherever_mlx_lm_takes_it(tmp_path: Path):
    model, tokenizer = mlx_sink.load(make_folder(tmp_path / "m"), SinkConfig(4, 20))
    with pytest.warns(RuntimeWarning, match=r"max_kv_size=50 is not used"):
        list(stream_generate(model, tokenizer, "the cat", max_tokens=2, max_kv_size=50))


def test_nothing_is_told_without_a_reason():
    """No size; the very size; our own call; and caches that are not ours."""
    model = attached("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_prompt_cache(model)
        make_prompt_cache(model, max_kv_size=13)
        max_kv_size = 99
        assert model.make_cache()[0].ring.capacity < max_kv_size
        detach(model)
        make_prompt_cache(model, max_kv_size=8)


def test_our_own_functions_take_no_foreign_caches(tmp_path: Path):
    """One that was loaded from a file of mlx-lm's would grow for ever."""
    model, tokenizer = mlx_sink.load(make_folder(tmp_path / "m"), SinkConfig(4, 20))
    for foreign, named in (
        ([KVCache(), KVCache()], "2 KVCache"),
        ([*model.make_cache()[:1], RotatingKVCache(9)], "1 SinkCache, 1 RotatingKVCache"),
        (model.make_cache()[:1], "1 SinkCache"),
        ([], "none"),
    ):
        with pytest.raises(
            InputError, match=f"model.make_cache.., with 2 SinkCache, got {named}$"
        ):
            mlx_sink.generate(model, tokenizer, "the cat", 2, prompt_cache=foreign)
    assert mlx_sink.generate(model, tokenizer, "a", 2, prompt_cache=model.make_cache()) is not None
