"""Everything a person can get wrong ends in one line on stderr and status 2."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from folder import make_folder

from mlx_sink import cli


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "good")


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command in this process and return its status, stdout and stderr."""
    from mlx_sink.generate import PROG, main

    with pytest.raises(SystemExit) as left:
        cli.run(lambda: main(argv), PROG)
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def expect_one_line(result: tuple[int, str, str], *words: str) -> None:
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("python -m mlx_sink.generate: error: ")
    for word in words:
        assert word in err


def test_good_folder_works(good: Path, capsys: pytest.CaptureFixture[str]):
    """Without this the table below could pass because nothing ever works."""
    status, out, err = run(
        ["--model", str(good), "-p", "the cat", "-m", "8", "--ignore-eos", "--json"], capsys
    )
    assert status == 0
    assert out
    assert json.loads(err.splitlines()[-1])["generation_tokens"] == 8


SETTINGS = {
    "window 0": (["--window", "0"], ["window", "at least 1", "got 0"]),
    "window negative": (["--window", "-5"], ["window", "-5"]),
    "window no number": (["--window", "many"], ["--window", "many"]),
    "sinks negative": (["--num-sinks", "-1"], ["num_sinks", "at least 0", "-1"]),
    "beyond the context": (["--window", "61"], ["65", "64 tokens", "at most 60"]),
    "sinks beyond the context": (["--num-sinks", "64"], ["65", "64"]),
    "empty prompt": (["--prompt", ""], ["prompt is empty"]),
    "blank prompt": (["--prompt", " \n"], ["prompt is empty"]),
    "no such prompt file": (["--prompt-file", "nowhere.txt"], ["nowhere.txt", "No such file"]),
    "prompt file is a folder": (["--prompt-file", "."], ["'.'", "directory"]),
    "two prompts": (["-p", "a", "--prompt-file", "b"], ["--prompt-file", "not allowed with"]),
    "unknown flag": (["--windw", "3"], ["unrecognized", "--windw"]),
    "no tokens": (["-m", "0"], ["--max-tokens", "got 0"]),
    "minus two tokens": (["-m", "-2"], ["--max-tokens", "-2"]),
    "no step": (["--prefill-step-size", "0"], ["--prefill-step-size", "got 0"]),
    "temperature": (["--temp", "-1"], ["--temp", "-1"]),
    "top-p": (["--top-p", "1.5"], ["--top-p", "1.5"]),
    "min-p": (["--min-p", "-0.1"], ["--min-p", "-0.1"]),
    "xtc": (["--xtc-threshold", "0.6"], ["--xtc-threshold", "0.5", "0.6"]),
    "top-k": (["--top-k", "-1"], ["--top-k", "-1"]),
    "top-k of all": (["--temp", "1", "--top-k", "300"], ["--top-k", "vocabulary", "300"]),
    "penalty": (["--repetition-penalty", "0"], ["--repetition-penalty", "got 0"]),
    "penalty context": (
        ["--presence-context-size", "0"],
        ["--presence-context-size", "at least 1"],
    ),
    "bits": (["--kv-bits", "3"], ["kv_bits", "8 or 4", "got 3"]),
    "bits of values": (["--kv-bits", "8", "--v-bits", "2"], ["v_bits", "8 or 4", "got 2"]),
    "bits of keys alone": (["--k-bits", "8"], ["k_bits alone", "kv_bits"]),
    "group size": (["--kv-group-size", "16"], ["kv_group_size", "32, 64 or 128", "got 16"]),
    "head_dim": (["--kv-bits", "8"], ["kv_group_size 64", "head_dim of 8", "leave kv_bits out"]),
    "drafts of nothing": (["--num-draft-tokens", "2"], ["--num-draft-tokens", "--draft-model"]),
    "no drafts": (
        ["--draft-model", "demo", "--num-draft-tokens", "0"],
        ["--num-draft-tokens", "got 0"],
    ),
    "draft of another family": (["--draft-model", "demo"], ["tokenizer does not match"]),
    "no draft model": (["--draft-model", "./nowhere"], ["'./nowhere' does not exist"]),
    "pin nothing": (["--pin-system-prompt"], ["--pin-system-prompt", "--system-prompt"]),
    "session is a folder": (["--session", "."], ["session '.'", "directory"]),
    "session nowhere": (["--session", "no/where"], ["cannot save", "no/where", "No such file"]),
    "save never": (["--save-every", "0"], ["--save-every", "got 0"]),
    "marker alone": (["--marker", "@@"], ["--marker needs --follow"]),
    "follow without marker": (["--follow", "-"], ["--follow needs --marker"]),
    "blank marker": (["--follow", "-", "--marker", " "], ["--marker", "not blank", "' '"]),
    "follow nothing": (["--follow", "no.log", "--marker", "@"], ["no.log", "No such file"]),
    "follow a folder": (["--follow", ".", "--marker", "@"], ["'.'", "a folder"]),
    "follow and a prompt file": (
        ["--follow", "-", "--marker", "@", "--prompt-file", "x"],
        ["--follow", "--prompt TEXT"],
    ),
    "endless answers": (
        ["--follow", "-", "--marker", "@", "-m", "-1", "--ignore-eos"],
        ["--follow", "must end"],
    ),
    "memory no number": (["--memory", "much"], ["--memory", "2GB", "'much'"]),
    "memory nothing": (["--memory", "0GB"], ["--memory", "'0GB'"]),
    "memory too small": (
        ["--memory", "100kB"],
        ["--memory 100.00 kB", "does not hold this model", "a window of 1 (weights"],
    ),
    "memory for a window": (
        ["--memory", "1MB", "--window", "50"],
        ["--memory 1.00 MB", "not enough for a window of 50"],
    ),
    "template variables": (["--chat-template-config", "{"], ["--chat-template-config", "JSON"]),
    "template list": (["--chat-template-config", "[1]"], ["--chat-template-config", "object"]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str, good: Path, capsys: pytest.CaptureFixture[str]):
    argv, words = SETTINGS[case]
    prompt = [] if any("prompt" in a or a == "-p" for a in argv) else ["-p", "the cat"]
    if case == "pin nothing":
        prompt = ["-p", "the cat"]
    expect_one_line(run(["--model", str(good), *prompt, *argv], capsys), *words)


def test_prompt_file_not_utf8(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "latin1.txt"
    file.write_bytes("abc café".encode("latin-1"))
    result = run(["--model", str(good), "--prompt-file", str(file)], capsys)
    expect_one_line(result, "latin1.txt", "UTF-8", "byte 7")


def test_stdin_not_utf8(
    good: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    expect_one_line(run(["--model", str(good), "-p", "-"], capsys), "standard input", "UTF-8")


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def _truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _replace(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _index(weight_map: object) -> Callable[[Path], None]:
    index = json.dumps({"weight_map": weight_map}).encode()
    return _replace("model.safetensors.index.json", index)


HUGE_HEADER = (1 << 62).to_bytes(8, "little") + b"{}"
LONG_CLAIM = b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'

FOLDERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no config": (_remove("config.json"), ["no config.json"]),
    "config cut off": (_truncate("config.json", 40), ["config.json", "JSON"]),
    "config is a list": (_replace("config.json", b"[]"), ["config.json", "object"]),
    "config not UTF-8": (_replace("config.json", b"\xff{}"), ["config.json", "Unicode"]),
    "no model type": (_edit_config(model_type=None), ["model_type"]),
    "unknown model type": (_edit_config(model_type="nonesuch"), ["nonesuch", "not supported"]),
    "key missing": (_replace("config.json", b'{"model_type": "llama"}'), ["hidden_size"]),
    "wrong size": (_edit_config(hidden_size=64), ["cannot load"]),
    "more layers": (_edit_config(num_hidden_layers=3), ["Missing"]),
    "no weights": (_remove("model.safetensors"), ["no model*.safetensors"]),
    "weights cut off": (_truncate("model.safetensors", 5000), ["model.safetensors", "damaged"]),
    "weights empty": (_truncate("model.safetensors", 0), ["model.safetensors", "cut off"]),
    "header cut off": (_truncate("model.safetensors", 30), ["model.safetensors", "cut off"]),
    "weights are text": (_replace("model.safetensors", b"hello world!"), ["model.safetensors"]),
    "header too long": (_replace("model.safetensors", HUGE_HEADER), ["cut off"]),
    "claims too much": (
        _replace("model.safetensors", len(LONG_CLAIM).to_bytes(8, "little") + LONG_CLAIM),
        ["damaged"],
    ),
    "shard missing": (_index({"a": "model-00002.safetensors"}), ["lacks model-00002"]),
    "index broken": (_index([]), ["weight_map"]),
    "no tokenizer": (_remove("tokenizer.json"), ["cannot load"]),
    "tokenizer cut off": (_truncate("tokenizer.json", 100), ["cannot load"]),
    "refused positions": (
        _edit_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        ["llama is not supported", "not a fixed rotation"],
    ),
    "runs code": (_edit_config(model_file="model.py"), ["trust_remote_code"]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_damaged_folder(case: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damage, words = FOLDERS[case]
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    damage(folder)
    expect_one_line(run(["--model", str(folder), "-p", "the cat"], capsys), *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", ["'./nowhere' does not exist"]),
        ("a/b/c", ["'a/b/c' does not exist"]),
        ("", ["does not exist"]),
        ("no-such/repository", ["no-such/repository"]),
    ],
)
def test_no_such_model(name: str, words: list[str], capsys: pytest.CaptureFixture[str]):
    expect_one_line(run(["--model", name, "-p", "the cat"], capsys), *words)


def test_model_is_a_file(good: Path, capsys: pytest.CaptureFixture[str]):
    result = run(["--model", str(good / "config.json"), "-p", "the cat"], capsys)
    expect_one_line(result, "is a file")


def test_model_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "notes.txt").write_text("no model here")
    expect_one_line(run(["--model", str(tmp_path), "-p", "x"], capsys), "no config.json")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_unwritable_output(good: Path):
    """The disk is full: one line, not a traceback when Python flushes at exit."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "mlx_sink.generate", "--model", str(good), "-p", "x"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot write the output" in done.stderr
