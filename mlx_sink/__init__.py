"""Endless generation in constant memory: StreamingLLM attention for Apple MLX and mlx-lm.

    import mlx_sink

    model, tokenizer = mlx_sink.load("demo", mlx_sink.SinkConfig(num_sinks=4, window=252))
    for response in mlx_sink.stream_generate(model, tokenizer, "Once upon a time", max_tokens=-1):
        print(response.text, end="", flush=True)

The names below are imported when first used: ``import mlx_sink`` itself loads no model code.
`mlx_sink.budget` is the module `mlx_sink.measure.budget`: the largest window that fits.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_sink.cache.sink_cache import SinkCache
    from mlx_sink.config import SinkConfig
    from mlx_sink.errors import (
        CacheError,
        ConfigError,
        InputError,
        KernelError,
        ModelError,
        OutputError,
        SessionError,
        SinkError,
        UnsupportedModelError,
    )
    from mlx_sink.measure import budget as budget
    from mlx_sink.models.attach import attach, detach
    from mlx_sink.models.load import load
    from mlx_sink.models.report import LayerReport, Report
    from mlx_sink.stream.api import generate, stream_generate
    from mlx_sink.stream.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "ConfigError",
    "InputError",
    "KernelError",
    "LayerReport",
    "ModelError",
    "OutputError",
    "Report",
    "SessionError",
    "SinkCache",
    "SinkConfig",
    "SinkError",
    "Stream",
    "UnsupportedModelError",
    "attach",
    "detach",
    "generate",
    "load",
    "stream_generate",
]

_HOMES = {
    "attach": "models.attach",
    "detach": "models.attach",
    "SinkCache": "cache.sink_cache",
    "SinkConfig": "config",
    "CacheError": "errors",
    "ConfigError": "errors",
    "InputError": "errors",
    "KernelError": "errors",
    "ModelError": "errors",
    "OutputError": "errors",
    "SessionError": "errors",
    "SinkError": "errors",
    "UnsupportedModelError": "errors",
    "Stream": "stream.stream",
    "generate": "stream.api",
    "stream_generate": "stream.api",
    "load": "models.load",
    "LayerReport": "models.report",
    "Report": "models.report",
}

_MODULES = {"budget": "measure.budget"}
"""Modules that are used as attributes: ``mlx_sink.budget.plan(...)``."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = import_module(f"mlx_sink.{_MODULES[name]}")
    elif name in _HOMES:
        value = getattr(import_module(f"mlx_sink.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'mlx_sink' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
