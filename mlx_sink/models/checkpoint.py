"""A model folder on disk, checked before anything in it is believed. No arrays are read.

Weights are taken from safetensors files only: a pickle can run code when it is read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mlx_sink.errors import ModelError, one_line

PATTERN = "model*.safetensors"
"""The weight files that mlx-lm reads."""

MAX_HEADER = 100_000_000
"""Bytes of a header at most, as in the safetensors library."""

# fmt: off
BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}
# fmt: on
"""Bytes of an element. Types of less than a byte are not here, and their shapes not checked."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder that has been checked.

    Attributes:
        path: The folder.
        config: What its config.json says.
        shards: Bytes of each weight file, by name.
    """

    path: Path
    config: dict[str, Any]
    shards: dict[str, int]


def check(path: Path) -> Checkpoint:
    """Check a model folder: its configuration, its index, and that its weight files are whole.

    mlx-lm would find most of this too, but late, and not in one line.

    Raises:
        ModelError: Something is missing, damaged, or of a kind that is not read.
    """
    try:
        config = _config(path)
        shards = sorted(path.glob(PATTERN))
        index = path / "model.safetensors.index.json"
        weight_map = _weight_map(index, shards) if index.is_file() else {}
        if not shards:
            raise ModelError(f"model folder {str(path)!r} has no {PATTERN}{_other_weights(path)}")
        _check_tensors({shard: _tensor_names(shard) for shard in shards}, index, weight_map)
        return Checkpoint(path, config, {shard.name: shard.stat().st_size for shard in shards})
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelError(f"cannot read {str(error.filename or path)!r}: {reason}") from None


def for_mlx_lm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says in transformers 5's spelling, in the one mlx-lm reads.

    From version 5 on, transformers writes ``rope_theta``, ``rope_scaling`` and
    ``partial_rotary_factor`` as one object, ``rope_parameters``. Most of mlx-lm's models do not
    know it and fall back to a default rotary base without a word: other logits.

    Args:
        config: The contents of config.json.

    Returns:
        Keys to be added to it; those it has are never changed.
    """
    added: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
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
    text = config.get("text_config")
    if isinstance(text, dict) and (inner := for_mlx_lm(cast("dict[str, Any]", text))):
        added["text_config"] = text | inner
        return {k: v for k, v in added.items() if config.get(k) is None or k == "text_config"}
    return {k: v for k, v in added.items() if config.get(k) is None}


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
        raise ModelError(f"model folder {str(path)!r} has no config.json{_other_weights(path)}")
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{str(file)!r} names no model_type")
    if "model_file" in config and not _is_plain(config["model_file"]):
        raise ModelError(
            f"{str(file)!r}: model_file {config['model_file']!r} is not in the folder"
        )
    return config


def _is_plain(name: object) -> bool:
    """Tell whether a name is that of a file in the folder itself, on any system."""
    return isinstance(name, str) and name.strip(".") != "" and not set(name) & set("/\\\0")


def _weight_map(index: Path, shards: list[Path]) -> dict[str, str]:
    """Read an index and check that the files it names are there, in this folder."""
    where = repr(str(index))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{where} has no weight_map")
    there = {shard.name for shard in shards}
    files = cast("dict[str, object]", weight_map)
    for name in sorted({str(file) for file in files.values()}):
        if not _is_plain(name):
            raise ModelError(f"{where} names {name!r}, which is not a file of this folder")
        if not Path(name).match(PATTERN):
            raise ModelError(f"{where} names {name!r}, and only {PATTERN} is read")
        if name not in there:
            raise ModelError(f"model folder {str(index.parent)!r} lacks {name}")
    return {tensor: str(file) for tensor, file in files.items()}


def _check_tensors(
    held: Mapping[Path, set[str]], index: Path, weight_map: Mapping[str, str]
) -> None:
    """Raise unless every tensor is in one file, and in that which the index names."""
    home: dict[str, str] = {}
    for shard, names in held.items():
        if twice := names & home.keys():
            name = min(twice)
            raise ModelError(
                f"tensor {name!r} is in {home[name]} and in {shard.name} of "
                f"{str(index.parent)!r}: remove the file that does not belong there"
            )
        home |= dict.fromkeys(names, shard.name)
    for name, file in weight_map.items():
        if home.get(name) != file:
            raise ModelError(f"{str(index)!r} is wrong: {file} holds no tensor {name!r}")


def _tensor_names(path: Path) -> set[str]:
    """Return a safetensors file's tensors, having checked that their data is all there."""
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
    return set(tensors)


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


def _other_weights(path: Path) -> str:
    """Say what to do about weights of a kind that is not read, if there are any."""
    if any(path.glob("*.gguf")):
        return (
            " (GGUF is not read, as mlx-lm reads none: use the repository the file was made from)"
        )
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        return (
            f" ({pickles[0]} is a pickle, which can run code and is never read: get a revision "
            "with safetensors, or load it where you trust it in transformers and save_pretrained "
            "it, which writes them)"
        )
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: The file does not hold one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {str(path)!r}: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{str(path)!r} does not hold a JSON object")
    return cast("dict[str, Any]", value)
