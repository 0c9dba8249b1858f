"""``python -m mlx_sink.convert``: the command line of a conversion."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_lm import utils as mlx_lm_utils

from mlx_sink.commands.convert.card import SAMPLE, sample_text
from mlx_sink.commands.convert.convert import Converted, Text, convert
from mlx_sink.commands.convert.quantize import PREDICATES, Recipe
from mlx_sink.commands.numbers import integer
from mlx_sink.commands.options import Parser, program
from mlx_sink.errors import OutputError, one_line
from mlx_sink.io import terminal
from mlx_sink.io import text as text_io
from mlx_sink.io.units import format_bytes
from mlx_sink.models.checkpoints.quantization import MODES
from mlx_sink.models.lazy import DTYPES

PROG = program("convert")


def parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    p = Parser(
        prog=PROG,
        description="Convert a Hugging Face checkpoint to a folder that mlx-lm and mlx_sink load, "
        "with settings measured on that model.",
    )
    add = p.add_argument
    add(
        "--hf-path",
        "--model",
        required=True,
        help="a model folder, a file of GGUF, or a repository on the hub",
    )
    add("--mlx-path", default="mlx_model", help="the folder to make (mlx_model)")
    add("-q", "--quantize", action="store_true", help="quantise the weights")
    add("--q-bits", type=integer(1, 8), help="bits per weight")
    add("--q-group-size", type=integer(1), help="weights that share a scale")
    add("--q-mode", choices=MODES, default="affine", help="how to quantise (affine)")
    add("--quant-predicate", choices=PREDICATES, help="a mixed-bit recipe")
    add("--dtype", choices=DTYPES, help="type of what is not quantised")
    add("--upload-repo", help="a repository on the hub to upload the folder to")
    add("--revision", help="branch, tag or commit of the repository")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run code that comes with the model or its tokenizer (default: never)",
    )
    add(
        "--calibrate",
        nargs="?",
        const="",
        metavar="TEXT",
        help="measure sinks and window on a UTF-8 text file (default: a short story that comes "
        "with mlx_sink), write them to config.json, and the figures to SINK.md",
    )
    add("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, errors are raised."""
    args = parser().parse_args(argv)
    text = None
    if args.calibrate is not None:
        text = Text(sample_text(), SAMPLE)
        if args.calibrate:
            name = f"text file {args.calibrate!r}"
            text = Text(text_io.read(args.calibrate, name), Path(args.calibrate).name)
    names = ("quantize", "q_bits", "q_group_size", "q_mode", "quant_predicate", "dtype")
    recipe = Recipe(**{name: getattr(args, name) for name in names})
    with contextlib.redirect_stdout(sys.stderr):
        converted = convert(
            args.hf_path,
            args.mlx_path,
            recipe=recipe,
            calibrate_on=text,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
        )
        if args.upload_repo:
            _upload(converted.path, args.upload_repo)
    terminal.write(
        (json.dumps(converted.to_dict(), indent=1) if args.json else _summary(converted)) + "\n"
    )
    return 0


def _upload(path: Path, repo: str) -> None:
    try:
        mlx_lm_utils.upload_to_hub(str(path), repo)
    except Exception as error:  # whatever the hub or the network raises
        raise OutputError(
            f"{str(path)!r} is complete, but was not uploaded to {repo!r}: {one_line(error)}"
        ) from error


def _summary(converted: Converted) -> str:
    lines = [
        f"{converted.path}: {format_bytes(converted.nbytes)} in {converted.shards} "
        f"file{'s' * (converted.shards != 1)}, made in {converted.seconds:.1f} s",
        str(converted.report),
    ]
    if converted.calibration is not None:
        lines.append(converted.calibration.verdict)
    return "\n".join(lines)
