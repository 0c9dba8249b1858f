"""A model built from its configuration alone, whose weights are never computed.

MLX is lazy: a model of any size costs little more than its list of layers, as long as no value of
a weight is asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx import utils
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models import bitlinear_layers

from mlx_sink.errors import ModelError, UnsupportedModelError, one_line
from mlx_sink.io.units import format_bytes
from mlx_sink.models.architectures import VERIFIED, refusal
from mlx_sink.models.checkpoints import checkpoint, quantization, spelling
from mlx_sink.models.load import check_folder, find_config, gguf_of
from mlx_sink.models.weights import load_model

_utils = cast("Any", mlx_lm_utils)

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
"""The dtypes that mlx-lm keeps weights in, by their names in configurations and options."""
DEFAULT_DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True)
class Unread:
    """A model whose weights nobody has read.

    Attributes:
        model: The model; its parameters have shapes and dtypes, and are zeros that nothing has
            computed.
        config: What config.json says.
        dtype: Of the weights that are not quantised, by its name.
        assumed: Nothing says this dtype.
        notes: What is not as one would expect, in words.
    """

    model: nn.Module
    config: dict[str, Any]
    dtype: str
    assumed: bool
    notes: tuple[str, ...]


def unread(name: str, dtype: str | None = None) -> Unread:
    """Build a model as it is once mlx-lm has loaded or converted it, without reading its weights.

    Where its weight files are at hand, the shapes and dtypes in their headers count, and what
    mlx-lm makes of them; otherwise what its configuration says.

    Args:
        name: As in `load.find_config`.
        dtype: Name of the dtype of its weights; what the configuration says if left out, and
            what the files hold where it says nothing, as in a conversion.

    Raises:
        ModelError, UnsupportedModelError: As `build`.
    """
    file = find_config(name)
    config = read_config(name)
    stated = dtype or dtype_of(config)
    if (gguf := gguf_of(name)) is not None:
        return _of_files(gguf, dtype)
    if file.name == checkpoint.CONFIG and any(file.parent.glob(checkpoint.PATTERN)):
        try:
            return _of_files(check_folder(name, file.parent), dtype)
        except ModelError as error:
            notes = (f"its weight files are not counted: {error}",)
    else:
        notes = ()
    model = build(config, dtype)
    theirs = quantization.stated(config) or {}
    if theirs.get("quant_method") == "gptq":
        notes += ("mlx-lm loads weights of GPTQ only as AutoAWQ packs them, and without g_idx",)
    return Unread(model, config, stated or DEFAULT_DTYPE, stated is None, notes)


def _of_files(found: checkpoint.Checkpoint, dtype: str | None) -> Unread:
    """Build a model with the parameters that its files hold."""
    _classes(found.config)
    try:
        spelled = spelling.for_mlx_lm(found.config, found.tensors)
        loaded = load_model(found, spelled, lazy=True, unread=True)
    except Exception as error:  # whatever wrong values or a damaged file make it raise
        raise ModelError(found.explained(error)) from None
    model = loaded[0]
    stored, held = weight_bytes(model), _most_common_dtype(model)
    stated = dtype or dtype_of(found.config)
    notes = found.doubts
    if stated is not None:
        cast_weights(model, stated)
        if (cast_to := weight_bytes(model)) != stored:
            notes = (
                f"its files hold {held}: before they are converted to {stated}, the weights take "
                f"{format_bytes(stored)}, and not {format_bytes(cast_to)}",
                *notes,
            )
    _forget(model)
    return Unread(model, found.config, stated or held, False, notes)


def _most_common_dtype(model: nn.Module) -> str:
    """Return the name of the floating-point dtype that most of a model's bytes are in."""
    nbytes: Counter[str] = Counter()
    for _, weight in parameters(model):
        if mx.issubdtype(weight.dtype, mx.floating):
            nbytes[str(weight.dtype).removeprefix("mlx.core.")] += weight.nbytes
    return max(nbytes, key=nbytes.__getitem__, default=DEFAULT_DTYPE)


def _forget(model: nn.Module) -> None:
    """Put zeros that nothing has computed in the place of all parameters."""
    set_parameters(model, [(path, mx.zeros(a.shape, a.dtype)) for path, a in parameters(model)])


def read_config(name: str) -> dict[str, Any]:
    """Read the configuration of a model, and nothing else of it.

    Args:
        name: As in `load.find_config`.

    Raises:
        ModelError: There is none, or it is damaged.
    """
    return checkpoint.read_config(find_config(name))


def dtype_of(config: dict[str, Any]) -> str | None:
    """Return the name of the dtype that a configuration states, whatever it calls the field.

    transformers 5 writes ``dtype``, versions before it ``torch_dtype``; around a model of text and
    images either may be one level further in.

    Returns:
        ``None`` where none is stated, or one that mlx-lm converts nothing to.
    """
    stated = _stated_dtype(config)
    return stated[1] if stated is not None and stated[1] in DTYPES else None


def _stated_dtype(config: dict[str, Any]) -> tuple[str, str] | None:
    """Return the field that states a dtype, and the dtype's name, whether known or not."""
    text = config.get("text_config")
    for level in (config, cast("dict[str, Any]", text) if isinstance(text, dict) else {}):
        for field in ("dtype", "torch_dtype"):
            if level.get(field) is not None:
                return field, str(level[field]).removeprefix("torch.")
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
    config = _utils._decode_tagged_floats(config | spelling.for_mlx_lm(config))
    kind = str(config["model_type"])
    model_class, args_class = _classes(config)
    try:
        model = model_class(args_class.from_dict(config))
    except Exception as error:
        # Wrong values make a model fail in any way.
        names = re.findall(r"'(\w+)'", str(error))
        if isinstance(error, TypeError) and "missing" in str(error) and names:
            lacks = ", ".join(names)
            raise ModelError(f"the configuration of {kind!r} lacks fields: {lacks}") from None
        raise ModelError(f"no {kind!r} can be built from it: {one_line(error)}") from None
    stated = _stated_dtype(config)
    if dtype is None and stated is not None and stated[1] not in DTYPES:
        field, name = stated
        raise ModelError(f"unknown {field} {name!r}: expected one of {sorted(DTYPES)}")
    cast_weights(model, dtype or dtype_of(config) or DEFAULT_DTYPE)
    quantize(model, config)
    _forget(model)
    return model


def _classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return mlx-lm's classes of a model and of its arguments.

    Raises:
        ModelError, UnsupportedModelError: As `build`.
    """
    kind = str(config["model_type"])
    if config.get("model_file") is not None:
        raise ModelError(
            f"{kind!r} is built by code of its own (model_file): it cannot be planned"
        )
    try:
        model_class, args_class = _utils._get_classes(config)
    except ValueError as error:
        raise ModelError(f"unknown model_type {kind!r}: {one_line(error)}") from None
    name = model_class.__module__.rpartition(".")[2]
    reason = refusal(name)
    if reason is not None:
        raise UnsupportedModelError(f"{kind} is not supported: {reason}")
    if name not in VERIFIED:
        raise UnsupportedModelError(f"{kind} is not known: only its weights show if it works")
    return model_class, args_class


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


def quantize(model: nn.Module, config: dict[str, Any]) -> None:
    """Quantise the layers that a checkpoint of this configuration has quantised.

    Args:
        model: A model that is built from the configuration.
        config: What config.json says.

    Raises:
        ModelError: mlx-lm does not read what it says, or MLX cannot do it.
    """
    architecture = type(model).__module__.rpartition(".")[2]
    how = quantization.of(config, architecture)
    theirs = quantization.stated(config)
    if theirs is not None and theirs.get("quant_method") == "bitnet":
        bitlinear_layers.bitnet_quantize(model, theirs)
    if how is None:
        return
    by_default: Callable[[str, nn.Module], Any] = getattr(
        model, "quant_predicate", lambda path, module: True
    )

    def chosen(path: str, module: nn.Module) -> Any:
        if path in how.layers:
            return how.layers[path]
        weight = getattr(module, "weight", None)
        if not hasattr(module, "to_quantized") or weight is None or how.keeps(path):
            return False
        if how.foreign:
            return not isinstance(module, nn.Embedding)
        return weight.shape[-1] % how.group_size == 0 and by_default(path, module)

    try:
        nn.quantize(model, how.group_size, how.bits, mode=how.mode, class_predicate=chosen)
    except (ValueError, TypeError, KeyError) as error:
        settings = {"group_size": how.group_size, "bits": how.bits, "mode": how.mode}
        raise ModelError(f"quantization {settings} cannot be used: {one_line(error)}") from None
