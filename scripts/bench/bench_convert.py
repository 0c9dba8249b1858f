#!/usr/bin/env python
"""Time and peak memory of a conversion, beside mlx-lm's own converter.

    python scripts/bench/bench_convert.py --megabytes 1200 --shard-megabytes 200

A random Llama is written in shards, and converted by both, alternating, each run in a process of
its own. mlx-lm writes shards of 5 GB, more than a model that a test machine likes to hold; here
both are told to write smaller ones, so that a conversion has several. Peak memory is that of the
process; what a conversion needs for itself is measured by loading the model lazily,
as both do, and writing nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _checkout
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

ROOT = _checkout.ROOT
DEMO = ROOT / "mlx_sink" / "models" / "demo"
ONE = """
import json, pathlib, resource, sys, time
import mlx_lm, mlx_lm.convert
from mlx_lm import utils
arm, source, target, shard, options = sys.argv[1:]
options = json.loads(options)
def small_shards(weights):
    shards, held, most = [], 0, int(shard) * 10**6
    for name, weight in weights.items():
        if not shards or held + weight.nbytes > most:
            shards.append({})
            held = 0
        shards[-1][name] = weight
        held += weight.nbytes
    return shards
utils.make_shards = small_shards
from mlx_sink.io import atomic
from mlx_sink.convert import Recipe, convert
start = time.perf_counter()
if arm == "ours":
    convert(source, target, recipe=Recipe(**options))
elif arm in ("mlx_lm", "synced"):
    sys.modules["mlx_lm.convert"].convert(source, target, **options)
    if arm == "synced":
        for file in pathlib.Path(target).iterdir():
            atomic.sync_file(file)
else:
    mlx_lm.load(source, lazy=True)
seconds = time.perf_counter() - start
try:
    # On Linux ru_maxrss begins with what the parent held before exec.
    lines = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
except FileNotFoundError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak_bytes": peak}))
"""


def main(argv: list[str] | None = None) -> int:
    """Measure, and print a table and the JSON."""
    parser = argparse.ArgumentParser(description="Time and peak memory of a conversion.")
    parser.add_argument("--megabytes", type=int, default=1200, help="bytes of the weights")
    parser.add_argument("--shard-megabytes", type=int, default=200, help="of a weight file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantize", action="store_true", help="to 4 bits")
    parser.add_argument("--dtype", help="as of the converters")
    parser.add_argument("--folder", type=Path, help="where to work (a temporary folder)")
    args = parser.parse_args(argv)
    options: dict[str, Any] = {"quantize": True, "q_bits": 4} if args.quantize else {}
    options |= {"dtype": args.dtype} if args.dtype else {}
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        result = measure(Path(work), args, options)
    print(table(result))
    print(json.dumps(result))
    return 0


def measure(work: Path, args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Run every arm in turn, as often as asked for."""
    largest = make_source(work / "source", args.megabytes, args.shard_megabytes)
    runs: dict[str, list[dict[str, float]]] = {"lazy": [], "mlx_lm": [], "synced": [], "ours": []}
    for i in range(args.rounds):
        # Who goes first pays for cold caches of the disk; each does it in turn.
        for arm in list(runs) if i % 2 else list(reversed(runs)):
            target = work / arm
            command = [sys.executable, "-c", ONE, arm, str(work / "source"), str(target)]
            command += [str(args.shard_megabytes), json.dumps(options)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise SystemExit(done.stderr)
            runs[arm].append(json.loads(done.stdout.splitlines()[-1]))
            written = max((f.stat().st_size for f in target.glob("*.safetensors")), default=0)
            largest = max(largest, written)
            shutil.rmtree(target, ignore_errors=True)
    middle = {
        arm: {
            key: statistics.median(run[key] for run in made) for key in ("seconds", "peak_bytes")
        }
        for arm, made in runs.items()
    }
    need = middle["lazy"]["peak_bytes"]
    limit = 1.3 * largest + need
    return {
        "megabytes": args.megabytes,
        "options": options,
        "largest_shard_bytes": largest,
        "runs": runs,
        "median": middle,
        "time_ratio": middle["ours"]["seconds"] / middle["mlx_lm"]["seconds"],
        "time_ratio_synced": middle["ours"]["seconds"] / middle["synced"]["seconds"],
        "peak_limit_bytes": limit,
        "peak_over_limit": middle["ours"]["peak_bytes"] / limit,
    }


def table(result: dict[str, Any]) -> str:
    """Lay the figures out for people."""
    lines = [f"{'':<22} {'seconds':>9} {'peak MB':>9}"]
    names = {
        "lazy": "loaded lazily, only",
        "mlx_lm": "mlx_lm.convert",
        "synced": "the same, then synced",
        "ours": "mlx_sink.convert",
    }
    for arm, name in names.items():
        row = result["median"][arm]
        lines.append(f"{name:<22} {row['seconds']:>9.2f} {row['peak_bytes'] / 1e6:>9.1f}")
    lines.append(
        f"time: {result['time_ratio']:.3f} of mlx_lm.convert's, which leaves the files to be "
        f"written by the system later; {result['time_ratio_synced']:.3f} with them on disk. Peak: "
        f"{result['median']['ours']['peak_bytes'] / 1e6:.1f} MB, and 1.3 times the largest shard "
        f"({result['largest_shard_bytes'] / 1e6:.1f} MB) plus the lazily loaded model are "
        f"{result['peak_limit_bytes'] / 1e6:.1f} MB"
    )
    return "\n".join(lines)


def make_source(folder: Path, megabytes: int, shard: int) -> int:
    """Write a random llama in shards with an index; return the bytes of the largest."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder)
    config = json.loads((DEMO / "config.json").read_text())
    # Layers of 16 MB or so, as many as it takes.
    config |= {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    config |= {"num_key_value_heads": 8, "num_hidden_layers": max(1, megabytes // 17)}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tree_flatten(Model(ModelArgs.from_dict(config)).parameters())
    draw, weight_map, sizes = np.random.default_rng(0), {}, []
    held: dict[str, mx.array] = {}

    def write() -> None:
        name = f"model-{len(sizes) + 1:05d}.safetensors"
        mx.save_safetensors(str(folder / name), held, {"format": "pt"})
        weight_map.update(dict.fromkeys(held, name))
        sizes.append((folder / name).stat().st_size)
        held.clear()

    for name, weight in shapes:
        if held and sum(w.nbytes for w in held.values()) + weight.nbytes > shard * 10**6:
            write()
        held[name] = mx.array(draw.random(weight.shape, np.float32) - 0.5)
    write()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(sizes)


if __name__ == "__main__":
    sys.exit(main())
