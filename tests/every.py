"""A tiny random instance of every architecture of the installed mlx-lm.

The list is read from the package. A configuration is filled by the names of its fields
(`every_configs.FIELDS`); what that rule does not reach is in `every_configs.OVERRIDES`. The
weights are random and large enough for the logits to depend on positions and on the context.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import io
import pkgutil
import sys
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .every_configs import FIELDS, LAYERS, MIXED, NO_SINGLE, OVERRIDES, SINGLE

GAIN = 1.5
"""What a projection multiplies the standard deviation of its input by."""

SPREAD = 0.2
"""Standard deviation of what is added to vectors: norms, biases, learned sinks, gates."""


@cache
def _survey() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """Import every module of the package: the architectures, and why others would not import."""
    found: dict[str, ModuleType] = {}
    failed: dict[str, str] = {}
    for info in pkgutil.iter_modules(mlx_lm.models.__path__):
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                module = importlib.import_module(f"mlx_lm.models.{info.name}")
        except (ImportError, SystemExit) as error:
            failed[info.name] = said.getvalue().strip() or str(error)
        else:
            if hasattr(module, "Model") and hasattr(module, "ModelArgs"):
                found[info.name] = module
    return found, failed


def architectures() -> list[str]:
    """Return the names of all modules that define a ``Model`` and can be imported."""
    return list(_survey()[0])


def unavailable() -> dict[str, str]:
    """Return the modules that cannot be imported here, each with what it said."""
    return dict(_survey()[1])


def tiny(
    name: str,
    n_layers: int | None = None,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Make a random model with as few layers as show every kind of layer that it has.

    With ``n_layers`` the pattern of the layer kinds is cut or repeated. ``options`` are fields
    of the configuration, as in `config`.
    """
    return _make(name, {**OVERRIDES.get(name, {}), **options}, n_layers, dtype, seed)


def one_attention_layer(
    name: str, dtype: mx.Dtype = mx.float32, seed: int = 0, **options: Any
) -> nn.Module | None:
    """Make a random model in which one layer mixes tokens, by full attention.

    Where the architecture insists on another such layer, that layer's output projection is
    zero. Returns None where even that is impossible; `no_single_layer` says why.
    """
    if name in NO_SINGLE:
        return None
    usual = OVERRIDES.get(name, {})
    single = {"layer_types": ("full_attention",)} if "layer_types" in usual else {}
    settings = {**usual, "layers": 1, "silent": (), **single, **SINGLE.get(name, {}), **options}
    model = _make(name, settings, None, dtype, seed)
    weights = tree_flatten(model.parameters())
    silent = [(path, 0 * value) for path, value in weights if path.startswith(settings["silent"])]
    model.update(tree_unflatten(silent))
    return model


def no_single_layer(name: str) -> str | None:
    """Return why `one_attention_layer` makes no model of this architecture, or None."""
    return NO_SINGLE.get(name)


def config(name: str, options: Mapping[str, Any], n_layers: int | None = None) -> dict[str, Any]:
    """Return a configuration as a checkpoint would hold it, for ``ModelArgs.from_dict``.

    In ``options`` a tuple is a pattern, repeated to one entry per layer; a function is called
    with the number of layers, and gives an entry or several. ``layers`` is their number where
    it is neither the length of the longest pattern nor that of `MIXED`.
    """
    patterns = [len(value) for value in options.values() if isinstance(value, tuple)]
    fewest = 2 if any(field in MIXED for field in _fields(_survey()[0][name])) else 1
    n = n_layers or options.get("layers") or max(patterns, default=fewest)
    filled: dict[str, Any] = {**FIELDS, **dict.fromkeys(LAYERS, n), "model_type": name}
    for key, value in options.items():
        if key in ("amend", "silent"):
            continue
        if isinstance(value, tuple):
            value = [value[i % len(value)] for i in range(n)]
        elif callable(value):
            value = value(n)
            value = list(value) if isinstance(value, range) else value
        filled[key] = value
    return copy.deepcopy({**filled, "text_config": filled})


def _fields(module: ModuleType) -> set[str]:
    """Return the configuration fields of a module and of those that it takes models from."""
    names = {getattr(value, "__module__", None) for value in vars(module).values()}
    names |= {value.__name__ for value in vars(module).values() if isinstance(value, ModuleType)}
    sources = [sys.modules[name] for name in names if name and name.startswith("mlx_lm.models.")]
    return {
        field.name
        for source in [module, *sources]
        for value in vars(source).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
        for field in dataclasses.fields(value)
    }


def _make(
    name: str, options: Mapping[str, Any], n_layers: int | None, dtype: mx.Dtype, seed: int
) -> nn.Module:
    module = _survey()[0][name]
    model = module.Model(module.ModelArgs.from_dict(config(name, options, n_layers)))
    options.get("amend", lambda model: None)(model)
    randomize(model, seed)
    keep = getattr(model, "cast_predicate", lambda path: True)
    weights = tree_flatten(model.parameters())
    cast = [
        (path, value.astype(dtype) if value.dtype == mx.float32 and keep(path) else value)
        for path, value in weights
    ]
    model.update(tree_unflatten(cast))
    mx.eval(model.parameters())
    return model


def randomize(model: nn.Module, seed: int) -> None:
    """Replace every parameter by a random one; none stays zero, none is all the same."""
    random = np.random.default_rng(seed)
    weights = [
        (path, mx.array(_random(random, path, value)).astype(value.dtype))
        for path, value in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(weights))


def _random(random: np.random.Generator, path: str, value: mx.array) -> np.ndarray:
    """Return random values of one parameter's shape; packed ones are random bits."""
    if not mx.issubdtype(value.dtype, mx.floating):
        return random.integers(
            0, 2 ** (8 * value.itemsize), value.shape, dtype=f"u{value.itemsize}"
        )
    if path.endswith("dt_bias"):
        value = value * 0 - 3.0
    noise = random.standard_normal(value.shape, dtype=np.float32)
    if value.ndim < 2 or path.endswith(("scales", "biases")):
        return np.array(value.astype(mx.float32)) + SPREAD * noise
    if "embed" in path and value.ndim == 2:
        return 0.5 * noise
    fan_in = value.shape[1] if "conv" in path else value.shape[-1]
    return GAIN / np.sqrt(fan_in) * noise
