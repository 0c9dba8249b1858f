"""From a Hugging Face checkpoint to a folder that streams.

The conversion is mlx-lm's own, and so is the folder: plain mlx-lm loads it. What is added are
checks before anything is written, a folder that appears when it is complete, and a calibration.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils

from mlx_sink.commands.convert import progress as writing
from mlx_sink.commands.convert.card import write_calibration
from mlx_sink.commands.convert.quantize import Recipe, rewritten
from mlx_sink.errors import OutputError, one_line
from mlx_sink.io import atomic, lock, terminal
from mlx_sink.io.units import format_bytes
from mlx_sink.measure.calibrate import Calibration, calibrate, read
from mlx_sink.models.attach import attach, detach
from mlx_sink.models.checkpoints import checkpoint, settings
from mlx_sink.models.checkpoints.checkpoint import Checkpoint
from mlx_sink.models.checkpoints.settings import Settings
from mlx_sink.models.lazy import parameters, set_parameters, weight_bytes
from mlx_sink.models.load import by_mlx_lm, find_checkpoint, load_unattached, repository_of
from mlx_sink.models.report import Report


class Text(NamedTuple):
    """A text to measure a model on.

    Attributes:
        text: The text itself.
        name: What it is, in words, for SINK.md.
    """

    text: str
    name: str


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion made.

    Attributes:
        path: The new folder.
        nbytes: Bytes of its weights.
        shards: Its weight files.
        seconds: Time it took, calibration included.
        report: What the model gets when it is loaded, and where its settings come from.
        calibration: What was measured, if it was asked for.
    """

    path: Path
    nbytes: int
    shards: int
    seconds: float
    report: Report
    calibration: Calibration | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as a JSON-ready dictionary."""
        return {
            "path": str(self.path),
            "bytes": self.nbytes,
            "shards": self.shards,
            "seconds": round(self.seconds, 3),
            "report": self.report.to_dict(),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
        }


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    *,
    recipe: Recipe | None = None,
    calibrate_on: Text | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Converted:
    """Convert a checkpoint to a folder that mlx-lm and mlx_sink load.

    Args:
        hf_path: A folder, or a repository on the Hugging Face hub.
        mlx_path: The folder to be made. It appears when it is complete; until then the work lies
            beside it, hidden, and the next conversion removes what a killed one left.
        recipe: How to write the weights; as they are by default.
        calibrate_on: A text to measure the model on, so that its own ``num_sinks`` and ``window``
            are written to config.json, and SINK.md beside it; see `mlx_sink.calibrate`.
        revision: Branch, tag or commit of the repository.
        trust_remote_code: Run code that comes with the model or its tokenizer.

    Returns:
        What was made.

    Raises:
        ModelError: The checkpoint cannot be found, is damaged, or is not of safetensors files.
        UnsupportedModelError: The contract cannot be kept for this model.
        ConfigError: The recipe does not fit the model.
        OutputError: The folder exists, cannot be written, or is being made by another process.
    """
    target = Path(mlx_path).expanduser()
    _check_target(target)
    with lock.holding(target, f"folder {str(target)!r}", warn=terminal.warn):
        _check_target(target)  # another process may have made it meanwhile
        atomic.clean(target)
        return _convert(
            str(hf_path), target, recipe or Recipe(), calibrate_on, revision, trust_remote_code
        )


def _convert(
    name: str,
    target: Path,
    recipe: Recipe,
    calibrate_on: Text | None,
    revision: str | None,
    trust_remote_code: bool,
) -> Converted:
    start = time.perf_counter()
    source = find_checkpoint(name, revision)
    # Lazily: shapes and types are known, no weight is read yet.
    model, tokenizer, config = by_mlx_lm(
        name, source, lazy=True, trust_remote_code=trust_remote_code
    )
    own = Settings.of(config)
    context = checkpoint.trained_context(config)
    report = _report(model, own, context)
    model, config = rewritten(model, config, recipe)
    if calibrate_on is not None:
        read(tokenizer, calibrate_on.text)  # a text that is too short is better refused now
    nbytes = weight_bytes(model)
    shards = len(mlx_lm_utils.make_shards(dict(parameters(model))))
    _check_room(target, nbytes, source)
    calibration = None
    try:
        with atomic.whole_folder(target) as folder:
            with writing.progress(folder, nbytes, shards):
                _save(folder, source, model, tokenizer, config)
            del model
            if repository := repository_of(name):
                _write_card(folder, repository)
            checkpoint.check(folder)
            if calibrate_on is not None:
                calibration, report = _calibrated(folder, calibrate_on, trust_remote_code)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise OutputError(f"cannot write {str(target)!r}: {reason}") from None
    seconds = time.perf_counter() - start
    return Converted(target, nbytes, shards, seconds, report, calibration)


def _check_target(path: Path) -> None:
    """Raise unless the folder can go there."""
    if os.path.lexists(path):
        raise OutputError(f"{str(path)!r} exists: remove it, or name another --mlx-path")
    if not path.name or not path.parent.is_dir():
        raise OutputError(f"{str(path)!r} cannot be made: there is no folder {str(path.parent)!r}")


def _report(model: nn.Module, own: Settings, context: int | None) -> Report:
    """Make sure that the model will stream before anything is written."""
    config, sources = settings.apply(own, context)
    # A forward pass may change weights: Gemma 3n's clips some, in float32.
    weights = parameters(model)
    report = replace(attach(model, config), sources=sources)
    detach(model)
    set_parameters(model, weights)
    return report


def _check_room(target: Path, nbytes: int, source: Checkpoint) -> None:
    """Say how large the folder will be, and raise if it does not fit on the disk."""
    others = sum(
        file.stat().st_size
        for file in source.path.iterdir()
        if file.is_file() and file.name not in source.shards and file.suffix != ".bin"
    )
    needed, free = nbytes + others, shutil.disk_usage(target.parent).free
    if needed > free:
        raise OutputError(
            f"{str(target)!r} needs {format_bytes(needed)}, and its disk has "
            f"{format_bytes(free)} free: make room, or name another --mlx-path"
        )
    terminal.say(
        f"writing {format_bytes(nbytes)} of weights to {target} ({format_bytes(free)} free)"
    )


def _save(
    folder: Path, source: Checkpoint, model: nn.Module, tokenizer: Any, config: dict[str, Any]
) -> None:
    try:
        mlx_lm_utils.save(folder, str(source.path), model, tokenizer, config)
    except RuntimeError as error:
        # What MLX raises when it cannot write.
        raise OSError(None, one_line(error)) from None


def _write_card(folder: Path, name: str) -> None:
    """Give a model from the hub the card that mlx-lm would, so that its licence goes along."""
    try:
        mlx_lm_utils.create_model_card(folder, name)
    except Exception as error:  # whatever the hub or the network raises; a card can wait
        terminal.say(f"the model card was not copied: {one_line(error)}")


def _calibrated(folder: Path, on: Text, trust: bool) -> tuple[Calibration, Report]:
    """Measure the model as it was written, and write the settings and figures to its folder."""
    loaded = load_unattached(folder, trust_remote_code=trust)
    calibration = calibrate(loaded.model, loaded.tokenizer, on.text, context=loaded.context)
    for message in write_calibration(folder, calibration, on.name):
        terminal.say(message)
    return calibration, _report(loaded.model, calibration.settings, loaded.context)
