"""A model built from its configuration alone, whose weights are never computed.

MLX is lazy: a model of any size costs little more than its list of layers, as long as no value of
a weight is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx import utils
from mlx_lm import utils as mlx_lm_utils

from mlx_sink.errors import ModelError, UnsupportedModelError, one_line
from mlx_sink.models import checkpoint
from mlx_sink.models.architectures import VERIFIED, refusal
from mlx_sink.models.checkpoint import read_json
from mlx_sink.models.load import find_config

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
"""The dtypes that mlx-lm keeps weights in, by their names in configurations and options."""
DEFAULT_DTYPE = "bfloat16"
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
"""Group size and bits of each mode of `mx.quantize`, where a configuration leaves them out."""


def read_config(name: str) -> dict[str, Any]:
    """Read the configuration of a model, and nothing else of it.

    Args:
        name: As in `load.find_config`.

    Raises:
        ModelError: There is none, or it is damaged.
    """
    path = find_config(name)
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{str(path)!r} names no model_type")
    return config


def dtype_of(config: dict[str, Any]) -> str | None:
    """Return the name of the dtype of a model's weights, or ``None`` if that is left open.

    Raises:
        ModelError: It is one that mlx-lm has no weights in.
    """
    text = config.get("text_config")
    for where in (config, cast("dict[str, Any]", text) if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            name = where.get(key)
            if name is not None:
                short = str(name).removeprefix("torch.")
                if short not in DTYPES:
                    raise ModelError(f"unknown {key} {name!r}: expected one of {sorted(DTYPES)}")
                return short
    return None


def build(config: dict[str, Any], dtype: str | None = None) -> nn.Module:
    """Build a model as mlx-lm builds it, without weights.

    Args:
        config: From `read_config`.
        dtype: Name of the dtype of its weights; that of the configuration if left out.

    Returns:
        The model. Its parameters have shapes and dtypes, quantised as the configuration says;
        their values are zeros that nothing has computed.

    Raises:
        ModelError: mlx-lm does not know the type, or a field is missing or wrong.
        UnsupportedModelError: A bounded cache would be refused, or would have to be tried out
            on the weights.
    """
    config = config | checkpoint.for_mlx_lm(config)
    kind = str(config["model_type"])
    if config.get("model_file") is not None:
        raise ModelError(
            f"{kind!r} is built by code of its own (model_file): it cannot be planned"
        )
    try:
        model_class, args_class = cast("Any", mlx_lm_utils)._get_classes(config)
    except ValueError as error:
        raise ModelError(f"unknown model_type {kind!r}: {one_line(error)}") from None
    name = model_class.__module__.rpartition(".")[2]
    reason = refusal(name)
    if reason is not None:
        raise UnsupportedModelError(f"{kind} is not supported: {reason}")
    if name not in VERIFIED:
        raise UnsupportedModelError(f"{kind} is not known: only its weights show if it works")
    try:
        model = model_class(args_class.from_dict(config))
    except Exception as error:
        # Wrong values make a model fail in any way.
        names = re.findall(r"'(\w+)'", str(error))
        if isinstance(error, TypeError) and "missing" in str(error) and names:
            lacks = ", ".join(names)
            raise ModelError(f"the configuration of {kind!r} lacks fields: {lacks}") from None
        raise ModelError(f"no {kind!r} can be built from it: {one_line(error)}") from None
    cast_weights(model, dtype or dtype_of(config) or DEFAULT_DTYPE)
    if isinstance(config.get("quantization"), dict):
        _quantize(model, config["quantization"])
    set_parameters(model, [(path, mx.zeros(a.shape, a.dtype)) for path, a in parameters(model)])
    return model


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters, whether they have been read or not."""
    return sum(weight.nbytes for _, weight in parameters(model))


def parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    """Return the parameters of a model, or of a part of one, with their paths."""
    return cast("list[tuple[str, mx.array]]", utils.tree_flatten(module.parameters()))


def set_parameters(model: nn.Module, named: Sequence[tuple[str, mx.array]]) -> None:
    """Put arrays in the place of a model's parameters, by their paths."""
    model.update(utils.tree_unflatten(list(named)))


def cast_weights(model: nn.Module, dtype: str) -> None:
    """Cast a model's floating-point parameters as mlx-lm's converter does; nothing is computed.

    Args:
        model: The model. Those parameters that it wants in float32 stay as they are.
        dtype: A name of `DTYPES`.
    """
    is_cast: Callable[[str], bool] = getattr(model, "cast_predicate", lambda path: True)

    def after(path: str, weight: mx.array) -> mx.array:
        is_floating = mx.issubdtype(weight.dtype, mx.floating)
        return weight.astype(DTYPES[dtype]) if is_floating and is_cast(path) else weight

    set_parameters(model, [(path, after(path, weight)) for path, weight in parameters(model)])


def _quantize(model: nn.Module, settings: dict[str, Any]) -> None:
    """Quantise the layers that a checkpoint of this configuration has quantised."""
    mode = settings.get("mode", "affine")
    if mode not in MODES:
        raise ModelError(f"unknown quantization mode {mode!r}: expected one of {sorted(MODES)}")
    unknown = [
        key
        for key, value in settings.items()
        if key not in ("mode", "group_size", "bits") and not isinstance(value, dict | bool)
    ]
    if unknown:
        raise ModelError(f"unknown field {unknown[0]!r} in quantization")
    default: dict[str, Any] = {}
    for key, usual in zip(("group_size", "bits"), MODES[mode], strict=True):
        default[key] = settings.get(key, usual)
        if not isinstance(default[key], int):
            raise ModelError(f"quantization {key} must be an integer, got {default[key]!r}")
    by_default: Callable[[str, nn.Module], Any] = getattr(
        model, "quant_predicate", lambda path, module: True
    )

    def chosen(path: str, module: nn.Module) -> Any:
        if path in settings:
            return settings[path]
        weight = getattr(module, "weight", None)
        if not hasattr(module, "to_quantized") or weight is None:
            return False
        return weight.shape[-1] % default["group_size"] == 0 and by_default(path, module)

    try:
        nn.quantize(model, **default, mode=mode, class_predicate=chosen)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"quantization {default} cannot be used: {one_line(error)}") from None
