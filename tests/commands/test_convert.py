"""Conversion: mlx-lm's own result, in a folder that appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from folder import CHAT_TEMPLATE, make_folder
from mlx_lm.convert import convert as mlx_lm_convert

import mlx_sink
from mlx_sink import OutputError, SinkConfig, UnsupportedModelError
from mlx_sink.commands.convert import progress as writing
from mlx_sink.commands.convert.command import PROG, main
from mlx_sink.commands.convert.convert import Recipe, Text, convert
from mlx_sink.io import atomic
from mlx_sink.models.checkpoints import checkpoint

WORDS = "the cat and the dog went to the sea and the cat sat down. "


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "source", chat=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.iterdir()}


def first_tokens(folder: Path, load: Callable[..., Any], generate: Callable[..., str]) -> str:
    model, tokenizer = load(str(folder))
    return generate(model, tokenizer, "the cat", max_tokens=12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16"},
        {"quantize": True, "q_bits": 4, "q_group_size": 32},
        {"quantize": True, "q_bits": 8, "q_group_size": 32, "dtype": "float16"},
        {"quantize": True, "q_mode": "mxfp4"},
        {"quantize": True, "quant_predicate": "mixed_3_6", "q_group_size": 32},
    ],
    ids=str,
)
def test_the_result_is_that_of_mlx_lm(options: dict[str, Any], source: Path, tmp_path: Path):
    """Byte for byte: same weights, same configuration, same tokenizer."""
    made = convert(source, tmp_path / "ours", recipe=Recipe(**options))
    mlx_lm_convert(str(source), str(tmp_path / "theirs"), **options)
    ours, theirs = files_of(made.path), files_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert ours == theirs
    weights = mx.load(str(made.path / "model.safetensors"))
    assert isinstance(weights, dict)
    assert made.nbytes == sum(w.nbytes for w in weights.values())
    assert made.shards == 1


def test_round_trip_in_plain_mlx_lm(source: Path, tmp_path: Path):
    made = convert(source, tmp_path / "made", calibrate_on=Text(WORDS * 20, "words"))
    assert (made.path / "SINK.md").is_file()
    texts = {
        first_tokens(folder, load, generate)
        for folder in (source, made.path)
        for load, generate in (
            (mlx_lm.load, mlx_lm.generate),
            (mlx_sink.load, mlx_sink.generate),
        )
    }
    assert len(texts) == 1
    assert texts != {""}


def test_the_report_is_that_of_load(source: Path, tmp_path: Path):
    made = convert(source, tmp_path / "made", calibrate_on=Text(WORDS * 20, "words"))
    _, _, report = mlx_sink.load(made.path, return_report=True)
    assert made.report == report
    assert made.calibration is not None
    settings = made.calibration.settings
    assert report.config == SinkConfig(settings.num_sinks, settings.window)


def test_a_quantised_source(source: Path, tmp_path: Path):
    """A folder of mlx-lm's is a checkpoint like any other; quantising it again is refused."""
    recipe = Recipe(quantize=True, q_bits=4, q_group_size=32)
    first = convert(source, tmp_path / "first", recipe=recipe)
    second = convert(first.path, tmp_path / "second")
    assert files_of(second.path) == files_of(first.path)
    with pytest.raises(mlx_sink.ConfigError, match="--quantize changes nothing"):
        convert(first.path, tmp_path / "third", recipe=recipe)


def test_a_section_is_kept(tmp_path: Path):
    """Converting once more, to other types say, keeps what was measured."""
    section = {"num_sinks": 1, "window": 23}
    source = make_folder(tmp_path / "source", mlx_sink=section)
    made = convert(source, tmp_path / "made", recipe=Recipe(dtype="float16"))
    assert json.loads((made.path / "config.json").read_text())["mlx_sink"] == section
    assert made.report.config == SinkConfig(1, 23)


def test_chat_templates_go_along(source: Path, tmp_path: Path):
    made = convert(source, tmp_path / "made")
    _, before = mlx_lm.load(str(source))
    _, after = mlx_lm.load(str(made.path))
    assert after.chat_template == before.chat_template == CHAT_TEMPLATE
    messages = [{"role": "user", "content": "the cat"}]
    assert after.apply_chat_template(messages) == before.apply_chat_template(messages)


def test_sentencepiece_goes_along(tmp_path: Path):
    """A tokenizer.model and no tokenizer.json, as older Llamas have it."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    source = make_folder(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    (tmp_path / "text.txt").write_text((WORDS + "Once upon a time.\n") * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(source / "tokenizer"),
        vocab_size=40,
        model_type="bpe",
        minloglevel=2,
    )
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    made = convert(source, tmp_path / "made")
    _, before = mlx_lm.load(str(source))
    _, after = mlx_lm.load(str(made.path))
    text = "the cat went down to the sea"
    ids = before.encode(text)
    assert len(ids) > 8
    assert after.encode(text) == ids
    assert after.decode(ids) == before.decode(ids)


def into_shards(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int = 8000) -> None:
    """Let mlx-lm write small shards, and write the folder's weights anew with it."""
    from mlx_lm import utils

    def make_shards(weights: dict[str, mx.array], **_: Any) -> list[dict[str, mx.array]]:
        shards: list[dict[str, mx.array]] = [{}]
        for name, weight in weights.items():
            if shards[-1] and sum(w.nbytes for w in shards[-1].values()) + weight.nbytes > size:
                shards.append({})
            shards[-1][name] = weight
        return shards

    monkeypatch.setattr(utils, "make_shards", make_shards)
    model, _ = mlx_lm.load(str(folder))
    (folder / "model.safetensors").unlink()
    utils.save_model(folder, model)


def test_shards_in_and_out(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    sharded = tmp_path / "sharded"
    shutil.copytree(source, sharded)
    into_shards(sharded, monkeypatch)
    assert len(checkpoint.check(sharded).shards) > 4
    # Slow enough for the watcher to see each of them.
    monkeypatch.setattr(writing, "INTERVAL", 0.001)
    made = convert(sharded, tmp_path / "made")
    assert made.shards == len(list(made.path.glob("model-*-of-*.safetensors"))) > 4
    assert "writing" in capsys.readouterr().err
    assert first_tokens(made.path, mlx_lm.load, mlx_lm.generate) == first_tokens(
        source, mlx_lm.load, mlx_lm.generate
    )


def test_progress_names_the_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    looked = threading.Event()

    def wait_for(what: str) -> None:
        for _ in range(200):
            if what in seen():
                return
            looked.wait(0.05)
        raise AssertionError(seen())

    written = [""]

    def seen() -> str:
        written[0] += capsys.readouterr().err
        return written[0]

    with writing.progress(tmp_path, 2000, 2):
        (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(1000))
        wait_for("shard 1 of 2")
        (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(1000))
        wait_for("shard 2 of 2")


def test_an_unsupported_model_is_refused_before_anything_is_written(source: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="not a fixed rotation"):
        convert(folder, tmp_path / "made")
    assert list(tmp_path.iterdir()) == [folder]


def test_no_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The estimate is that of what is written, so a few bytes decide."""
    made = convert(source, tmp_path / "made")
    room = sum(f.stat().st_size for f in source.iterdir() if f.suffix != ".safetensors")

    usage = shutil.disk_usage
    free = made.nbytes + room
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free))
    convert(source, tmp_path / "fits")
    free -= 1
    with pytest.raises(OutputError, match=r"needs .* kB, and its disk has .* kB free"):
        convert(source, tmp_path / "not")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fits", "made"]


def run(*argv: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with files of at most so many bytes."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "mlx_sink.convert", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=restrict)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes as on Linux")
def test_a_disk_that_fills_up(source: Path, tmp_path: Path):
    """The room was there when it was checked; then a write fails."""
    done = run("--hf-path", source, "--mlx-path", tmp_path / "made", limit=20_000)
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith(f"{PROG}: error: cannot write ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command(source: Path, tmp_path: Path):
    """JSON on stdout, everything else on stderr, and the text is a file."""
    (tmp_path / "text.txt").write_text(WORDS * 20)
    options = ["-q", "--q-bits", "4", "--q-group-size", "32", "--json"]
    target = tmp_path / "made"
    done = run(
        *("--hf-path", source, "--mlx-path", target, "--calibrate", tmp_path / "text.txt"),
        *options,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["path"] == str(target)
    assert result["report"]["sources"] == {"num_sinks": "config.json", "window": "config.json"}
    assert result["calibration"]["recommended"]["window"] == result["report"]["config"]["window"]
    assert "bits per weight" in done.stderr
    assert "of weights to" in done.stderr
    assert "text.txt" in (target / "SINK.md").read_text()
    assert str(tmp_path) not in (target / "SINK.md").read_text()


def test_the_sample_text_is_the_default(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    module = sys.modules["mlx_sink.commands.convert.command"]
    monkeypatch.setattr(module, "sample_text", lambda: WORDS * 20)
    argv = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "made"), "--calibrate"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "settings: num_sinks" in out
    assert "Recommended: num_sinks" in out
    assert "story that comes with mlx_sink" in (tmp_path / "made" / "SINK.md").read_text()


@pytest.mark.parametrize("fails", [False, True])
def test_upload_is_handed_through(
    fails: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlx_lm import utils

    uploads: list[tuple[str, str]] = []

    def upload(path: str, repo: str) -> None:
        assert Path(path, "model.safetensors").is_file()
        uploads.append((path, repo))
        if fails:
            raise ConnectionError("no network")

    monkeypatch.setattr(utils, "upload_to_hub", upload)
    target = tmp_path / "made"
    argv = ["--hf-path", str(source), "--mlx-path", str(target), "--upload-repo", "me/it"]
    if fails:
        with pytest.raises(OutputError, match="is complete, but was not uploaded to 'me/it'"):
            main(argv)
    else:
        assert main(argv) == 0
    assert uploads == [(str(target), "me/it")]
    assert target.is_dir()


def test_trust_is_off_unless_asked_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[bool, Any]] = []

    def load(path: str, **options: Any) -> Any:
        seen.append((options["trust_remote_code"], options["tokenizer_config"]))
        return real(path, **options)

    real = mlx_lm.load
    monkeypatch.setattr(mlx_lm, "load", load)
    for flags in ([], ["--trust-remote-code"]):
        target = tmp_path / str(len(flags))
        assert main(["--hf-path", str(source), "--mlx-path", str(target), *flags]) == 0
    assert seen == [
        (False, {"trust_remote_code": False}),
        (True, {"trust_remote_code": True}),
    ]


def test_ctrl_c_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mlx_lm import utils

    def interrupted(path: Path, *_: Any, **__: Any) -> None:
        (path / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_checked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A writer that loses bytes without an error is found out before the folder appears."""
    from mlx_lm import utils

    real = utils.save

    def short(path: Path, *args: Any) -> None:
        real(path, *args)
        os.truncate(path / "model.safetensors", 3000)

    monkeypatch.setattr(utils, "save", short)
    with pytest.raises(mlx_sink.ModelError, match=r"model\.safetensors"):
        convert(source, tmp_path / "made")
    assert list(tmp_path.iterdir()) == []


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead_are_removed(source: Path, tmp_path: Path):
    dead, alive = tmp_path / f".made.{dead_process()}.tmp", tmp_path / ".made.1.tmp"
    other = tmp_path / f".else.{dead_process()}.tmp"
    for folder in (dead, alive, other):
        (folder / "inside").mkdir(parents=True)
    convert(source, tmp_path / "made")
    assert not dead.exists()
    assert alive.is_dir()  # of a process that may still be at work
    assert other.is_dir()  # of a target that is not ours


def test_a_name_taken_meanwhile_is_not_overwritten(tmp_path: Path):
    target = tmp_path / "made"

    def write() -> None:
        with atomic.whole_folder(target) as folder:
            (folder / "a").write_text("new")
            target.mkdir()
            (target / "b").write_text("old")

    with pytest.raises(OSError, match="not empty"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
    assert (target / "b").read_text() == "old"


def test_killed_at_any_moment(capsys: pytest.CaptureFixture[str]):
    """A few of the kills of the script, which is run by hand for many."""
    import kill_conversions

    assert kill_conversions.main(["--kills", "3", "--megabytes", "1"]) == 0
    assert "3 kills" in capsys.readouterr().out


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    options = """
    hf-path mlx-path quantize q-bits q-group-size q-mode dtype quant-predicate upload-repo
    revision calibrate trust-remote-code json
    """
    for flag in re.findall(r"\S+", options):
        assert f"--{flag}" in out
