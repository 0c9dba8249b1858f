"""How a checkpoint's weights are to be written: cast and quantised as mlx-lm does."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils

from mlx_sink.errors import ConfigError
from mlx_sink.models.checkpoints.quantization import MODES
from mlx_sink.models.lazy import cast_weights, dtype_of, weight_bytes

# `mlx_lm.convert` is the function: it has taken the module's place in the package.
_converter: Any = import_module("mlx_lm.convert")

PREDICATES: tuple[str, ...] = tuple(_converter.QUANT_RECIPES)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the weights are to be written; names and meanings are mlx-lm's.

    Attributes:
        quantize: Quantise the weights.
        q_bits: Bits per weight; the mode's default if ``None``.
        q_group_size: Weights that share a scale; the mode's default if ``None``.
        q_mode: ``"affine"``, ``"mxfp4"``, ``"nvfp4"`` or ``"mxfp8"``.
        quant_predicate: A mixed-bit recipe such as ``"mixed_3_6"``.
        dtype: Type of the weights that are not quantised; the checkpoint's if ``None``.

    Raises:
        ConfigError: The options contradict each other.
    """

    quantize: bool = False
    q_bits: int | None = None
    q_group_size: int | None = None
    q_mode: str = "affine"
    quant_predicate: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        given = {
            "q_bits": self.q_bits is not None,
            "q_group_size": self.q_group_size is not None,
            "q_mode": self.q_mode != "affine",
            "quant_predicate": self.quant_predicate is not None,
        }
        for name, is_given in given.items():
            if is_given and not self.quantize:
                raise ConfigError(f"{name} does nothing without quantize")
        if self.quant_predicate and self.q_mode != "affine":
            raise ConfigError(f"quant_predicate goes with q_mode 'affine', not {self.q_mode!r}")
        for name, value in (("q_bits", self.q_bits), ("q_group_size", self.q_group_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")


def rewritten(
    model: nn.Module, config: dict[str, Any], recipe: Recipe
) -> tuple[nn.Module, dict[str, Any]]:
    """Cast and quantise a model in place, as `mlx_lm.convert` does; nothing is computed yet.

    Args:
        model: A model whose weights are loaded lazily.
        config: Its configuration.
        recipe: What to do.

    Returns:
        The model, and the configuration that goes with it.

    Raises:
        ConfigError: The recipe does not fit the model.
    """
    dtype = recipe.dtype or dtype_of(config)
    if dtype is not None:
        cast_weights(model, dtype)
    if not recipe.quantize:
        return model, config
    before = weight_bytes(model)
    try:
        predicate: Any = None
        if recipe.quant_predicate is not None:
            group = recipe.q_group_size or MODES["affine"][0]
            predicate = _converter.mixed_quant_predicate_builder(
                recipe.quant_predicate, model, group
            )
        model, config = mlx_lm_utils.quantize_model(
            model,
            config,
            recipe.q_group_size,
            recipe.q_bits,
            mode=recipe.q_mode,
            quant_predicate=predicate,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the model cannot be quantised like this: {error}") from None
    if weight_bytes(model) == before:
        raise ConfigError(
            "--quantize changes nothing: no layer's width is a multiple of the group size, "
            "or all are quantised already"
        )
    return model, config
