"""How a checkpoint's weights are quantised, as its configuration says, and what mlx-lm reads.

mlx-lm quantises by ``quantization``, which it writes itself, and otherwise by the
``quantization_config`` of other tools: some it keeps packed, some it expands as it loads, and of
the rest it says nothing until the weights do not fit. Source: ``mlx_lm.utils.load_model`` of 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, cast

from mlx_sink.errors import ModelError

MODES = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}
"""Group size and bits of each mode of `mx.quantize`, where a configuration leaves them out."""

EXPANDED = frozenset(
    {
        "deepseek_v3",
        "deepseek_v32",
        "glm_moe_dsa",
        "kimi_k25",
        "mimo_v2_flash",
        "minimax",
        "mistral4",
    }
)
"""Architectures whose weights in FP8 mlx-lm expands to bfloat16 as it loads them.

It takes those of ministral3, too, but multiplies their bytes as whole numbers.
"""

PACKED = frozenset({"deepseek_v3", "kimi_k25", "kimi_k3", "mistral4"})
"""Architectures whose weights mlx-lm reads as compressed-tensors packs them."""

MODELOPT = frozenset({"muse_spark"})
"""Architectures whose weights mlx-lm reads as ModelOpt packs them."""

_FORMATS = {
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
    "pack-quantized": "affine",
}
"""What mlx-lm reads of compressed-tensors, and the mode that it becomes."""

_ADVICE = (
    "use a conversion for MLX (mlx-community has many), or convert the repository that it was "
    "quantised from"
)


@dataclass(frozen=True, slots=True)
class Quantization:
    """The layers that are held quantised once a checkpoint is loaded, and how.

    Attributes:
        group_size: Weights that share a scale.
        bits: Bits of a weight.
        mode: A mode of `mx.quantize`.
        layers: What is said of single layers by their paths, as mlx-lm writes it: settings of
            their own, or whether they are quantised at all.
        kept: Names, or patterns of names, of layers that are not quantised.
        foreign: Another tool did it: embeddings and the last projection stay as they are.
    """

    group_size: int
    bits: int
    mode: str = "affine"
    layers: Mapping[str, Any] = field(default_factory=dict[str, Any])
    kept: tuple[str, ...] = ()
    foreign: bool = False

    def keeps(self, path: str) -> bool:
        """Tell whether a layer is left as it is, by its path in the model."""
        return self.foreign and (
            path.endswith("lm_head") or any(_matches(pattern, path) for pattern in self.kept)
        )


def of(config: Mapping[str, Any], architecture: str) -> Quantization | None:
    """Return how a checkpoint's weights are quantised when mlx-lm has loaded it.

    Args:
        config: The contents of config.json.
        architecture: The module of ``mlx_lm.models`` that the model is of.

    Returns:
        ``None`` where they are not, or are expanded.

    Raises:
        ModelError: mlx-lm does not read them, or what is said of them is wrong.
    """
    if own := _dict(config.get("quantization")):
        return _of_mlx(own)
    theirs = stated(config)
    if theirs is None:
        return None
    if reason := refusal(config, architecture):
        raise ModelError(reason)
    method, kept = theirs.get("quant_method"), _kept(theirs)
    if method in ("awq", "gptq"):
        return Quantization(_integer(theirs, "group_size", 128), 4, kept=kept, foreign=True)
    if method == "compressed-tensors":
        mode = _FORMATS[str(theirs.get("format"))]
        groups = [
            _dict(_dict(g).get("weights")) for g in _dict(theirs.get("config_groups")).values()
        ]
        size, bits = MODES[mode] if mode != "affine" else (32, 4)
        first = groups[0] if groups else {}
        size, bits = _integer(first, "group_size", size), _integer(first, "num_bits", bits)
        return Quantization(size, bits, mode, kept=kept, foreign=True)
    if method == "modelopt":
        size = _integer(_dict(theirs.get("quantization")) or theirs, "group_size", 16)
        return Quantization(size, 4, "nvfp4", kept=kept, foreign=True)
    if method == "fp8" and _is_mxfp8(theirs):
        method = "mxfp8"
    if method not in MODES:
        return None  # expanded, or of bitnet's own kind
    return Quantization(*MODES[method], method, kept=kept, foreign=True)


def stated(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of another tool than mlx-lm, if there is one."""
    if "quantization" in config:
        return None
    for level in (config, _dict(config.get("text_config"))):
        if value := _dict(level.get("quantization_config")):
            return value
    return None


def describe(config: Mapping[str, Any]) -> str | None:
    """Name the tool that another than mlx-lm quantised the weights with, and its kind."""
    theirs = stated(config)
    if theirs is None:
        return None
    method = str(theirs.get("quant_method") or "a tool without a name")
    bits = theirs.get("bits") or 4 * bool(theirs.get("load_in_4bit"))
    bits = bits or 8 * bool(theirs.get("load_in_8bit"))
    kinds = (
        theirs.get("format"),
        _algorithm(theirs),
        _blocks(theirs.get("weight_block_size")),
        "desc_act" if theirs.get("desc_act") else None,
        f"{bits} bits" if bits else None,
    )
    kind = next((str(value) for value in kinds if value), None)
    return f"{method} ({kind})" if kind else method


def refusal(config: Mapping[str, Any], architecture: str) -> str | None:
    """Return why mlx-lm does not read weights that are quantised so; ``None`` if it does.

    Args:
        config: The contents of config.json.
        architecture: The module of ``mlx_lm.models`` that the model is of.
    """
    theirs = stated(config)
    if theirs is None:
        return None
    method = theirs.get("quant_method")
    names = {architecture, str(_dict(config.get("text_config")).get("model_type"))}
    reads = {
        "awq": _integer(theirs, "bits", 4) == 4,
        "gptq": _integer(theirs, "bits", 4) == 4 and not theirs.get("desc_act"),
        "bitnet": True,
        "mxfp4": True,
        "mxfp8": True,
        "fp8": bool(names & EXPANDED) or _is_mxfp8(theirs),
        "compressed-tensors": theirs.get("format") in _FORMATS and bool(names & PACKED),
        "modelopt": _algorithm(theirs) == "NVFP4" and bool(names & MODELOPT),
    }
    if reads.get(str(method), False):
        return None
    return (
        f"weights quantised with {describe(config)}, which mlx-lm does not read for "
        f"{architecture}: {_ADVICE}"
    )


def is_plain(tensors: Mapping[str, str]) -> bool:
    """Tell that no weight is packed, whatever a configuration says, by the types of the tensors.

    A model that was trained in few bits and merged afterwards often keeps the configuration.
    """
    return all(kind in ("F16", "BF16", "F32") for kind in tensors.values())


def _dict(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _of_mlx(settings: dict[str, Any]) -> Quantization:
    mode = settings.get("mode", "affine")
    if mode not in MODES:
        raise ModelError(f"unknown quantization mode {mode!r}: expected one of {sorted(MODES)}")
    layers = {k: v for k, v in settings.items() if k not in ("mode", "group_size", "bits")}
    odd = [key for key, value in layers.items() if not isinstance(value, dict | bool)]
    if odd:
        raise ModelError(f"unknown field {odd[0]!r} in quantization")
    size, bits = MODES[mode]
    return Quantization(
        _integer(settings, "group_size", size), _integer(settings, "bits", bits), mode, layers
    )


def _integer(settings: Mapping[str, Any], key: str, default: int) -> int:
    value = settings.get(key)
    if value is None:
        return default
    if not isinstance(value, int):
        raise ModelError(f"quantization {key} must be an integer, got {value!r}")
    return value


def _is_mxfp8(theirs: Mapping[str, Any]) -> bool:
    """Tell FP8 that mlx-lm keeps packed: power-of-two scales of blocks of 32 x 32."""
    blocks = theirs.get("weight_block_size")
    return theirs.get("scale_fmt") == "ue8m0" and blocks == [32, 32]


def _algorithm(theirs: Mapping[str, Any]) -> str | None:
    """Return ModelOpt's, from either of its two files."""
    return (_dict(theirs.get("quantization")) or theirs).get("quant_algo")


def _blocks(size: object) -> str | None:
    if not isinstance(size, list) or not size:
        return None
    return f"blocks of {' x '.join(map(str, cast('list[Any]', size)))}"


def _kept(theirs: Mapping[str, Any]) -> tuple[str, ...]:
    for where in (theirs, _dict(theirs.get("quantization"))):
        for key in ("modules_to_not_convert", "ignore", "exclude_modules"):
            names = where.get(key)
            if isinstance(names, list):
                return tuple(map(str, cast("list[Any]", names)))
    return ()


def _matches(pattern: str, path: str) -> bool:
    """Tell whether one of the tools' patterns names a layer, or something that it is part of."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], path) is not None
        except re.error:
            return False
    return pattern in path or fnmatch(path, pattern) or fnmatch(path, f"{pattern}.*")
