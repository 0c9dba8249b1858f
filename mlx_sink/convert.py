"""The door of ``python -m mlx_sink.convert``; what it does is in `mlx_sink.commands`.

``from mlx_sink.convert import convert`` is how programs call it, with a `Recipe` for the weights
and a `Text` to calibrate on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_sink.commands.entry import run

if TYPE_CHECKING:
    from mlx_sink.commands.convert.convert import Converted, Text, convert
    from mlx_sink.commands.convert.quantize import Recipe

__all__ = ["Converted", "Recipe", "Text", "convert"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mlx_sink.convert' has no attribute {name!r}")
    from mlx_sink.commands.convert import convert as home

    return getattr(home, name)


if __name__ == "__main__":
    run("convert")
