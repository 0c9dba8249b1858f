"""Find a model (the embedded one, a folder, or a hub repository), load it, attach to it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, overload

import mlx.nn as nn
import mlx_lm
from mlx_lm import utils as mlx_lm_utils

from mlx_sink.config import SinkConfig
from mlx_sink.errors import ConfigError, ModelError, one_line
from mlx_sink.models import checkpoint, demo, settings, spelling
from mlx_sink.models.attach import attach
from mlx_sink.models.report import Report
from mlx_sink.models.settings import Settings

DEMO = demo.NAME


class Loaded(NamedTuple):
    """A model as mlx-lm loads it, nothing attached yet.

    Attributes:
        model: The model.
        tokenizer: mlx-lm's ``TokenizerWrapper``.
        context: Positions the model was trained on, in tokens, or ``None`` if unknown.
        settings: The ``mlx_sink`` section of its configuration.
    """

    model: nn.Module
    tokenizer: Any
    context: int | None
    settings: Settings


@overload
def load(
    path_or_repo: str | Path = DEMO,
    config: SinkConfig | None = None,
    *,
    return_report: Literal[False] = False,
    **options: Any,
) -> tuple[nn.Module, Any]: ...


@overload
def load(
    path_or_repo: str | Path = DEMO,
    config: SinkConfig | None = None,
    *,
    return_report: Literal[True],
    **options: Any,
) -> tuple[nn.Module, Any, Report]: ...


def load(
    path_or_repo: str | Path = DEMO,
    config: SinkConfig | None = None,
    *,
    return_report: bool = False,
    **options: Any,
) -> tuple[nn.Module, Any] | tuple[nn.Module, Any, Report]:
    """Load a model and give it a cache of fixed size.

    Args:
        path_or_repo: A folder with an MLX or Hugging Face checkpoint, a repository on the
            Hugging Face hub, or ``"demo"`` for the small model inside this package.
        config: What to keep; by default what the ``mlx_sink`` section of the model's config.json
            says (`mlx_sink.convert` writes one), and without one 4 sinks and a window of 1,024
            tokens, or as much as the model's trained context holds.
        return_report: Return the report too: which layer got what, and where the settings
            come from.
        options: Passed to `mlx_lm.load`: ``adapter_path``, ``tokenizer_config``,
            ``trust_remote_code``, ``revision``, ...

    Returns:
        The model, attached, its tokenizer, and the report if asked for.

    Raises:
        ModelError: The model cannot be found or is damaged.
        UnsupportedModelError: The contract cannot be kept for this model.
        ConfigError: The capacity exceeds the model's trained context.
    """
    loaded = load_unattached(path_or_repo, **options)
    if config is None:
        config, sources = settings.apply(loaded.settings, loaded.context)
    else:
        config.check_context(loaded.context)
        sources = dict.fromkeys(("num_sinks", "window"), settings.ARGUMENT)
    report = replace(attach(loaded.model, config), sources=sources)
    if return_report:
        return loaded.model, loaded.tokenizer, report
    return loaded.model, loaded.tokenizer


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
    model, draft_tokenizer, context, _ = load_unattached(path_or_repo, **options)
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
    name = str(path_or_repo)
    found = checkpoint.check(find(name, options.pop("revision", None)))
    own = Settings.of(found.config)
    model_config = spelling.for_mlx_lm(found.config)
    model_config |= cast("dict[str, Any]", options.pop("model_config", None) or {})
    try:
        # mlx-lm and transformers raise whatever a damaged file happens to trip over.
        loaded = mlx_lm.load(
            str(found.path), return_config=True, model_config=model_config, **options
        )
    except Exception as error:
        raise ModelError(f"cannot load model {name!r}: {one_line(error)}") from error
    model, tokenizer, config = cast("tuple[nn.Module, Any, dict[str, Any]]", loaded)
    return Loaded(model, tokenizer, checkpoint.trained_context(config), own)


def find(name: str, revision: str | None = None) -> Path:
    """Return the folder of a model, downloaded if its name is that of a repository.

    Raises:
        ModelError: There is no such folder, and no such repository can be had.
    """
    if name == DEMO:
        return demo.FOLDER
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if name and path.exists():
        raise ModelError(f"model {name!r} is a file: name the folder that holds config.json")
    if not is_remote(name):
        raise ModelError(f"model folder {name!r} does not exist")
    utils = cast("Any", mlx_lm_utils)
    try:
        return Path(
            utils.snapshot_download(
                name, revision=revision, allow_patterns=utils.DEFAULT_ALLOW_PATTERNS
            )
        )
    except Exception as error:
        raise ModelError(f"cannot download model {name!r}: {one_line(error)}") from error


def is_remote(name: str) -> bool:
    """Tell whether a name is that of a repository on the hub: no folder, and spelled like one."""
    if name == DEMO or Path(name).expanduser().exists():
        return False
    return re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name) is not None


def check_vocabulary(tokenizer: Any, draft_tokenizer: Any) -> None:
    """Raise unless two tokenizers give a text the same tokens.

    Special tokens may differ: families of models often name their reserved ones otherwise.

    Raises:
        ModelError: They have other vocabularies.
    """
    ours, theirs = (
        {word: i for word, i in t.get_vocab().items() if word not in t.get_added_vocab()}
        for t in (tokenizer, draft_tokenizer)
    )
    if ours != theirs:
        alike = len(ours.items() & theirs.items())
        raise ModelError(
            f"the draft model's tokenizer does not match the model's: of its {len(theirs)} "
            f"tokens {alike} are among the model's {len(ours)}; use one of the same family"
        )
