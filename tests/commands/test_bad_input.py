"""Everything a person can get wrong ends in one line on stderr and status 2."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from folder import make_folder

from mlx_sink.commands import entry


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "good")


def run(
    argv: list[str], capsys: pytest.CaptureFixture[str], command: str = "generate"
) -> tuple[int, str, str]:
    """Run the command in this process and return its status, stdout and stderr."""
    with pytest.raises(SystemExit) as left:
        entry.run(command, argv)
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def expect_one_line(result: tuple[int, str, str], *words: str, command: str = "generate") -> None:
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith(f"python -m mlx_sink.{command}: error: ")
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
    "temp nan": (["--temp", "nan"], ["--temp", "at least 0", "got nan", "default"]),
    "temp infinite": (["--temp", "1e999"], ["--temp", "at least 0", "got 1e999"]),
    "seed negative": (["--seed", "-1"], ["--seed", "from 0 to 18446744073709551615", "got -1"]),
    "seed too long": (["--seed", "18446744073709551616"], ["--seed", "got 18446744073709551616"]),
    "penalty infinite": (["--presence-penalty=-inf"], ["--presence-penalty", "got -inf"]),
    "repetition nan": (["--repetition-penalty", "nan"], ["--repetition-penalty", "above 0"]),
    "no number": (["--top-k", ""], ["--top-k", "an integer", "got ''"]),
    "sinks negative": (["--num-sinks", "-1"], ["--num-sinks", "at least 0", "got -1", "default"]),
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
        ["--presence-context-size", "from 1 to"],
    ),
    "penalty context too long": (
        ["--frequency-context-size", "9999999999"],
        ["--frequency-context-size", "from 1 to 2147483647"],
    ),
    "tokens to keep": (
        ["--min-p", "0.1", "--min-tokens-to-keep", "300"],
        ["--min-tokens-to-keep", "vocabulary", "300"],
    ),
    "end that is no token": (["--extra-eos-token", "nonesuch"], ["--extra-eos-token", "nonesuch"]),
    "prompt of bytes": (["-p", "\udcff"], ["--prompt", "UTF-8", "\\udcff"]),
    "stop of bytes": (["--stop", "a", "\udcff"], ["--stop", "UTF-8", "\\udcff"]),
    "bits": (["--kv-bits", "3"], ["--kv-bits", "8, 4", "3"]),
    "bits of values": (["--kv-bits", "8", "--v-bits", "2"], ["--v-bits", "8, 4", "2"]),
    "bits of keys alone": (["--k-bits", "8"], ["k_bits alone", "kv_bits"]),
    "group size": (["--kv-group-size", "16"], ["--kv-group-size", "32, 64, 128", "16"]),
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
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait")))
    expect_one_line(
        run(["--model", str(good), "-p", "-"], capsys), "standard input", "UTF-8", "byte 3"
    )


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
    return _replace(INDEX, index)


def _shards(weight_map: dict[str, str]) -> Callable[[Path], None]:
    """Cut the weights into two files, with an index that says what is given otherwise."""

    def damage(folder: Path) -> None:
        weights = mx.load(str(folder / "model.safetensors"))
        assert isinstance(weights, dict)
        (folder / "model.safetensors").unlink()
        names = sorted(weights)
        files = {name: f"model-{1 + (i % 2)}.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            held = {name: weights[name] for name in names if files[name] == file}
            mx.save_safetensors(str(folder / file), held)
        _index(files | weight_map)(folder)

    return damage


def _both(*damages: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def _copy(name: str, to: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copy(folder / name, folder / to) and None


def _rename(name: str, to: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).rename(folder / to) and None


def _header(**tensors: object) -> Callable[[Path], None]:
    """Write 40 bytes of data under a header of one's own."""
    header = json.dumps(tensors).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(40)
    return _replace("model.safetensors", data)


INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def _tensor(shape: list[object], begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


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
    "more layers": (
        _edit_config(num_hidden_layers=3),
        ["Missing 9 parameters: ", "model.layers.2.input_layernorm.weight, model.layers.2."],
    ),
    "fewer layers": (
        _edit_config(num_hidden_layers=1),
        ["Received 9 parameters not in model: model.layers.1.input_layernorm.weight"],
    ),
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
    "shard missing": (
        _both(_shards({}), _remove("model-2.safetensors")),
        ["lacks model-2.safetensors, which its index names", "Missing", "parameters: model."],
    ),
    "shards missing": (
        _both(_shards({NORM: "model-3.safetensors"}), _remove("model-1.safetensors")),
        ["lacks model-1.safetensors and 1 more"],
    ),
    "shard missing, no index": (
        _both(_shards({}), _remove("model-1.safetensors"), _remove(INDEX)),
        ["Missing", "parameters: "],
    ),
    "a tensor twice": (
        _copy("model.safetensors", "model-old.safetensors"),
        ["tensor", "model-old.safetensors", "model.safetensors", "remove"],
    ),
    "pickled weights": (
        _rename("model.safetensors", "pytorch_model.bin"),
        ["pytorch_model.bin is a pickle", "never read", "save_pretrained"],
    ),
    "weights of another name": (
        _rename("model.safetensors", "consolidated.safetensors"),
        ["no model*.safetensors"],
    ),
    "weights are a folder": (
        lambda folder: (folder / "model-2.safetensors").mkdir(),
        ["model-2.safetensors", "directory"],
    ),
    "weights link nowhere": (
        lambda folder: (folder / "model-2.safetensors").symlink_to("gone"),
        ["model-2.safetensors", "No such file"],
    ),
    "tensors overlap": (_header(a=_tensor([5], 0, 20), b=_tensor([5], 10, 40)), ["'b'", "begin"]),
    "tensors leave a gap": (_header(a=_tensor([5], 0, 20), b=_tensor([4], 24, 40)), ["'b'"]),
    "tensor runs backwards": (_header(a=_tensor([5], 0, -20)), ["'a'", "no sizes"]),
    "tensor of another shape": (_header(a=_tensor([11], 0, 40)), ["'a'", "40 bytes", "shape"]),
    "tensor without a shape": (_header(a=_tensor(["x"], 0, 40)), ["'a'", "no sizes"]),
    "tensor is a number": (_header(a=3), ["not a sound safetensors file"]),
    "bad section": (_edit_config(mlx_sink={"window": 0}), ["mlx_sink section", "window", "got 0"]),
    "section too large": (
        _edit_config(mlx_sink={"num_sinks": 4, "window": 61}),
        ["65", "64 tokens"],
    ),
    "code elsewhere": (
        _edit_config(model_file="../model.py"),
        ["'../model.py' is not in the folder"],
    ),
    "no tokenizer": (_remove("tokenizer.json"), ["cannot load"]),
    "tokenizer cut off": (_truncate("tokenizer.json", 100), ["cannot load"]),
    "refused positions": (
        _edit_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        ["llama is not supported", "not a fixed rotation"],
    ),
    "runs code": (_edit_config(model_file="model.py"), ["trust_remote_code"]),
}


@pytest.mark.parametrize("command", ["generate", "convert"])
@pytest.mark.parametrize("case", FOLDERS)
def test_damaged_folder(
    case: str, command: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    damage, words = FOLDERS[case]
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    damage(folder)
    rest = {"generate": ["-p", "the cat"], "convert": ["--mlx-path", str(tmp_path / "made")]}
    result = run(["--model", str(folder), *rest[command]], capsys, command)
    expect_one_line(result, *words, command=command)
    assert list(tmp_path.iterdir()) == [folder]


CONVERSIONS: dict[str, tuple[list[str], list[str]]] = {
    "no source": (["--hf-path", "./nowhere"], ["'./nowhere' does not exist"]),
    "no such repository": (["--hf-path", "no-such/repository"], ["no-such/repository"]),
    "target is there": (["--mlx-path", "{good}"], ["exists", "--mlx-path"]),
    "target is a file": (["--mlx-path", "{good}/config.json"], ["config.json' exists"]),
    "target is empty": (["--mlx-path", ""], ["exists"]),
    "no folder above": (["--mlx-path", "{out}/a/b"], ["cannot be made", "no folder"]),
    "bits alone": (["--q-bits", "4"], ["q_bits", "without quantize"]),
    "group alone": (["--q-group-size", "32"], ["q_group_size", "without quantize"]),
    "mode alone": (["--q-mode", "mxfp4"], ["q_mode", "without quantize"]),
    "recipe alone": (["--quant-predicate", "mixed_3_6"], ["quant_predicate", "without"]),
    "recipe and mode": (
        ["-q", "--quant-predicate", "mixed_3_6", "--q-mode", "mxfp4"],
        ["quant_predicate", "affine", "mxfp4"],
    ),
    "bits": (["-q", "--q-bits", "7", "--q-group-size", "32"], ["cannot be quantised", "7"]),
    "no bits": (["-q", "--q-bits", "0"], ["--q-bits", "from 1 to 8", "got 0"]),
    "group": (["-q", "--q-group-size", "48"], ["cannot be quantised", "48"]),
    "group of no layer": (["-q", "--q-group-size", "128"], ["--quantize changes nothing"]),
    "unknown mode": (["-q", "--q-mode", "int3"], ["--q-mode", "int3"]),
    "unknown type": (["--dtype", "float8"], ["--dtype", "float8"]),
    "no text": (["--calibrate", "{out}/none.txt"], ["none.txt", "No such file"]),
    "binary text": (["--calibrate", "{good}/model.safetensors"], ["UTF-8"]),
    "short text": (["--calibrate", "{good}/tokenizer_config.json"], ["at least 128 tokens"]),
    "unknown flag": (["--q-bitz", "4"], ["--q-bitz"]),
}


@pytest.mark.parametrize("case", CONVERSIONS)
def test_conversion(case: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What is wrong is said before anything is written, and nothing is left behind."""
    argv, words = CONVERSIONS[case]
    argv = [a.format(good=good, out=tmp_path) for a in argv]
    source = [] if "--hf-path" in argv else ["--hf-path", str(good)]
    target = [] if "--mlx-path" in argv else ["--mlx-path", str(tmp_path / "made")]
    before = sorted(good.parent.iterdir())
    status, out, err = run([*source, *target, *argv], capsys, "convert")
    *progress, line = err.splitlines(keepends=True)
    expect_one_line((status, out, line), *words, command="convert")
    assert all(line.startswith("[INFO]") for line in progress)  # nothing is being written
    assert list(tmp_path.iterdir()) == []
    assert sorted(good.parent.iterdir()) == before


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


PLANS: dict[str, tuple[list[str], list[str]]] = {
    "no such model": (["--model", "./nowhere"], ["'./nowhere'", "config.json"]),
    "no such file": (["--model", "a/config.json"], ["'a/config.json'"]),
    "no length": (["--lengths", "4G"], ["4G", "4K"]),
    "window": (["--window", "509"], ["513", "512 tokens", "at most 508"]),
    "dtype": (["--dtype", "int4"], ["--dtype", "int4"]),
    "plot": (["--plot", "plan.gif"], ["plan.gif", ".png"]),
    "plot nowhere": (["--plot", "nowhere/plan.png"], ["nowhere/plan.png", "No such file"]),
}


def refused(
    name: str, argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Expect one line that says what is wrong with a command."""
    with pytest.raises(SystemExit) as left:
        entry.run(name, argv)
    captured = capsys.readouterr()
    assert left.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith(f"python -m mlx_sink.{name}: error: ")
    for word in words:
        assert word in captured.err


@pytest.mark.parametrize("case", PLANS)
def test_plans(case: str, capsys: pytest.CaptureFixture[str]):
    refused("plan", *PLANS[case], capsys)


COMPARISONS: dict[str, tuple[list[str], list[str]]] = {
    "no text": ([], ["--text", "--from"]),
    "no such text": (["--text", "nowhere.txt"], ["nowhere.txt", "No such file"]),
    "text too short": (["--text", "TEXT", "--lengths", "64", "1M"], ["tokens, fewer than", "1M"]),
    "text is empty": (["--text", "EMPTY"], ["the text has"]),
    "range too far": (["--text", "TEXT", "--lengths", "512K..1M"], ["fewer than", "512K"]),
    "no length": (["--text", "TEXT", "--lengths", "far"], ["far", "4K"]),
    "lengths too close": (["--text", "TEXT", "--lengths", "64", "70"], ["ascend", "70"]),
    "window": (["--text", "TEXT", "--window", "61"], ["65", "64 tokens", "at most 60"]),
    "arm": (["--text", "TEXT", "--arms", "best"], ["--arms", "best"]),
    "samples": (["--text", "TEXT", "--samples", "0"], ["--samples", "at least 1"]),
    "trials": (["--text", "TEXT", "--trials", "-1"], ["--trials"]),
    "no time": (["--text", "TEXT", "--arm-minutes", "0"], ["--arm-minutes"]),
    "no such model": (["--text", "TEXT", "--model", "./nowhere"], ["'./nowhere'"]),
    "refused model": (["--text", "TEXT", "--model", "REFUSED"], ["not supported"]),
    "no results": (["--from", "nowhere.json"], ["nowhere.json", "No such file"]),
    "results of something else": (["--from", "OTHER"], ["holds no results"]),
    "results of another version": (["--from", "NEWER"], ["version 2", "reads 1"]),
    "results cut off": (["--from", "BROKEN"], ["not JSON"]),
    "results that lack something": (["--from", "LACKS"], ["lacks"]),
    "a state of another run": (["--text", "TEXT", "--output", "STATE"], ["STATE", "remove it"]),
}
FILES = {
    "TEXT": "the cat and the dog went to the sea. " * 20,
    "EMPTY": "",
    "OTHER": '{"a": 1}',
    "NEWER": '{"mlx_sink_compare": 2}',
    "BROKEN": '{"mlx_sink_compare": 1',
    "LACKS": '{"mlx_sink_compare": 1}',
    "STATE.state": "not a state",
}


@pytest.mark.parametrize("case", COMPARISONS)
def test_comparisons(
    case: str,
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    shutil.copytree(good, "REFUSED")
    _edit_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0})(Path("REFUSED"))
    argv, words = COMPARISONS[case]
    usual = {"--model": str(good), "--lengths": "64", "--window": "20"}
    more = [word for pair in usual.items() if pair[0] not in argv for word in pair]
    refused("compare", [*more, *argv], words, capsys)
    assert not list(tmp_path.glob("*.html"))
