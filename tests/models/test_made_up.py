"""Architectures that nobody knows: each is put to the proof on itself, and accepted or refused."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up
import made_up_broken
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from made_up import KEEPS, VOCABULARY, Attention, FastProducts, Model, OwnProducts
from made_up_broken import BREAKS
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import ConcatenateKVCache, KVCache, RotatingKVCache, make_prompt_cache
from test_attach import refusal
from tiny import TOLERANCE, build, cut, every, mixed, recompute

from mlx_sink import SinkConfig, attach
from mlx_sink.models.hook import HOOKED, MARK

CONFIG = SinkConfig(3, 10, epoch=17)
DEFAULT = SinkConfig(3, 10)
"""Its epochs are as long as a user's."""
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (1, 60))


def run(model: nn.Module, caches: Any, lengths: Any = ()) -> np.ndarray:
    """Feed `TOKENS` in pieces and return all logits."""
    pieces = [
        model(mx.array(TOKENS[:, piece]), cache=caches) for piece in cut(TOKENS.shape[1], lengths)
    ]
    return np.array(mx.concatenate(pieces, axis=1))


def test_every_kind_is_listed():
    there = [*vars(made_up).values(), *vars(made_up_broken).values()]
    kinds = {c for c in there if inspect.isclass(c) and issubclass(c, Attention)}
    assert kinds == {*KEEPS, *BREAKS}


@pytest.mark.parametrize("kind", KEEPS, ids=lambda kind: kind.__name__)
def test_what_keeps_the_contract_is_accepted(kind: type[Attention]):
    """And keeps it indeed: the oracle knows nothing of mlx_sink."""
    model = Model(kind, layers=1)
    oracle = recompute(model, TOKENS, CONFIG)
    attach(model, CONFIG)
    np.testing.assert_allclose(run(model, model.make_cache(), mixed(9, 1)), oracle, atol=TOLERANCE)
    model = Model(kind)
    attach(model, CONFIG)
    ours = [run(model, model.make_cache(), cuts) for cuts in ((), every(1), mixed(13, 1, 35))]
    np.testing.assert_allclose(ours[1:], [ours[0]] * 2, atol=TOLERANCE)


@pytest.mark.parametrize("kind", BREAKS, ids=lambda kind: kind.__name__)
def test_what_breaks_it_is_refused(kind: type[Attention]):
    assert refusal(Model(kind), DEFAULT).startswith(f"made_up is not supported: {BREAKS[kind]}")


def test_a_reason_does_not_depend_on_the_sinks():
    """What a model does with its caches is seen alike under every configuration."""
    kind = made_up_broken.AsksWindow
    assert refusal(Model(kind), SinkConfig(0, 10)) == refusal(Model(kind), CONFIG)


@pytest.mark.parametrize(
    ("first", "second"),
    [(Attention, FastProducts), (FastProducts, Attention), (OwnProducts, Attention)],
    ids=lambda kind: kind.__name__,
)
def test_kinds_of_layers_in_one_model(first: type[Attention], second: type[Attention]):
    """Keys that are aligned and queries that are turned, by the same rotation."""
    model, alike = Model(second, first=first), Model(Attention)
    report, _ = attach(model, CONFIG), attach(alike, CONFIG)
    assert {layer.attention for layer in report.layers} == {"model", "mlx_sink"}
    for cuts in (every(1), mixed(9, 1)):
        ours, theirs = (run(m, m.make_cache(), cuts) for m in (model, alike))
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_a_refused_model_goes_on_as_it_was():
    """A wrapped rope or a cache that is left behind would change it."""
    for kind in (made_up_broken.Cut, made_up_broken.NormAfter, made_up_broken.Alibi):
        model = Model(kind)
        before = run(model, make_prompt_cache(model), [60])
        names = [name for name, _ in model.named_modules()]
        refusal(model)
        assert [type(c) for c in make_prompt_cache(model)] == [KVCache, KVCache]
        assert np.array_equal(run(model, make_prompt_cache(model), [60]), before)
        assert [name for name, _ in model.named_modules()] == names


# Caches of their own.


class Windowed(Model):
    """Two windows and a full layer, each under its mask."""

    def __init__(self, kind: type[Attention]):
        super().__init__(kind, layers=3)

    def make_cache(self) -> list[Any]:
        return [RotatingKVCache(max_size=6), KVCache(), RotatingKVCache(max_size=9)]

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        x, caches = self.embed(tokens), cache or self.make_cache()
        for layer, norm, c, n in zip(self.layers, self.norms, caches, (6, None, 9), strict=True):
            x = x + layer(norm(x), self.mask(x, c, n), c)
        return self.out(x)

    def mask(self, x: mx.array, cache: Any, window: int | None) -> Any:
        return create_attention_mask(x, cache, window_size=window, return_array=True)


class Unwindowed(Windowed):
    """Forgets to say in its masks which layers have a window."""

    def mask(self, x: mx.array, cache: Any, window: int | None) -> Any:
        return create_attention_mask(x, KVCache(), return_array=True)


@pytest.mark.parametrize("kind", [Attention, OwnProducts], ids=lambda kind: kind.__name__)
def test_windows_of_its_own(kind: type[Attention]):
    model = Windowed(kind)
    report = attach(model, CONFIG)
    assert [layer.cache for layer in report.layers] == ["window ring", "sink ring", "window ring"]
    assert [layer.slots for layer in report.layers] == [6, 13, 9]
    whole = run(model, model.make_cache())
    for cuts in (every(1), mixed(9, 1, 30)):
        np.testing.assert_allclose(run(model, model.make_cache(), cuts), whole, atol=TOLERANCE)


def test_masks_that_do_not_fit_the_caches_are_refused():
    assert CHECK_LINE in refusal(Unwindowed(Attention))


CHECK_LINE = "made_up is not supported: it is not known, and a check of the contract fails"


class Derived(KVCache):
    """A cache that may keep anything."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Derived, "layer 1 wants a Derived, which is not known"),
        (ConcatenateKVCache, "layer 1 wants a ConcatenateKVCache, which is not known"),
        (object, "layer 1 wants a object, which is not known"),
        (
            lambda: RotatingKVCache(max_size=8, keep=2),
            "layer 1 wants a RotatingKVCache, which is not known",
        ),
    ],
    ids=["derived", "of mlx-lm", "object", "keep"],
)
def test_unknown_caches_are_refused_by_name(make: Callable[[], Any], reason: str):
    class Own(Model):
        def make_cache(self) -> list[Any]:
            return [KVCache(), make()]

    assert refusal(Own(Attention)) == f"made_up is not supported: {reason}"


# Where a model is defined.


def test_a_model_file_that_comes_with_the_weights():
    """mlx-lm executes it without a name in `sys.modules`: the hook must find it all the same."""
    spec = importlib.util.spec_from_file_location("custom_model", Path(made_up.__file__))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, alike = module.Model(module.Attention), Model(Attention)
    report, _ = attach(model, CONFIG), attach(alike, CONFIG)
    assert [layer.attention for layer in report.layers] == ["mlx_sink", "mlx_sink"]
    assert getattr(getattr(module, HOOKED), MARK)
    ours, theirs = (run(m, m.make_cache(), mixed(9, 1)) for m in (model, alike))
    assert np.array_equal(ours, theirs)
    broken = type("Broken", (module.Attention,), {"position": made_up_broken.Counting.position})
    assert refusal(module.Model(broken)).startswith(CHECK_LINE)


def test_parts_whose_bases_are_of_another_module():
    """What runs is defined there, and is hooked there."""
    spec = importlib.util.spec_from_file_location("elsewhere", Path(made_up.__file__))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = type("Model", (module.Model,), {})(type("Own", (module.Attention,), {}))
    report = attach(model, CONFIG)
    assert {layer.attention for layer in report.layers} == {"mlx_sink"}
    assert getattr(getattr(module, HOOKED), MARK)


def test_what_is_derived_from_a_model_of_mlx_lm():
    """Its attention is llama's, and hooked there; but nobody knows what else it does."""

    class Same(llama.Model):
        pass

    class Scaled(llama.Model):
        def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
            return super().__call__(tokens, cache=cache) * (1 + cache[0].offset)

    args = build("llama").args
    assert {layer.attention for layer in attach(Same(args), CONFIG).layers} == {"mlx_sink"}
    assert refusal(Scaled(args)).startswith(
        "llama is not supported: it is not known, and a check of the contract fails"
    )


class Shifted(nn.RoPE):
    """A rotary embedding that also adds."""

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        return super().__call__(x, offset=offset) + offset


def test_a_foreign_part_puts_a_known_model_to_the_proof():
    """One odd layer among good ones is enough to be wrong."""
    model = build("llama", 3)
    model.layers[2].self_attn.rope = Shifted(8)
    assert refusal(model).startswith(
        "llama is not supported: it is not known, and a check of the contract fails"
    )
    model.layers[2].self_attn.rope = type("Same", (nn.RoPE,), {})(8)
    assert len(attach(model, CONFIG).layers) == 3


def test_something_that_is_no_language_model_is_refused():
    assert refusal(nn.Linear(3, 3)) == "linear is not supported: it has no layers"
