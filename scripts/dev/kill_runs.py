"""Kill a run with a session again and again: is its text that of a run left alone?

    python scripts/dev/kill_runs.py --kills 200

Both runs are the same command. One is killed (SIGKILL) at random moments: while it starts, reads
its prompt, writes, or saves, which it does every few tokens. Every restart must go on from the
file; what it wrote after the last save is cut off the text, as the line that it prints says, and
written again. At the end the text must be equal, byte by byte, and no other file may be left.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _checkout

from mlx_sink.io.terminal import say
from mlx_sink.measure.machine import as_json

STORY = _checkout.ROOT / "mlx_sink" / "models" / "demo" / "story.txt"
RESUMED = re.compile(rb"going on at token (\d+), after (\d+) bytes of text")


def main(argv: list[str] | None = None) -> int:
    """Run both, compare, and print the figures; return 1 if anything is not as it must be."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        for place in (alone, killed):
            place.mkdir()
        whole = subprocess.run(command(args, alone), stdout=subprocess.PIPE, check=True).stdout
        text, result = kill(args, killed)
        result |= {
            "same_text": text == whole,
            "bytes": len(whole),
            "files": sorted(os.listdir(killed)),
        }
    print(as_json(result))
    complete = result["kills"] == args.kills and result["files"] == ["session"]
    return 0 if result["same_text"] and complete and not result["refused"] else 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Kill a run again and again; is its text that of a run left alone?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--kills", type=int, default=200, help="kills")
    add("--model", default="demo", help="model")
    add("--prompt-file", default=str(STORY), help="what the run reads first")
    add("--window", type=int, default=124, help="window")
    add("--tokens", type=int, help="tokens that the run makes; 20 a kill and 100 unless stated")
    add("--save-every", type=int, default=3, help="tokens between two saves")
    add("--seed", type=int, default=0, help="seed of the kills and of the run")
    args = parser.parse_args(argv)
    args.tokens = args.tokens or 20 * args.kills + 100
    return args


def command(args: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command: sampling, penalties, a wrapped ring, and saves all the time."""
    run = [sys.executable, "-m", "mlx_sink.generate", "--model", args.model]
    run += ["--prompt-file", args.prompt_file, "--ignore-chat-template"]
    run += ["--window", str(args.window), "--prefill-step-size", "64", "--ignore-eos"]
    run += ["--temp", "0.9", "--top-p", "0.95", "--repetition-penalty", "1.1"]
    run += ["--seed", str(args.seed), "--max-tokens", str(args.tokens)]
    return [*run, "--session", str(folder / "session"), "--save-every", str(args.save_every)]


def kill(args: argparse.Namespace, folder: Path) -> tuple[bytes, dict[str, object]]:
    """Start and kill until there were enough kills, let the last run end; return its text."""
    luck = random.Random(args.seed)
    text, kills, resumed, refused, in_a_save, early = b"", 0, 0, 0, 0, 0
    while True:
        existed = (folder / "session").exists()
        end = kills == args.kills
        out, err, status = one_run(command(args, folder), None if end else luck)
        found = RESUMED.search(err)
        if found:
            resumed += 1
            text = text[: int(found[2])]
        elif existed and out:
            refused += 1  # it began anew
        text += out
        if status != -signal.SIGKILL:
            refused += status != 0
            if status or not end:
                say(f"ended by itself with status {status}: {err.decode()}")
            break
        kills += 1
        early += not found and not out
        in_a_save += any(name.endswith(".tmp") for name in os.listdir(folder))
        if kills % 10 == 0:
            say(f"{kills} kills, {len(text)} bytes of text")
    counts = {"kills": kills, "resumed": resumed, "refused": refused}
    return text, counts | {"while_saving": in_a_save, "while_starting": early}


def one_run(run: list[str], luck: random.Random | None) -> tuple[bytes, bytes, int]:
    """Start a run and, with luck, kill it; return its text, its messages and its status.

    One in eight is killed while it starts or reads, the others after some bytes of text.
    """
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=messages, bufsize=0)
        assert process.stdout is not None
        out = b""
        if luck is not None and luck.random() < 1 / 8:
            time.sleep(luck.uniform(0, 4))
        elif luck is not None:
            wanted = luck.randrange(1, 80)
            while len(out) < wanted and (data := process.stdout.read(wanted - len(out))):
                out += data
            time.sleep(luck.uniform(0, 0.03))
        if luck is not None:
            process.kill()
        out += process.stdout.read()
        status = process.wait()
        messages.seek(0)
        return out, messages.read(), status


if __name__ == "__main__":
    sys.exit(main())
