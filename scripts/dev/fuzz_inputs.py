"""Thousands of wrong inputs: no traceback, no hang, no crash, nothing half-written.

    python scripts/dev/fuzz_inputs.py --cases 3000

Each case is a seed. It changes one kind of input (a command line, a file of a model folder, a
session, a followed log), runs a command on it in a child process, and looks at the exit status,
at what was said, and at what lies in the folder afterwards. A child that crashes or hangs is a
finding; the next case goes on in a new one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing as mp
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import _checkout
from folder import make_folder

ALLOWED = {0, 2, 3, 130}
SECONDS = 20
"""A case that takes longer hangs."""

STARTING = 180
"""Seconds in which a child must have begun: it imports mlx-lm first."""

VALUES: list[Any] = [None, "", "x", "auto", -1, 0, 1, 3, 0.5, 10**9, 2**63, 1e308, True, False]
VALUES += [[], {}, [None], {"a": 1}, [1] * 5, "\u0000", "é" * 50, "../.."]
VALUES += [{"rope_type": "x"}, {"quant_method": "awq"}, {"bits": "x", "group_size": []}]
WORDS = ["", "0", "-1", "1", "3", "nan", "inf", "1e999", "x", "é", "\ud800", "--", "-", "4K"]
WORDS += [
    "/",
    ".",
    "nowhere",
    "https://a.b/c",
    "a/b/c",
    "{}",
    "[1]",
    '{"a": 1}',
    "\\n",
    " ",
    "2GB",
]
TEMPLATES = [
    "{{ messages[9].content }}",
    "{% for m in messages %}{{ m.content[0].text }}{% endfor %}",
    "{{ raise_exception('no system\\nprompt') }}",
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "{% for m in messages %}</s>{{ m.content }}</s>{% endfor %}",
    "{{ 1 / 0 }}",
    "{% if",
    "",
    "{{ bos_token }}" * 9,
    "{{ messages }}",
]

Case = tuple[str, list[str]]
"""A command and its arguments."""


def changed(rng: random.Random, value: Any) -> Any:
    """Return JSON with one value replaced, removed, or added."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        copy = dict(value)
        match rng.randrange(4):
            case 0:
                copy.pop(key)
            case 1:
                copy[rng.choice(WORDS)] = rng.choice(VALUES)
            case _:
                copy[key] = changed(rng, value[key])
        return copy
    return rng.choice(VALUES)


def change_json(rng: random.Random, file: Path) -> None:
    """Change a JSON file: a value or a few, or its bytes."""
    if rng.random() < 0.15:
        return change_bytes(rng, file)
    value = json.loads(file.read_text())
    for _ in range(rng.choice([1, 1, 1, 3])):
        value = changed(rng, value)
    file.write_text(json.dumps(value))


def change_bytes(rng: random.Random, file: Path) -> None:
    """Flip, cut, repeat or insert bytes."""
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 2, 8])):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(rng.choice([1, 4, 300]))
            case _:
                data[at:at] = data[: rng.randrange(64)]
    file.write_bytes(data)


def generate(folder: Path, *more: str) -> Case:
    """Return a short run of `generate` on a folder."""
    return "generate", ["--model", str(folder), "-p", "the cat", "-m", "3", *more]


def command_line(rng: random.Random, folder: Path) -> Case:
    """Any options of any command, with any values."""
    from mlx_sink.commands.entry import COMMANDS, command

    name = rng.choice(sorted(set(COMMANDS) - {"doctor"}))
    argv = {"convert": ["--hf-path", str(folder)]}.get(name, ["--model", str(folder)])
    if name == "generate":
        argv += ["-m", "3"]
    options = [a for a in command(name).parser()._actions if a.option_strings and a.dest != "help"]
    risky = {"max_tokens", "upload_repo", "follow", "arm_minutes", "trust_remote_code", "hf_path"}
    for action in rng.sample(options, rng.choice([1, 1, 2, 3])):
        if action.dest in risky:
            continue
        argv.append(rng.choice(action.option_strings))
        if action.nargs != 0 and rng.random() < 0.95:
            choices = [str(c) for c in action.choices or []]
            argv.append(rng.choice(choices if choices and rng.random() < 0.5 else WORDS))
    return name, argv


def config(rng: random.Random, folder: Path) -> Case:
    """A changed config.json."""
    change_json(rng, folder / "config.json")
    return rng.choice([generate(folder), ("plan", ["--model", str(folder)])])


def tokenizer_config(rng: random.Random, folder: Path) -> Case:
    """A changed tokenizer_config.json or tokenizer.json."""
    change_json(rng, folder / rng.choice(["tokenizer_config.json"] * 3 + ["tokenizer.json"]))
    return generate(folder)


def template(rng: random.Random, folder: Path) -> Case:
    """Another chat template, with and without what it may refuse."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = rng.choice(TEMPLATES)
    file.write_text(json.dumps(settings))
    more = rng.choice([[], ["--system-prompt", "be brief"], ["--prefill-response", "Yes"]])
    return generate(folder, *more)


def index(rng: random.Random, folder: Path) -> Case:
    """An index file that tells of other files, or of none."""
    file = folder / "model.safetensors.index.json"
    names = ["model.safetensors", "other.safetensors", "../x.safetensors", "", "model-00001.st"]
    file.write_text(
        json.dumps({"weight_map": {f"w{i}": rng.choice(names) for i in range(3)}, "metadata": {}})
    )
    if rng.random() < 0.5:
        change_json(rng, file)
    if rng.random() < 0.3:
        change_bytes(rng, folder / "model.safetensors")
    return rng.choice([generate(folder), ("convert", ["--hf-path", str(folder)])])


def adapter(rng: random.Random, folder: Path) -> Case:
    """An adapter folder, changed."""
    lora = folder / "lora"
    lora.mkdir()
    keys = {"rank": 2, "scale": 1.0, "dropout": 0.0}
    values = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": keys}
    (lora / "adapter_config.json").write_text(json.dumps(values))
    change_json(rng, lora / "adapter_config.json")
    if rng.random() < 0.7:
        shutil.copy(folder / "model.safetensors", lora / "adapters.safetensors")
    return generate(folder, "--adapter-path", str(lora))


def session(rng: random.Random, folder: Path) -> Case:
    """A session file with other bytes, or made up and signed."""
    from forgery import forged, places

    file = folder / "good.session"

    def change(_: Any, note: Any) -> None:
        place = rng.choice(places(note)[1:])
        for key in place[:-1]:
            note = note[key]
        note[place[-1]] = rng.choice(VALUES)

    if rng.random() < 0.6:
        file.write_bytes(forged(file, change))
    else:
        change_bytes(rng, file)
    return generate(folder, "--session", str(file))


def followed(rng: random.Random, folder: Path) -> Case:
    """A log of any bytes, through a pipe."""
    lines = [rng.choice([b"??", b"a line", rng.randbytes(9), b""]) for _ in range(9)]
    lines[rng.randrange(9)] = rng.choice([b"x" * 5000, b"", rng.randbytes(500)])
    text = rng.choice([b"\n", b"\r\n", b"\r"]).join(lines)
    if rng.random() < 0.3:
        text = text.decode("latin-1").encode(rng.choice(["utf-16", "utf-8-sig", "utf-32"]))
    (folder / "log").write_bytes(text)
    argv = ["--model", str(folder), "--follow", "-", "--marker", "??", "-m", "2", "-p", "why"]
    return "generate", argv


KINDS: list[Callable[[random.Random, Path], Case]] = [
    *(command_line, config, tokenizer_config, template, index, adapter, session, followed),
]


def run(name: str, argv: list[str], folder: Path) -> tuple[int | None, str]:
    """Run a command in this process; return its status and what it said on stderr."""
    from mlx_sink.commands import entry

    err, before = io.StringIO(), os.getcwd()
    keep = os.dup(0)
    log = folder / "log"
    source = os.open(log if log.exists() else os.devnull, os.O_RDONLY)
    os.dup2(source, 0)
    os.chdir(folder)
    sys.stdin = os.fdopen(os.dup(0), encoding="utf-8")
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            entry.run(name, argv)
    except SystemExit as left:
        return (left.code if isinstance(left.code, int) else 0 if left.code is None else 1), (
            err.getvalue()
        )
    finally:
        os.chdir(before)
        os.dup2(keep, 0)
        os.close(keep)
        os.close(source)
    return None, err.getvalue()


def work(pipe: Connection, good: str) -> None:
    """Do the cases whose seeds come through a pipe."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    while (seed := pipe.recv()) is not None:
        rng = random.Random(seed)
        folder = Path(tempfile.mkdtemp())
        try:
            shutil.copytree(good, folder, dirs_exist_ok=True)
            kind = KINDS[seed % len(KINDS)]
            name, argv = kind(rng, folder)
            pipe.send(("begin", kind.__name__, name, argv))
            status, said = run(name, argv, folder)
            lines = [line for line in said.splitlines() if ": error: " in line]
            wrong = []
            if status not in ALLOWED:
                wrong.append(f"status {status}")
            if "Traceback" in said:
                wrong.append("a traceback")
            if status == 2 and len(lines) != 1:
                wrong.append(f"{len(lines)} lines that say what is wrong")
            if left := [str(p.name) for p in folder.rglob("*.tmp")]:
                wrong.append(f"left behind: {left}")
            pipe.send(("end", status, "; ".join(wrong), said[-600:]))
        except BaseException as error:
            pipe.send(("end", None, repr(error)[:200], traceback.format_exc()[-1500:]))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run the cases; 1 if one of them was a finding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000, help="inputs (3000)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first (0)")
    args = parser.parse_args()
    context = mp.get_context("spawn")
    statuses: Counter[str] = Counter()
    findings = 0
    with tempfile.TemporaryDirectory() as place:
        good = make_folder(Path(place) / "good", chat=True)
        run("generate", [*generate(good)[1], "--session", str(good / "good.session")], good)
        worker, pipe = start(context, str(good))
        for seed in range(args.first, args.first + args.cases):
            pipe.send(seed)
            ends, label, result = time.monotonic() + STARTING, "", None
            while result is None:
                if not pipe.poll(max(0.0, ends - time.monotonic())):
                    worker.kill()
                    worker.join()
                    result = (None, f"hangs for {SECONDS} s", "")
                    break
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.join()
                    result = (None, f"crashes ({worker.exitcode})", "")
                    break
                if message[0] == "begin":
                    label = f"{message[1]}: {message[2]} {message[3]}"
                    ends = time.monotonic() + SECONDS
                else:
                    result = message[1:]
            status, wrong, said = result
            statuses[f"{KINDS[seed % len(KINDS)].__name__} {status}"] += 1
            if wrong:
                findings += 1
                print(f"seed {seed}: {wrong}\n  {label!a}\n  {said!a}", flush=True)
            if not worker.is_alive():
                worker, pipe = start(context, str(good))
        pipe.send(None)
        worker.join(5)
    for key, count in sorted(statuses.items()):
        print(f"{count:6} {key}")
    print(f"{args.cases} cases, {findings} findings")
    return 1 if findings else 0


def start(context: Any, good: str) -> tuple[Any, Connection]:
    """Start a child that does cases."""
    ours, theirs = context.Pipe()
    worker = context.Process(target=work, args=(theirs, good), daemon=True)
    worker.start()
    theirs.close()
    return worker, ours


assert _checkout.ROOT
if __name__ == "__main__":
    sys.exit(main())
