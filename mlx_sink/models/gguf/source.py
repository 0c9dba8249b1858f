"""A GGUF file as a model folder: what mlx-lm reads of one, with the weights left in the file.

A folder of its own, in a place for temporary files, holds config.json and the tokenizer. Its
weight file is empty: the weights come out of the GGUF file when the model is built.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from mlx_sink.errors import ModelError
from mlx_sink.io import gguf, terminal
from mlx_sink.io.gguf import Header, Tensor
from mlx_sink.io.units import format_bytes
from mlx_sink.models.checkpoints.checkpoint import Checkpoint
from mlx_sink.models.gguf.architectures import (
    ROPE_TENSORS,
    Architecture,
    Metadata,
    architecture_of,
    config_of,
    name_of,
)
from mlx_sink.models.gguf.packing import GROUP_SIZE, PACKED, PLAIN, parts_of, zeros_of
from mlx_sink.models.gguf.vocabulary import Vocabulary

EMPTY = (2).to_bytes(8, "little") + b"{}"
"""A safetensors file without a tensor."""

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

_folders: list[tempfile.TemporaryDirectory[str]] = []


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model in GGUF.

    Attributes:
        files: Its files, in order.
        config: What config.json says.
        folder: Where that lies, with the tokenizer.
        tensors: Its tensors, by the names that mlx-lm gives them, without ``.weight``.
        architecture: How they are kept.
        dtype: Of what is not packed.
    """

    files: tuple[Path, ...]
    config: Mapping[str, Any]
    folder: Path
    tensors: Mapping[str, Tensor]
    architecture: Architecture
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in self.files)

    def weights(self, *, unread: bool = False) -> dict[str, mx.array]:
        """Return the weights as a Hugging Face checkpoint names them.

        Args:
            unread: Only their shapes and types; what is in them is not read.

        Raises:
            ModelError: A tensor's type cannot be expanded here.
        """
        weights: dict[str, mx.array] = {}
        dtype = self.dtype
        if dtype == mx.float16 and not unread and mx.default_device() == mx.Device(mx.cpu):
            dtype = mx.float32  # MLX's CPU multiplies float16 some 40 times slower.
        for name, tensor in self.tensors.items():
            offset = self.architecture.norm_offset if name.endswith("norm") else 0
            if unread:
                parts = zeros_of(tensor, dtype)
            elif offset:
                exact = parts_of(tensor, mx.float32)["weight"]
                parts = {"weight": (exact - offset).astype(dtype)}
            else:
                parts = parts_of(tensor, dtype, self._order(name, tensor))
            kind = tensor.name.rpartition(".")[2]
            if kind == "bias":
                parts = {"bias": parts["weight"]}
            cast("Any", mx).eval([] if unread else list(parts.values()))
            weights |= {f"{name.removesuffix('.bias')}.{part}": x for part, x in parts.items()}
        return weights

    def _order(self, name: str, tensor: Tensor) -> np.ndarray | None:
        """Return the order of rows that undoes the interleaving of Llama's projections."""
        part = name.removesuffix(".bias").rpartition(".")[2]
        if not self.architecture.pairs_neighbours or part not in ("q_proj", "k_proj"):
            return None
        key = "num_attention_heads" if part == "q_proj" else "num_key_value_heads"
        heads, rows = self.config[key], tensor.shape[0]
        if rows % (2 * heads):
            raise ModelError(f"tensor {tensor.name!r} has {rows} rows, not pairs of {heads} heads")
        return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def files_of(path: Path) -> tuple[Path, ...]:
    """Return all files of the model that a file is one of.

    Raises:
        ModelError: One of its shards is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return (path,)
    names = [f"{match[1]}-{i:05}-of-{match[3]}.gguf" for i in range(1, int(match[3]) + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing or path.name not in names:
        raise ModelError(
            f"{str(path)!r} is one of {int(match[3])} files, and {(missing or names)[0]} is "
            "missing"
        )
    return tuple(path.parent / name for name in names)


def file_in(folder: Path) -> Path | None:
    """Return the first file of the one GGUF model in a folder; ``None`` if there is none.

    Raises:
        ModelError: There is more than one.
    """
    files = sorted(path for path in folder.glob("*.gguf") if path.is_file())
    models = {files_of(path)[0]: path for path in files}
    if len(models) > 1:
        first, second, *_ = sorted(models)
        raise ModelError(
            f"folder {str(folder)!r} holds {len(models)} models in GGUF, {first.name} and "
            f"{second.name} among them: name the file"
        )
    return next(iter(models), None)


@cache
def opened(path: Path) -> GgufModel:
    """Read the headers of a model's files, and write what mlx-lm reads of a folder.

    Args:
        path: One of its files.

    Raises:
        ModelError: They are damaged, or not of a kind that is read.
    """
    files = files_of(path)
    headers = [gguf.read(file) for file in files]
    metadata = Metadata(headers[0].fields, repr(str(files[0])))
    architecture = architecture_of(metadata)
    tensors = _together(headers)
    factors = {name: _factors(tensors[f"{name}.weight"]) for name in ROPE_TENSORS
               if f"{name}.weight" in tensors}  # fmt: skip
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = config_of(metadata, architecture, shapes, factors)
    vocabulary = Vocabulary(metadata, config["vocab_size"])
    named = _named(tensors, architecture, metadata.where)
    dtype = _dtype(named.values(), architecture)
    config |= {
        **vocabulary.special(),
        "eos_token_id": vocabulary.ends(),
        "torch_dtype": str(dtype).removeprefix("mlx.core."),
        **_quantization(named.values()),
    }
    _check_shapes(config, named, metadata.where)
    folder = _written(config, vocabulary)
    return GgufModel(files, config, folder, named, architecture, dtype)


def checkpoint_of(path: Path) -> Checkpoint:
    """Return what `opened` finds as a folder that has been checked.

    Args:
        path: One of the model's files.

    Raises:
        ModelError: As `opened`.
    """
    model = opened(path)
    shards = {file.name: file.stat().st_size for file in model.files}
    tensors = {name: tensor.kind for name, tensor in model.tensors.items()}

    def weights(unread: bool) -> dict[str, mx.array]:
        if not unread:
            tell_cost(model)
        return model.weights(unread=unread)

    return Checkpoint(model.folder, dict(model.config), shards, tensors, weights=weights)


def tell_cost(model: GgufModel) -> None:
    """Say what it costs that some types are not MLX's own: they are expanded."""
    expanded = [t for t in model.tensors.values() if t.kind not in PACKED and t.kind not in PLAIN]
    if not expanded:
        return
    kept = sum(t.nbytes for t in expanded)
    taken = sum(int(np.prod(t.shape)) for t in expanded) * model.dtype.size
    kinds = ", ".join(sorted({t.kind for t in expanded}))
    terminal.say(
        f"{model.files[0].name}: weights in {kinds} are expanded from {format_bytes(kept)} to "
        f"{format_bytes(taken)}, as MLX has no such type (convert --quantize makes them small "
        "again)"
    )


def _together(headers: Sequence[Header]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for header in headers:
        if twice := tensors.keys() & header.tensors.keys():
            raise ModelError(f"tensor {min(twice)!r} is in two files, {str(header.path)!r} is one")
        tensors |= header.tensors
    count = headers[0].fields.get("split.count", len(headers))
    if count not in (0, len(headers)):
        raise ModelError(
            f"{str(headers[0].path)!r} is one of {count} files, whose names end in "
            f"-00001-of-{count:05}.gguf"
        )
    return tensors


def _factors(tensor: Tensor) -> np.ndarray:
    if tensor.kind != "F32" or len(tensor.shape) != 1:
        raise ModelError(f"tensor {tensor.name!r} of {str(tensor.path)!r} is no list of factors")
    factors = tensor.data().view("<f4")[0]
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise ModelError(f"tensor {tensor.name!r} of {str(tensor.path)!r} holds no factors")
    return factors


def _named(
    tensors: Mapping[str, Tensor], architecture: Architecture, where: str
) -> dict[str, Tensor]:
    """Return the tensors by mlx-lm's names, biases with their last part."""
    named: dict[str, Tensor] = {}
    for tensor in tensors.values():
        stem, _, kind = tensor.name.rpartition(".")
        if stem in ROPE_TENSORS:
            continue
        name = name_of(tensor.name, architecture)
        if name is None or kind not in ("weight", "bias"):
            raise ModelError(f"{where} has a tensor {tensor.name!r}, which is not known")
        named[f"{name}.bias" if kind == "bias" else name] = tensor
    return named


def _dtype(tensors: Any, architecture: Architecture) -> mx.Dtype:
    """Return the dtype of what is not packed: that of the matrices, if they are all alike."""
    kinds = {tensor.kind for tensor in tensors if len(tensor.shape) > 1}
    if len(kinds) == 1 and (kind := next(iter(kinds))) in PLAIN:
        return PLAIN[kind]
    # Scales are float16; what they scale is as exact in float32, and in nothing else.
    return mx.float16 if architecture.half else mx.float32


def _quantization(tensors: Any) -> dict[str, Any]:
    bits = sorted({PACKED[t.kind] for t in tensors if t.kind in PACKED and len(t.shape) > 1})
    return {"quantization": {"group_size": GROUP_SIZE, "bits": bits[0]}} if bits else {}


def _check_shapes(config: Mapping[str, Any], named: Mapping[str, Tensor], where: str) -> None:
    """Raise unless the layers are those that the fields speak of, and as wide."""
    layers = {int(m[1]) for name in named if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    if max(layers, default=-1) + 1 != len(layers) or len(layers) != config["num_hidden_layers"]:
        raise ModelError(f"{where} has {len(layers)} layers, not {config['num_hidden_layers']}")
    if named["model.embed_tokens"].shape[1] != config["hidden_size"]:
        raise ModelError(f"{where} has an embedding that is not {config['hidden_size']} wide")


def _written(config: Mapping[str, Any], vocabulary: Vocabulary) -> Path:
    """Write a folder that is removed when the process ends."""
    tokenizer = vocabulary.tokenizer()
    folder = tempfile.TemporaryDirectory(prefix="mlx_sink-gguf-")
    _folders.append(folder)
    path = Path(folder.name)
    files = {
        "config.json": config,
        "tokenizer_config.json": vocabulary.config(config["max_position_embeddings"]),
    }
    for name, value in files.items():
        (path / name).write_text(json.dumps(value, indent=1), encoding="utf-8")
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "model.safetensors").write_bytes(EMPTY)
    return path
