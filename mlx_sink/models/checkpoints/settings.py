"""Read the ``mlx_sink`` section of a model's config.json, and decide which settings apply.

An argument goes before the section, and the section before the defaults. mlx-lm ignores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from mlx_sink.config import SinkConfig
from mlx_sink.errors import ConfigError, ModelError

SECTION = "mlx_sink"
ARGUMENT, SECTION_SOURCE, DEFAULT = "argument", "config.json", "default"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a model's section; ``None`` for those that it lacks.

    Attributes:
        num_sinks: As in `SinkConfig`.
        window: As in `SinkConfig`.
    """

    num_sinks: int | None = None
    window: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """Read and validate the section of a model's configuration; empty if there is none.

        Raises:
            ModelError: The section is not one that a calibration writes.
        """
        section = config.get(SECTION, {})
        if not isinstance(section, dict):
            raise ModelError(f"the {SECTION} section of config.json is not a JSON object")
        values = cast("dict[str, Any]", section)
        unknown = sorted(values.keys() - {"num_sinks", "window", "calibration"})
        if unknown:
            raise ModelError(
                f"the {SECTION} section of config.json has an unknown key {unknown[0]!r}: "
                "num_sinks, window and calibration are known"
            )
        if not isinstance(values.get("calibration", {}), dict):
            raise ModelError(f"{SECTION}.calibration in config.json is not a JSON object")
        given = {key: values[key] for key in ("num_sinks", "window") if key in values}
        try:
            SinkConfig(**given)
        except ConfigError as error:
            raise ModelError(f"the {SECTION} section of config.json: {error}") from None
        return cls(**given)


class Applied(NamedTuple):
    """A configuration, and where each of its settings comes from.

    Attributes:
        config: What to keep.
        sources: ``"argument"``, ``"config.json"`` or ``"default"``, by setting.
    """

    config: SinkConfig
    sources: dict[str, str]


def apply(
    settings: Settings,
    context: int | None,
    num_sinks: int | None = None,
    window: int | None = None,
    **others: Any,
) -> Applied:
    """Combine the settings: arguments first, then the model's own section, then the defaults.

    A window from the section or the defaults shrinks to leave room for sinks given as an argument,
    and for what is looked up.

    Args:
        settings: The model's own section.
        context: Positions the model was trained on, in tokens, or ``None`` if unknown.
        num_sinks: The argument, or ``None``.
        window: The argument, or ``None``.
        others: Other fields of `SinkConfig`.

    Raises:
        ConfigError: A value is out of range, or the capacity exceeds the context.
    """
    sources = {
        "num_sinks": _source(num_sinks, settings.num_sinks),
        "window": _source(window, settings.window),
    }
    if window is None and settings.window is not None:
        window = settings.window
        beside = SinkConfig(0, window, **others).seen - window
        if context is not None and (num_sinks is not None or beside):
            sinks = (num_sinks or settings.num_sinks or 0) + beside
            window = max(1, min(window, context - sinks))
    if num_sinks is None:
        num_sinks = settings.num_sinks
    config = SinkConfig.for_context(context, num_sinks, window, **others)
    config.check_context(context)
    return Applied(config, sources)


def _source(argument: int | None, own: int | None) -> str:
    return ARGUMENT if argument is not None else DEFAULT if own is None else SECTION_SOURCE
