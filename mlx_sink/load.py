"""Find a model (the embedded one, a folder, or a hub repository), load it, attach to it."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.nn as nn
import mlx_lm

from mlx_sink.attach import attach
from mlx_sink.config import SinkConfig
from mlx_sink.draft import check_vocabulary
from mlx_sink.errors import ConfigError, ModelError

DEMO = "demo"
"""The name of the model that is part of this package."""


class Loaded(NamedTuple):
    """A model as mlx-lm loads it, nothing attached yet.

    Attributes:
        model: The model.
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        context: Positions the model was trained on, in tokens, or ``None`` if unknown.
    """

    model: nn.Module
    tokenizer: Any
    context: int | None


def load(
    path_or_repo: str | Path = DEMO, config: SinkConfig | None = None, **options: Any
) -> tuple[nn.Module, Any]:
    """Load a model and give it a cache of fixed size.

    Args:
        path_or_repo: A folder with an MLX or Hugging Face checkpoint, a repository on the
            Hugging Face hub, or ``"demo"`` for the small model inside this package.
        config: What to keep; by default 4 sinks and a window of 1,024 tokens, or as much as
            the model's trained context holds.
        options: Passed to `mlx_lm.load`: ``adapter_path``, ``tokenizer_config``,
            ``trust_remote_code``, ...

    Returns:
        The model, attached, and its tokenizer.

    Raises:
        ModelError: The model cannot be found or is damaged.
        UnsupportedModelError: The contract cannot be kept for this model.
        ConfigError: The capacity exceeds the model's trained context.
    """
    model, tokenizer, context = load_unattached(path_or_repo, **options)
    config = config or SinkConfig.for_context(context)
    config.check_context(context)
    attach(model, config)
    return model, tokenizer


def load_draft(
    path_or_repo: str | Path, tokenizer: Any, config: SinkConfig, **options: Any
) -> nn.Module:
    """Load a draft model for a model, and attach to it.

    Args:
        path_or_repo: As in `load`.
        tokenizer: The model's tokenizer.
        config: What the model keeps; the draft keeps as much of it as its own context holds, and
            never quantised: its cache is small.
        options: As in `load`.

    Raises:
        ModelError: Also when the tokenizers do not match.
        UnsupportedModelError: As in `load`.
        ConfigError: The draft's trained context does not even hold the sinks.
    """
    model, draft_tokenizer, context = load_unattached(path_or_repo, **options)
    check_vocabulary(tokenizer, draft_tokenizer)
    window = config.window if context is None else min(config.window, context - config.num_sinks)
    if window < 1:
        raise ConfigError(
            f"the draft model's context of {context} tokens does not hold the "
            f"{config.num_sinks} sinks"
        )
    attach(model, replace(config, window=window, kv_bits=None, k_bits=None, v_bits=None))
    return model


def load_unattached(path_or_repo: str | Path = DEMO, **options: Any) -> Loaded:
    """Load a model and its tokenizer, and read how long its trained context is.

    Arguments and errors as in `load`.
    """
    where = _find(str(path_or_repo))
    try:
        # mlx-lm and transformers raise whatever a damaged file happens to trip over.
        loaded = mlx_lm.load(where, return_config=True, **options)
    except Exception as error:
        reason = _first_line(error)
        raise ModelError(f"cannot load model {str(path_or_repo)!r}: {reason}") from error
    model, tokenizer, config = cast("tuple[nn.Module, Any, dict[str, Any]]", loaded)
    return Loaded(model, tokenizer, _context(config))


def _find(name: str) -> str:
    """Turn a name into a folder or a repository id that mlx-lm takes, or say what is wrong."""
    if name == DEMO:
        return str(Path(__file__).with_name("demo"))
    path = Path(name).expanduser()
    if name and path.is_dir():
        _check_folder(path)
        return str(path)
    if name and path.exists():
        raise ModelError(f"model {name!r} is a file: name the folder that holds config.json")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name):
        raise ModelError(f"model folder {name!r} does not exist")
    return name


def _check_folder(path: Path) -> None:
    """Raise unless the folder holds a configuration and whole weight files.

    mlx-lm would find most of this too, but late, and not in one line.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(f"model folder {str(path)!r} has no config.json")
    config = _read_json(config_file)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{str(config_file)!r} names no model_type")
    shards = sorted(path.glob("model*.safetensors"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{str(index)!r} has no weight_map")
        names = {str(name) for name in cast("dict[str, object]", weight_map).values()}
        missing = sorted(names - {shard.name for shard in shards})
        if missing:
            raise ModelError(f"model folder {str(path)!r} lacks {missing[0]}")
    if not shards:
        raise ModelError(f"model folder {str(path)!r} has no model*.safetensors")
    for shard in shards:
        _check_safetensors(shard)


def _check_safetensors(path: Path) -> None:
    """Raise unless the file is as long as its header says (safetensors format)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ModelError(f"{str(path)!r} is cut off: {size} bytes do not hold its header")
        try:
            header = json.loads(file.read(length))
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ModelError(f"{str(path)!r} is not a safetensors file") from None
    if expected != size:
        raise ModelError(f"{str(path)!r} is damaged: {size} bytes instead of {expected}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {str(path)!r}: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{str(path)!r} does not hold a JSON object")
    return cast("dict[str, Any]", value)


def _context(config: dict[str, Any]) -> int | None:
    text = config.get("text_config")
    for where in (config, cast("dict[str, Any]", text) if isinstance(text, dict) else {}):
        context = where.get("max_position_embeddings")
        if isinstance(context, int):
            return context
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
