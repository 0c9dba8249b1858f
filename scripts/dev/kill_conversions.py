#!/usr/bin/env python
"""Kill conversions at random moments and look at what is left: a whole folder or none.

    python scripts/dev/kill_conversions.py --kills 50

A random model is converted and calibrated once in peace. Then the same command is killed (SIGKILL)
at random moments between its first write and its end, again and again, at one and the same target.
After each kill the target is not there, or it is, byte for byte, the folder made in peace;
what else lies beside it is hidden. At the end one more run is let through, and nothing but its
folder is left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _checkout
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

ROOT = _checkout.ROOT
TEXT = "the cat and the dog went to the sea and the cat sat down. " * 10


def main(argv: list[str] | None = None) -> int:
    """Run the kills; returns 1 if anything but a whole folder was ever left."""
    parser = argparse.ArgumentParser(description="Kill conversions at random moments.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--megabytes", type=int, default=64, help="size of the weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as work:
        return _run(Path(work), args.kills, args.megabytes)


def _run(work: Path, kills: int, megabytes: int) -> int:
    source, text, place = make_source(work / "source", megabytes), work / "text.txt", work / "out"
    text.write_text(TEXT)
    place.mkdir()
    target = place / "made"
    command = [sys.executable, "-m", "mlx_sink.convert", "--hf-path", str(source)]
    command += ["--mlx-path", str(target), "--calibrate", str(text)]
    start = time.perf_counter()
    process = subprocess.Popen(command, **QUIET, cwd=ROOT)
    while process.poll() is None and not _inside(place):
        time.sleep(0.002)
    first = time.perf_counter() - start
    if process.wait() != 0:
        raise SystemExit("the conversion itself does not work")
    total = time.perf_counter() - start
    whole = digest(target)
    shutil.rmtree(target)
    counts = {"nothing": 0, "hidden": 0, "whole": 0}
    wrong: list[str] = []
    for i in range(kills):
        # Half of them while files are being written, half anywhere in the process's life.
        process = subprocess.Popen(command, **QUIET, cwd=ROOT)
        time.sleep(random.uniform(first if i % 2 else 0, 1.05 * total))
        process.kill()
        process.wait()
        visible = [p for p in _inside(place) if not p.name.startswith(".")]
        hidden = [p for p in _inside(place) if p.name.startswith(".")]
        if len(hidden) > 1:
            wrong.append(f"kill {i}: {len(hidden)} leftovers: the run before was not cleaned up")
        if visible:
            counts["whole"] += 1
            if visible != [target] or digest(target) != whole:
                wrong.append(f"kill {i}: a folder that is not whole")
            shutil.rmtree(target)
        else:
            counts["hidden" if hidden else "nothing"] += 1
    if subprocess.run(command, **QUIET, cwd=ROOT).returncode or list(place.iterdir()) != [target]:
        wrong.append("the run after the kills does not work, or leaves more than its folder")
    elif digest(target) != whole:
        wrong.append("the run after the kills makes another folder")
    print(
        f"{kills} kills, a run takes {total:.2f} s and writes from {first:.2f} s on; left behind: "
        f"nothing {counts['nothing']}, a hidden folder {counts['hidden']}, the whole folder "
        f"{counts['whole']}; wrong: {len(wrong)}"
    )
    for line in wrong:
        print(line)
    return int(bool(wrong))


def _inside(place: Path) -> list[Path]:
    """Return what a folder holds, but for a lock: one that a killed run leaves locks nothing."""
    return [path for path in place.iterdir() if path.suffix != ".lock"]


QUIET: dict[str, int] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def make_source(folder: Path, megabytes: int) -> Path:
    """Write a random llama of about that size, with the tokenizer of the embedded model."""
    demo = ROOT / "mlx_sink" / "models" / "demo"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder)
    config = json.loads((demo / "config.json").read_text())
    config["intermediate_size"] = megabytes * 10**6 // (4 * 3 * config["hidden_size"] * 2)
    config["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    draw = np.random.default_rng(0)
    weights = {
        k: mx.array(0.02 * draw.standard_normal(w.shape, "float32")) for k, w in weights.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def digest(folder: Path) -> str:
    """Return a hash over all names and contents."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        # matplotlib writes no date into a PNG, so that it too is the same every time.
        total.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
