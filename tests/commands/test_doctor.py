"""The doctor: what it says with and without Metal, and the report that people send."""

from __future__ import annotations

import json
import platform
import re
from importlib import metadata
from pathlib import Path

import host_metal
import mlx.core as mx
import pytest

import mlx_sink
from mlx_sink.attention.kernels import check_decode, check_prefill, inputs, prefill, source, trust
from mlx_sink.commands.doctor import command, models
from mlx_sink.commands.doctor.command import main
from mlx_sink.commands.doctor.models import SHAPES, AttentionShape, Conditions
from mlx_sink.errors import ConfigError, KernelError, OutputError
from mlx_sink.measure.machine import machine

SMALL = ["--head-dim", "16", "--group", "2", "--window", "20", "--rounds", "1"]


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(trust.FOLDER, str(tmp_path))
    monkeypatch.setattr(mx.fast, "metal_kernel", host_metal.metal_kernel)
    monkeypatch.setattr(source, "backend", lambda: "metal")
    monkeypatch.setattr(source, "device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr("mlx_sink.measure.attention_times.STEPS", 1)
    monkeypatch.setattr("mlx_sink.measure.attention_times.CHUNKS", 1)
    monkeypatch.setattr(check_prefill, "speedup", lambda variant: 1.5)
    check_decode.forget()
    check_prefill.forget()


KEYS = {"machine", "metal", "backend", "ring", "kernels", "prefill", "kept"}
VERDICT = {"kernel", "passed", "max_error", "reason"}
TIMES = {"kernel_us", "ops_us", "sdpa_us"}


def test_without_metal_it_says_so_and_times_the_rest(capsys: pytest.CaptureFixture[str]):
    assert main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == KEYS
    assert found["metal"] is False
    assert found["prefill"] == []
    assert found["machine"]["mlx"] == mx.__version__
    assert [row["passed"] for row in found["kernels"]] == [None]
    for row in found["kernels"]:
        assert row.keys() == VERDICT | TIMES
        assert row["kernel_us"] is None
        assert row["ops_us"] > 0
        assert row["sdpa_us"] > 0
    assert main(SMALL) == 0
    assert "no Metal on this machine" in capsys.readouterr().out


def test_a_checkout_need_not_be_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """It is found on PYTHONPATH, and there is no metadata; then that of nothing else either."""
    hidden = {"mlx-sink"}

    def from_name(name: str) -> metadata.Distribution:
        if name in hidden:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    real = metadata.Distribution.from_name
    monkeypatch.setattr(metadata.Distribution, "from_name", from_name)
    for mlx in (mx.__version__, "not installed"):
        assert main([*SMALL, "--json"]) == 0
        of_doctor = json.loads(capsys.readouterr().out)["machine"]
        for found in (machine().to_dict(), of_doctor):
            assert (found["mlx-sink"], found["mlx"]) == (mlx_sink.__version__, mlx)
        hidden |= {"mlx", "mlx-lm"}


@pytest.mark.usefixtures("metal")
def test_a_right_kernel(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main([*SMALL, "--dtype", "float32", "--queries", "1", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert ["-n1-" in row["kernel"] for row in found["kernels"]] == [True, False]
    for row in found["kernels"]:
        assert row["passed"]
        assert row["max_error"] < 2e-6
        assert row["kernel_us"] > 0
    (row,) = found["prefill"]
    assert row.keys() == VERDICT | {"speedup", "serves"}
    assert row["kernel"] == "prefill-float32-d16-rope16-halves"
    assert row["max_error"] < 2e-6
    assert row["passed"]
    assert row["serves"]
    assert {"gpu", "architecture", "text"} <= set(found["machine"])
    assert found["kept"] == []
    assert not list(tmp_path.iterdir()), "it keeps no verdicts"


@pytest.mark.usefixtures("metal")
def test_what_use_has_found_is_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A kernel that failed in use may be none of the common ones: its report must be there."""
    specs = [
        check_decode.DecodeVariant(mx.float32, 2, 16, 16, 1, 16, False, learned_sinks=learned)
        for learned in (True, False)
    ]
    assert check_decode.verdict_of(specs[1]).passed
    with monkeypatch.context() as patch:
        wrong = trust.Verdict(False, 0.25, "its results are off by 0.25")
        patch.setattr(check_decode, "check", lambda variant: wrong)
        check_decode.verdict_of(specs[0])
        # Of another machine, and unreadable: neither is of this machine.
        patch.setattr(source, "stamp", lambda *names: "another text")
        check_decode.verdict_of(specs[0])
    (tmp_path / "broken.json").write_text("[")
    assert main([*SMALL, "--dtype", "float32", "--queries", "1", "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert all(row.keys() == {"kernel", "passed", "error", "reason", "speedup"} for row in kept)
    assert {row["kernel"]: row["passed"] for row in kept} == {
        specs[0].name: False,
        specs[1].name: True,
    }
    assert main([*SMALL, "--dtype", "float32", "--queries", "1"]) == 0
    out = capsys.readouterr().out
    assert "stored verdicts: 2, 1 of them WRONG" in out
    assert f"{specs[0].name}\n    its results are off by 0.25" in out


@pytest.mark.usefixtures("metal")
def test_quantised_rings(capsys: pytest.CaptureFixture[str]):
    options = ["--kv-bits", "8", "--v-bits", "4", "--kv-group-size", "32", "--json"]
    sizes = ["--head-dim", "16", "32", "--group", "2", "--window", "20", "--rounds", "1"]
    assert main([*sizes, *options, "--dtype", "float32", "--queries", "1"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["kernels"]
    assert row["kernel"] == "decode-float32-d32-gqa2-n1-rope32-halves-k8v4g32"
    assert row["passed"]
    assert row["max_error"] < 2e-6


@pytest.mark.usefixtures("metal")
def test_a_wrong_kernel(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    wrong = trust.Verdict(False, 0.25, "its results are off by 0.25")
    monkeypatch.setattr(check_decode, "check", lambda variant: wrong)
    assert main([*SMALL, "--dtype", "float32", "--queries", "1"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "off by 0.25" in out


@pytest.mark.usefixtures("metal")
def test_prefill_that_is_slow_or_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A slow one is no fault, a wrong one is; both are shown, and neither serves."""
    small = [*SMALL, "--dtype", "float32", "--queries", "1"]
    monkeypatch.setattr(check_prefill, "speedup", lambda variant: 0.7)
    assert main(small) == 0
    assert re.search(
        r"prefill\S+ +right +\S+ +0.70x  the plain operations", capsys.readouterr().out
    )
    wrong = trust.Verdict(False, 0.25, "its results are off by 0.25")
    monkeypatch.setattr(check_prefill, "check", lambda variant: wrong)
    assert main(small) == 1
    assert re.search(r"prefill\S+ +WRONG +2.5e-01 +-  its results", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--head-dim", "40"], "--head-dim: must be a multiple of 16, got 40"),
        (["--head-dim", "0"], "--head-dim: must be an integer of at least 16, got 0"),
        (["--group", "17"], "--group: must be an integer from 1 to 16, got 17"),
        (["--queries", "1", "9"], "--queries: must be an integer from 1 to 8, got 9"),
        (["--window", "0"], "--window: must be an integer of at least 1, got 0"),
        (["--rounds", "few"], "--rounds: must be an integer of at least 1, got few"),
        (["--kv-bits", "5"], "--kv-bits: invalid choice: 5"),
        (["--reports"], "unrecognized arguments: --reports"),
    ],
)
def test_bad_input(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_group_size_that_divides_no_head():
    with pytest.raises(ConfigError, match="--kv-group-size 64 divides none of --head-dim 48 80"):
        main(["--kv-bits", "8", "--head-dim", "48", "80"])


def test_no_gpu_where_the_kernels_are_demanded(monkeypatch: pytest.MonkeyPatch):
    """CI must not pass on a machine whose GPU has gone."""
    monkeypatch.setenv(trust.SWITCH, "on")
    check_decode.forget()
    with pytest.raises(KernelError, match="MLX_SINK_KERNEL is on, but MLX has no Metal"):
        main(SMALL)
    check_decode.forget()


MACHINE = {
    *("chip", "gpu", "gpu_architecture", "memory_bytes", "cpu_cores", "system", "python"),
    *("mlx-sink", "mlx", "mlx-lm", "kernel_text"),
}
"""All that a report says of a machine: nothing of these belongs to a person."""


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small shapes in place of the ten."""
    shapes = AttentionShape("a/one", 4, 2, 16), AttentionShape("a/two", 2, 2, 32, True)
    monkeypatch.setattr(models, "SHAPES", shapes)
    monkeypatch.setattr(models, "WINDOWS", (20, 40))
    monkeypatch.setattr(models, "CPU_CHUNK", 9)
    conditions = Conditions("float32", chunk=9, rounds=1)
    monkeypatch.setattr(Conditions, "of_this_machine", lambda rounds: conditions)


@pytest.mark.usefixtures("small_models")
def test_a_report_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "report.json"
    assert main([*SMALL, "--json", "--report", str(file)]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out).keys() == KEYS
    assert f"wrote {file}" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    report = json.loads(file.read_text())
    assert report["machine"].keys() == MACHINE
    assert report["machine"]["memory_bytes"] > 1e8
    assert report["kernels_can_run"] is False
    assert "cannot run here" in report["note"]
    assert [row["passed"] for row in report["decode"]] == [None]
    assert report["prefill"] == report["stored_verdicts"] == []
    rows = report["models"]["shapes"]
    assert [(row["model"], row["window"]) for row in rows] == [
        *(("a/one", 20), ("a/one", 40), ("a/two", 20), ("a/two", 40))
    ]
    for row in rows:
        for timed in (row["decode"], row["prefill"]):
            assert timed["passed"] is timed["kernel_us"] is None
            assert timed["ops_us"] > 0
            assert timed["sdpa_us"] > 0
    personal = {str(Path.home()), str(tmp_path), str(Path.cwd()), platform.node()} - {"", "/"}
    assert not [name for name in personal if name in file.read_text()]


@pytest.mark.usefixtures("metal", "small_models")
def test_a_report_with_the_kernels(tmp_path: Path):
    """Every shape is checked and timed, decode and prefill, with learned sinks if it has them."""
    file = tmp_path / "report.json"
    assert main([*SMALL, "--dtype", "float32", "--queries", "1", "--report", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["machine"].keys() == MACHINE
    assert report["kernels_can_run"] is True
    assert [row["passed"] for row in report["decode"] + report["prefill"]] == [True, True]
    rows = report["models"]["shapes"]
    assert [row["decode"]["kernel"] for row in rows[::2]] == [
        "decode-float32-d16-gqa2-n1-rope16-halves",
        "decode-float32-d32-gqa1-n1-rope32-halves-learned",
    ]
    for row in rows:
        for timed in (row["decode"], row["prefill"]):
            assert timed["passed"]
            assert timed["max_error"] < 2e-6
            assert timed["kernel_us"] > 0


@pytest.mark.usefixtures("metal", "small_models")
def test_a_wrong_kernel_is_reported_without_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """MLX's messages may name files of the person's; status 1 comes after the report."""
    home = tmp_path / "Users" / "anna"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(platform, "node", lambda: "annas-mac.local")
    said = f"cannot load {home}/lib/mlx.metallib, '/Volumes/Anna S/mlx.metallib': anna, annas-mac"
    verdict = trust.failure(RuntimeError(said))
    monkeypatch.setattr(check_decode, "check", lambda variant: verdict)
    monkeypatch.setattr(check_prefill, "check", lambda variant: verdict)
    file = tmp_path / "report.json"
    assert main([*SMALL, "--dtype", "float32", "--queries", "1", "--report", str(file)]) == 1
    text = file.read_text()
    assert not re.search("anna|volumes", text, re.I)
    report = json.loads(text)
    wrong = [row["prefill"] for row in report["models"]["shapes"]]
    for row in [*report["decode"], *report["prefill"], *wrong]:
        assert row["passed"] is False
        assert "it failed to run (cannot load" in row["reason"]


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ctrl-C while models are timed leaves the file of before."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "time_shapes", interrupted)
    file = tmp_path / "report.json"
    file.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        main([*SMALL, "--report", str(file)])
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("", "--report must be a file, got the folder"), ("no/such", "no' does not exist")],
)
def test_where_no_report_can_go(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is said before any work is done."""
    monkeypatch.setattr(command, "examine", lambda *_: pytest.fail("it has begun to work"))
    with pytest.raises(OutputError, match=said):
        main(["--report", str(tmp_path / name)])


def test_the_shapes_are_those_that_kernels_serve():
    assert len({shape.model for shape in SHAPES}) == len(SHAPES) == 10
    assert len({(s.n_heads, s.n_kv_heads, s.head_dim) for s in SHAPES}) == 10
    for shape in SHAPES:
        assert shape.n_heads % shape.n_kv_heads == 0
        assert shape.n_heads // shape.n_kv_heads <= inputs.MAX_GROUP
        assert prefill.tile_of(shape.head_dim, shape.head_dim, mx.bfloat16) is not None
