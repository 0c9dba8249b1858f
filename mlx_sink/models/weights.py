"""Build the model of a checked folder by mlx-lm, with weights that may lie elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm import utils as mlx_lm_utils

from mlx_sink.models.checkpoints.checkpoint import Checkpoint


def load_model(
    found: Checkpoint,
    model_config: dict[str, Any],
    *,
    lazy: bool = False,
    unread: bool = False,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model; errors are whatever mlx-lm raises.

    Args:
        found: Its folder.
        model_config: Goes before what the folder says.
        lazy: As in mlx-lm.
        unread: Weights that lie elsewhere are not read: they have their shapes and types.
        options: As in mlx-lm's ``load_model``.
    """
    how: dict[str, Any] = {"lazy": lazy or unread, "model_config": model_config, **options}
    if found.weights is None:
        return cast("Any", mlx_lm_utils.load_model(found.path, **how))
    weights = found.weights(unread)
    how["get_model_classes"] = partial(_classes, weights)
    model, config = cast("Any", mlx_lm_utils.load_model(found.path, **how))
    del model.sanitize
    return model, config


def load(
    found: Checkpoint,
    model_config: dict[str, Any],
    *,
    adapter_path: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    lazy: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Load a model, its tokenizer and its configuration, as ``mlx_lm.load`` does."""
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if found.weights is None:
        loaded = mlx_lm.load(
            str(found.path),
            return_config=True,
            model_config=model_config,
            adapter_path=adapter_path,
            tokenizer_config=tokenizer_config,
            lazy=lazy,
            **trust,
        )
        return cast("Any", loaded)
    model, config = load_model(found, model_config, lazy=lazy, **trust)
    utils = cast("Any", mlx_lm_utils)
    if adapter_path is not None:
        model = utils.load_adapters(model, adapter_path)
        model.eval()
    ends = config.get("eos_token_id")
    tokenizer = utils.load_tokenizer(found.path, tokenizer_config, eos_token_ids=ends)
    return model, tokenizer, config


def _classes(weights: dict[str, mx.array], config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return mlx-lm's classes for a model, which then takes other weights than it is given."""
    kind, arguments = cast("Any", mlx_lm_utils)._get_classes(config)

    def make(args: Any) -> Any:
        model = kind(args)
        sanitize = getattr(model, "sanitize", None)

        def taken(_: object) -> Any:
            return weights if sanitize is None else sanitize(weights)

        model.sanitize = taken
        return model

    return make, arguments
