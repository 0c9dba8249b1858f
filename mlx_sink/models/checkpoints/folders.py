"""What a folder holds that is no model for mlx-lm, and what would work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

TRAINING = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
"""How pickles begin that hold the state of a training run, and no weights."""

_WRITE_AGAIN = (
    "get a revision with safetensors, or load it where you trust it in transformers and "
    "save_pretrained it, which writes them"
)
_ORIGINAL = "use the repository that the file was made from"


def what_it_is(path: Path) -> str | None:
    """Say what a folder without a model of mlx-lm's holds instead, and what would work.

    Args:
        path: A folder that lacks a config.json or weights.

    Returns:
        A sentence without its subject, as "is ..." or "holds ..."; ``None`` if that is unknown.
    """
    if not any(path.iterdir()):
        return "is empty"
    return next((answer for kind in _KINDS if (answer := kind(path)) is not None), None)


def is_pointer(path: Path) -> bool:
    """Tell whether a file is what Git leaves in the place of a large one that was not fetched."""
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _fields(path: Path, name: str) -> dict[str, Any]:
    """Return what a JSON file of the folder holds; nothing if it cannot be read."""
    try:
        value = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _first(path: Path, *patterns: str) -> str | None:
    files = sorted(file.name for pattern in patterns for file in path.glob(pattern))
    return files[0] if files else None


def _adapter(path: Path) -> str | None:
    if not (path / "adapter_config.json").is_file():
        return None
    fields = _fields(path, "adapter_config.json")
    base = fields.get("base_model_name_or_path") or fields.get("model") or "its base model"
    if _first(path, "adapter_model.*") and not _first(path, "adapters.safetensors"):
        return (
            f"is an adapter of PEFT for {base}, which mlx-lm does not read: merge it into its "
            "base in PEFT (merge_and_unload) and save_pretrained the result"
        )
    return f"is an adapter, not a model: use --model {base} --adapter-path {path}"


def _pipeline(path: Path) -> str | None:
    name = _fields(path, "model_index.json").get("_class_name")
    part = _fields(path, "config.json").get("_class_name")
    if name or (path / "model_index.json").is_file():
        return f"is a pipeline of diffusers ({name or 'model_index.json'}), not a language model"
    return f"is a part of a pipeline of diffusers ({part}), not a language model" if part else None


def _sentences(path: Path) -> str | None:
    if not (path / "modules.json").is_file():
        return None
    return "is a model of sentence-transformers: it writes no text"


def _pickle(path: Path) -> str | None:
    names = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    name = next((name for name in names if not name.startswith(TRAINING)), None)
    if name is None:
        return None
    return (
        f"holds other weights ({name} is a pickle, which can run code and is never read: "
        f"{_WRITE_AGAIN})"
    )


def _mistral(path: Path) -> str | None:
    if not _first(path, "consolidated*.safetensors"):
        return None
    return (
        "holds weights in Mistral's own format (consolidated.safetensors): get the model*.safe"
        "tensors and the config.json of the same repository"
    )


def _of_others(path: Path) -> str | None:
    for kind, patterns in _OTHERS.items():
        if name := _first(path, *patterns):
            return f"holds weights for {kind} ({name}): {_ORIGINAL}"
    return None


def _misnamed(path: Path) -> str | None:
    name = _first(path, "*.safetensors")
    if name is None or not (path / "config.json").is_file():
        return None
    return f"holds {name}, and mlx-lm reads no such name: rename it to model.safetensors"


def _tokenizer(path: Path) -> str | None:
    name = _first(path, "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.*")
    return None if name is None else f"is a tokenizer alone ({name}): the model is missing"


def _above(path: Path) -> str | None:
    inner = sorted(file.parent.name for file in path.glob("*/config.json"))
    if not inner:
        return None
    return f"holds folders of models: name one of them, such as {path / inner[0]}"


_OTHERS = {
    "ONNX": ("*.onnx", "onnx/*.onnx"),
    "Core ML": ("*.mlpackage", "*.mlmodelc"),
    "OpenVINO": ("openvino_model*.xml",),
    "TensorFlow": ("*.h5", "*.tflite"),
    "Flax": ("*.msgpack",),
    "an early MLX example": ("*.npz",),
}

_KINDS: tuple[Callable[[Path], str | None], ...] = (
    _adapter,
    _pipeline,
    _mistral,
    _pickle,
    _of_others,
    _sentences,
    _misnamed,
    _above,
    _tokenizer,
)
"""In the order in which they are asked: a pipeline holds a tokenizer, too."""
