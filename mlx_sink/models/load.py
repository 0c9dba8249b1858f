"""Find a model (the embedded one, a folder, or a hub repository), load it, attach to it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, overload

import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils

from mlx_sink.config import SinkConfig
from mlx_sink.errors import ConfigError, ModelError, one_line
from mlx_sink.io import terminal
from mlx_sink.io.gguf import is_gguf
from mlx_sink.models import demo, weights
from mlx_sink.models.attach import attach
from mlx_sink.models.checkpoints import checkpoint, folders, quantization, settings, spelling
from mlx_sink.models.checkpoints.checkpoint import CONFIG, Checkpoint
from mlx_sink.models.checkpoints.names import Place, place_of
from mlx_sink.models.checkpoints.settings import Settings
from mlx_sink.models.gguf.source import checkpoint_of, file_in, opened
from mlx_sink.models.report import Report
from mlx_sink.models.vocabulary import check_vocabulary

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
        options: As in `mlx_lm.load`: ``adapter_path``, ``tokenizer_config``, ``revision``, ...;
            ``trust_remote_code`` is for the model's code and its tokenizer's alike.

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
            never quantised: its cache is small. It looks up nothing.
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
    plain = {"kv_bits": None, "k_bits": None, "v_bits": None, "recall": 0, "recall_layers": None}
    attach(model, replace(config, window=window, **plain))
    return model


def load_unattached(path_or_repo: str | Path = DEMO, **options: Any) -> Loaded:
    """Load a model and its tokenizer, and read how long its trained context is.

    Arguments and errors as in `load`.
    """
    name = str(path_or_repo)
    found = find_checkpoint(name, options.pop("revision", None))
    own = Settings.of(found.config)
    model_config = cast("dict[str, Any]", options.pop("model_config", None) or {})
    model, tokenizer, config = by_mlx_lm(name, found, model_config=model_config, **options)
    return Loaded(model, tokenizer, checkpoint.trained_context(config), own)


def find_checkpoint(name: str, revision: str | None = None) -> Checkpoint:
    """Find a model, and check that mlx-lm reads what is there.

    Args:
        name: What a person calls it; see `names.place_of`.
        revision: Branch, tag or commit of a repository.

    Raises:
        ModelError: It cannot be found, is damaged, or is of a kind that is not read.
    """
    path = find(name, revision)
    return checkpoint_of(path) if path.is_file() else check_folder(name, path)


def gguf_of(name: str) -> Checkpoint | None:
    """Return the model that a name stands for if it is in GGUF on this machine; else ``None``.

    Raises:
        ModelError: As `find_checkpoint`.
    """
    place = place_of(name)
    path = None if place.path is None else _model_in(place.path)
    return checkpoint_of(path) if path is not None and is_gguf(path) else None


def check_folder(name: str, path: Path) -> Checkpoint:
    """Check that mlx-lm reads what is in a model folder.

    Args:
        name: What to call the model in an error.
        path: The folder.

    Raises:
        ModelError: It is damaged, or of a kind that is not read.
    """
    found = checkpoint.check(path)
    reason = quantization.refusal(found.config, architecture_of(found.config))
    if reason is None:
        return found
    if not quantization.is_plain(found.tensors):
        raise ModelError(f"cannot load model {name!r}: {reason}")
    tool = quantization.describe(found.config)
    doubt = f"{str(path / CONFIG)!r} says that {tool} quantised the weights, which they are not"
    return replace(found, doubts=(*found.doubts, doubt))


def by_mlx_lm(
    name: str,
    found: Checkpoint,
    *,
    trust_remote_code: bool = False,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Load a model, its tokenizer and its configuration by `mlx_lm.load`.

    mlx-lm asks twice whether code may be run: for the model, and in ``tokenizer_config`` for the
    tokenizer. Where the second answer is missing, transformers asks on the terminal.

    Args:
        name: What to call the model in an error.
        found: Its folder.
        trust_remote_code: Run code that comes with the model or its tokenizer.
        tokenizer_config: As in `mlx_lm.load`; what it says of trust is for the tokenizer alone.
        model_config: As in `mlx_lm.load`; goes before what the folder says.
        options: As in `mlx_lm.load`.

    Raises:
        ModelError: mlx-lm cannot load it.
    """
    if (adapter := options.get("adapter_path")) is not None:
        _check_adapter(adapter)
    spelled = spelling.for_mlx_lm(found.config, found.tensors) | (model_config or {})
    try:
        # mlx-lm prints some warnings to stdout, where the text of a command goes. And both it and
        # transformers raise whatever a damaged file happens to trip over.
        with contextlib.redirect_stdout(sys.stderr):
            trust = {"trust_remote_code": trust_remote_code}
            about = {**trust, **(tokenizer_config or {})}
            loaded = weights.load(found, spelled, tokenizer_config=about, **trust, **options)
    except Exception as error:
        reason = found.explained(error)
        if not trust_remote_code and "trust_remote_code" in str(error):
            reason += " (--trust-remote-code, or trust_remote_code=True, runs it)"
        raise ModelError(f"cannot load model {name!r}: {reason}") from error
    for doubt in found.doubts:
        terminal.warn(doubt)
    return loaded


def _check_adapter(adapter: str | Path) -> None:
    """Raise unless a folder holds an adapter as mlx-lm's ``lora`` writes it."""
    path = Path(adapter).expanduser()
    missing = [
        n for n in ("adapter_config.json", "adapters.safetensors") if not (path / n).is_file()
    ]
    if not path.is_dir():
        raise ModelError(f"adapter folder {str(adapter)!r} does not exist")
    if missing:
        what = folders.what_it_is(path)
        raise ModelError(
            f"adapter folder {str(adapter)!r} has no {missing[0]}"
            + (f": it {what}" if what else "")
        )


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the module of ``mlx_lm.models`` that a configuration is for, whether there or not."""
    kind = str(config["model_type"])
    return str(mlx_lm_utils.MODEL_REMAPPING.get(kind, kind))


def find(name: str, revision: str | None = None) -> Path:
    """Return the folder of a model, downloaded if its name is that of a repository; or its file.

    Raises:
        ModelError: There is no such folder, and no such repository can be had.
    """
    place = place_of(name, revision)
    path = _download(name, place) if place.path is None else place.path
    path = _model_in(path)
    if path.is_dir() or is_gguf(path):
        return path
    raise ModelError(
        f"model {name!r} is a file, and none of GGUF: name the folder that holds config.json"
    )


def _model_in(path: Path) -> Path:
    """Return the GGUF file of a folder that holds one and no other weights, or the path itself."""
    if not path.is_dir() or any(path.glob(checkpoint.PATTERN)):
        return path
    return file_in(path) or path


def find_config(name: str) -> Path:
    """Return the config.json of a model. Of a repository nothing else is downloaded.

    Args:
        name: As in `find`, or that of such a file.

    Raises:
        ModelError: There is none.
    """
    place = place_of(name)
    path = _download(name, place, only=CONFIG) if place.path is None else place.path
    path = _model_in(path)
    if path.is_file():
        return opened(path).folder / CONFIG if is_gguf(path) else path
    if not (path / CONFIG).is_file():
        what = folders.what_it_is(path)
        raise ModelError(f"model {name!r} has no {CONFIG}" + (f": it {what}" if what else ""))
    return path / CONFIG


def repository_of(name: str) -> str | None:
    """Return the repository on the hub that a name stands for; ``None`` for a path.

    Raises:
        ModelError: As `names.place_of`.
    """
    return place_of(name).repo or None


def _download(name: str, place: Place, *, only: str | None = None) -> Path:
    """Download a repository, or one file of it, and return the folder."""
    utils = cast("Any", mlx_lm_utils)
    patterns = utils.DEFAULT_ALLOW_PATTERNS if only is None else [only]
    try:
        # The hub's client raises errors of many packages.
        folder = utils.snapshot_download(
            place.repo, revision=place.revision, allow_patterns=patterns
        )
    except Exception as error:
        what = "model" if only is None else f"{only} of model"
        raise ModelError(f"cannot download {what} {name!r}: {one_line(error)}") from error
    return Path(folder)
