"""A model folder on disk, checked before anything in it is believed. No arrays are read.

What mlx-lm does not look at, the index above all, is not held against a folder: it becomes a doubt
that is told, or the reason where the folder does not load. Weights are taken from safetensors
files only: a pickle can run code when it is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mlx_sink.errors import ModelError, one_line
from mlx_sink.models.checkpoints import folders, quantization

CONFIG = "config.json"

PATTERN = "model*.safetensors"
"""The weight files that mlx-lm reads."""

LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_transformer_layers")
"""What the number of layers is called."""

MAX_LAYERS = 10_000
"""Layers of a model at most: mlx-lm would build them one by one, however many are asked for."""

MAX_HEADER = 100_000_000
"""Bytes of a header at most, as in the safetensors library."""

# fmt: off
BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}
# fmt: on
"""Bytes of an element. Types of less than a byte are not here, and their shapes not checked."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "vocab.*", "tokenizer*.py")
"""One of these is in every folder whose tokenizer transformers can load."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder that has been checked.

    Attributes:
        path: The folder.
        config: What its config.json says.
        shards: Bytes of each weight file, by name.
        tensors: The type of each tensor, as safetensors spells it, by name.
        missing: Weight files that the index names, and that are not there.
        doubts: What is odd about the folder, and nothing that mlx-lm looks at: a line each.
        weights: Returns the weights, where they are not in the folder, under the names of its
            format; given true, arrays of their shapes and types that nothing has read.
    """

    path: Path
    config: dict[str, Any]
    shards: dict[str, int]
    tensors: dict[str, str]
    missing: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    weights: Callable[[bool], dict[str, Any]] | None = None

    def explained(self, error: BaseException) -> str:
        """Say why the folder did not load, from what was raised and from what it lacks."""
        reason = one_line(error)
        if self.missing:
            more = f" and {len(self.missing) - 1} more" if self.missing[1:] else ""
            return f"it lacks {self.missing[0]}{more}, which its index names ({reason})"
        if not any(next(self.path.glob(pattern), None) for pattern in TOKENIZERS):
            return f"it has no tokenizer, such as tokenizer.json ({reason})"
        tool = quantization.describe(self.config)
        return reason if tool is None else f"{reason} (weights quantised with {tool})"


def check(path: Path) -> Checkpoint:
    """Check a model folder: its configuration, and that its weight files are whole.

    mlx-lm would find most of this too, but late, and not in one line.

    Raises:
        ModelError: Something is missing, damaged, or of a kind that is not read.
    """
    try:
        config = _config(path)
        shards = sorted(path.glob(PATTERN))
        if not shards:
            raise ModelError(f"model folder {str(path)!r} has no {PATTERN}{_instead(path)}")
        held = {shard: _tensors(shard) for shard in shards}
        _check_once(held)
        tensors = {name: kind for types in held.values() for name, kind in types.items()}
        _check_types(path, config, tensors)
        for file in (file for pattern in TOKENIZERS for file in path.glob(pattern)):
            if folders.is_pointer(file):
                raise ModelError(_pointer(file))
        missing, doubts = _follow_index(path / "model.safetensors.index.json", held)
        sizes = {shard.name: shard.stat().st_size for shard in shards}
        return Checkpoint(path, config, sizes, tensors, missing, doubts)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelError(f"cannot read {str(error.filename or path)!r}: {reason}") from None


def trained_context(config: object) -> int | None:
    """Return the positions a model was trained on, in tokens, if its configuration says.

    Args:
        config: What config.json holds, or the ``args`` of a model, which mlx-lm makes of it. Not
            every model keeps all fields in its ``args``.
    """
    fields = _fields(config)
    for part in (fields, _fields(fields.get("text_config"))):
        context = part.get("max_position_embeddings")
        if isinstance(context, int):
            return context
    return None


def _fields(config: object) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return cast("Mapping[str, Any]", config)
    return getattr(config, "__dict__", {})


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ModelError(f"model folder {str(path)!r} has no config.json{_instead(path)}")
    config = read_config(file)
    if "model_file" in config and not _is_plain(config["model_file"]):
        raise ModelError(
            f"{str(file)!r}: model_file {config['model_file']!r} is not in the folder"
        )
    apart = path / "hf_quant_config.json"
    if apart.is_file() and quantization.stated(config) is None and "quantization" not in config:
        config["quantization_config"] = {"quant_method": "modelopt"} | read_json(apart)
    return config


def read_config(file: Path) -> dict[str, Any]:
    """Read a config.json.

    Raises:
        ModelError: It is damaged, or is not that of a model.
    """
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{str(file)!r} names no model_type{_instead(file.parent)}")
    for level in (config, _fields(config.get("text_config"))):
        for field in LAYERS:
            layers = level.get(field)
            if isinstance(layers, int) and layers > MAX_LAYERS:
                raise ModelError(
                    f"{str(file)!r} says {field} is {layers}: at most {MAX_LAYERS} are built"
                )
    return config


def _is_plain(name: object) -> bool:
    """Tell whether a name is that of a file in the folder itself, on any system."""
    return isinstance(name, str) and name.strip(".") != "" and not set(name) & set("/\\\0")


def _follow_index(
    index: Path, held: Mapping[Path, Mapping[str, str]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the files that an index names in vain, and what is wrong with it, if anything.

    mlx-lm reads every weight file that there is, and no index: that of a model before it was
    quantised, say, is left over in many repositories.
    """
    if not index.is_file():
        return (), ()
    home = {name: shard.name for shard, names in held.items() for name in names}
    files: dict[str, object] = {}
    wrong: str | None = None
    try:
        weight_map = read_json(index).get("weight_map")
        if isinstance(weight_map, dict) and weight_map:
            files = cast("dict[str, object]", weight_map)
        else:
            wrong = "it has no weight_map"
    except ModelError as error:
        wrong = str(error)
    missing = sorted({str(file) for file in files.values()} - {shard.name for shard in held})
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        wrong = f"it names {missing[0]}{more}, which the folder lacks"
    elif elsewhere := [name for name, file in files.items() if home.get(name) != file]:
        wrong = f"{files[elsewhere[0]]} holds no tensor {elsewhere[0]!r}"
    if wrong is None:
        return (), ()
    doubt = f"{str(index)!r} is wrong, and is ignored as mlx-lm ignores it: {wrong}"
    return tuple(missing), (doubt,)


def _check_once(held: Mapping[Path, Mapping[str, str]]) -> None:
    """Raise unless every tensor is in one file: of two, whichever came last would be read."""
    home: dict[str, str] = {}
    for shard, names in held.items():
        if twice := names.keys() & home.keys():
            name = min(twice)
            raise ModelError(
                f"tensor {name!r} is in {home[name]} and in {shard.name} of "
                f"{str(shard.parent)!r}: remove the file that does not belong there"
            )
        home |= dict.fromkeys(names, shard.name)


def _check_types(path: Path, config: Mapping[str, Any], tensors: Mapping[str, str]) -> None:
    """Raise if MLX would take floating-point numbers of less than 16 bits for whole ones."""
    small = [name for name, kind in tensors.items() if kind.startswith(("F8_", "F6_", "F4"))]
    if small and "quantization" not in config and quantization.stated(config) is None:
        raise ModelError(
            f"model folder {str(path)!r} has weights in {tensors[small[0]]} ({small[0]!r}), which "
            "mlx-lm does not read: get them in bfloat16"
        )


def _tensors(path: Path) -> dict[str, str]:
    """Return a safetensors file's tensors, having checked that their data is all there."""
    if folders.is_pointer(path):
        raise ModelError(_pointer(path))
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ModelError(f"{str(path)!r} is cut off: {size} bytes do not hold its header")
        if length > MAX_HEADER:
            raise ModelError(f"{str(path)!r} is no safetensors file: a header of {length} bytes")
        try:
            tensors: dict[str, Any] = json.loads(file.read(length))
            tensors.pop("__metadata__", None)
            end = _end_of_data(tensors)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f": {error}" if isinstance(error, _LayoutError) else ""
            raise ModelError(f"{str(path)!r} is not a sound safetensors file{reason}") from None
    if 8 + length + end != size:
        expected = 8 + length + end
        raise ModelError(f"{str(path)!r} is damaged: {size} bytes instead of {expected}")
    return {name: str(tensor["dtype"]) for name, tensor in tensors.items()}


class _LayoutError(ValueError):
    """Where a header contradicts itself."""


def _end_of_data(tensors: dict[str, Any]) -> int:
    """Return how many bytes of data a header asks for: one tensor after the other, no gaps."""
    at = 0
    spans = {name: tensor["data_offsets"] for name, tensor in tensors.items()}
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        dtype, shape = tensors[name]["dtype"], tensors[name]["shape"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise _LayoutError(f"tensor {name!r} has no sizes")
        if begin != at or end < begin:
            raise _LayoutError(f"tensor {name!r} does not begin where the one before ends")
        if dtype in BYTES and end - begin != math.prod(shape) * BYTES[dtype]:
            raise _LayoutError(f"tensor {name!r} has {end - begin} bytes, which is not its shape")
        at = end
    return at


def _instead(path: Path) -> str:
    """Say what a folder holds instead of a model, if that can be told."""
    what = folders.what_it_is(path)
    return "" if what is None else f": it {what}"


def _pointer(path: Path) -> str:
    return (
        f"{str(path)!r} is a pointer that Git LFS leaves for a file that it has not fetched: run "
        "git lfs pull"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: The file does not hold one.
    """
    try:
        if folders.is_pointer(path):
            raise ModelError(_pointer(path))
        value = json.loads(path.read_text(encoding="utf-8"))
    except ModelError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {str(path)!r}: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{str(path)!r} does not hold a JSON object")
    return cast("dict[str, Any]", value)
