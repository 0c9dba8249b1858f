"""What a config.json says in transformers' spelling, in the one that mlx-lm reads.

From version 5 on, transformers writes the rotary embedding as one object, ``rope_parameters``,
renames fields, and leaves out what its own classes hold fixed. Most of mlx-lm's models do not know
this: they fail for lack of a field or, worse, take a default of their own without a word.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

from mlx_sink.errors import ModelError
from mlx_sink.models.checkpoints.fields import (
    ABSENT,
    CHANGED,
    EVERYWHERE,
    MISSING,
    PER_LAYER,
    Config,
)

GEMMAS = ("gemma3", "gemma4", "gemma4_unified")


def for_mlx_lm(config: Config, tensors: Collection[str] = ()) -> dict[str, Any]:
    """Return what a configuration says in transformers 5's spelling, in the one mlx-lm reads.

    Args:
        config: The contents of config.json.
        tensors: Names of the weights, if they are known. Where the text model and what is around
            it disagree on whether its embeddings are tied, they tell.

    Returns:
        Keys to be added to it. Those it has are changed only where mlx-lm does not know their
        value.

    Raises:
        ModelError: It says something that mlx-lm has no way to say.
    """
    added = _level(config)
    text = config.get("text_config")
    if isinstance(text, dict):
        text = cast("dict[str, Any]", text)
        inner = _level(text) | _tied(config, text, tensors)
        if inner:
            added["text_config"] = text | inner
        # mlx-lm's Gemmas take the vocabulary of the outer level, where transformers has none.
        if "vocab_size" in text and config.get("model_type") in GEMMAS:
            added.setdefault("vocab_size", config.get("vocab_size") or text["vocab_size"])
    return {k: v for k, v in added.items() if k not in config or config[k] != v}


def _level(config: Config) -> dict[str, Any]:
    """Return the additions to one level of a configuration."""
    kind = str(config.get("model_type"))
    _check(kind, config)
    added = {k: v for k, v in _rope(config).items() if config.get(k) is None}
    for field, rule in (EVERYWHERE | MISSING.get(kind, {})).items():
        if config.get(field) is None and added.get(field) is None:
            value = rule({**config, **added})
            if value is not ABSENT:
                added[field] = value
    for field, rule in CHANGED.get(kind, {}).items():
        value = rule({**config, **added})
        if value is not ABSENT:
            added[field] = value
    return added


def _rope(config: Config) -> dict[str, Any]:
    """Return ``rope_parameters`` as the fields that it replaces."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    added: dict[str, Any] = {}
    rope = cast("dict[str, Any]", rope)
    local = rope.get("sliding_attention")
    if isinstance(local, dict) and "rope_theta" in local:
        added["rope_local_base_freq"] = local["rope_theta"]
    # Where the kinds of layers differ, what mlx-lm calls rope_theta is that of the full ones.
    if isinstance(rope.get("full_attention"), dict):
        rope = cast("dict[str, Any]", rope["full_attention"])
    added |= {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    if rope.get("rope_type", "default") != "default":
        added["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return added


def _tied(config: Config, text: Config, tensors: Collection[str]) -> dict[str, Any]:
    """Return whether a text model's embeddings are tied, where its own level is wrong about it."""
    outer, inner = (level.get("tie_word_embeddings") for level in (config, text))
    if outer is None or outer == inner:
        return {}
    if tensors and inner is not None:
        outer = not any(name.endswith("lm_head.weight") for name in tensors)
    return {} if outer == inner else {"tie_word_embeddings": outer}


def _check(kind: str, config: Config) -> None:
    """Raise if mlx-lm would build another model than the one described, without a word."""
    if config.get("per_layer_config") and kind not in PER_LAYER:
        raise ModelError(f"mlx-lm's {kind} does not know layers that differ (per_layer_config)")
    layers = cast("list[str]", config.get("layer_types") or [])
    if kind == "minimax" and "linear_attention" in layers:
        raise ModelError("mlx-lm's minimax is MiniMax-M2, which has no linear attention")
    rope = config.get("rope_parameters")
    if kind == "olmo3" and isinstance(rope, dict) and "full_attention" in rope:
        parts = cast("dict[str, Any]", rope).values()
        if len({str(cast("Config", part).get("rope_theta")) for part in parts}) > 1:
            raise ModelError("mlx-lm's olmo3 knows one rope_theta for all layers only")
    text = config.get("text_config")
    if kind == "llama4" and isinstance(text, dict):
        rotated = cast("list[int]", cast("Config", text).get("no_rope_layers") or [])
        if rotated != [int((i + 1) % 4 != 0) for i in range(len(rotated))]:
            raise ModelError("mlx-lm's llama4 leaves out RoPE in every 4th layer (no_rope_layers)")
