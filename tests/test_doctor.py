"""The doctor: what it says with and without Metal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import host_metal
import mlx.core as mx
import pytest

from mlx_sink.commands.doctor.command import main
from mlx_sink.errors import ConfigError
from mlx_sink.kernels import check_decode, check_prefill, source, trust

SMALL = ["--head-dim", "16", "--group", "2", "--window", "20", "--rounds", "1"]


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(trust.FOLDER, str(tmp_path))
    monkeypatch.setattr(mx.fast, "metal_kernel", host_metal.metal_kernel)
    monkeypatch.setattr(source, "backend", lambda: "metal")
    monkeypatch.setattr(source, "device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr("mlx_sink.commands.doctor.command.STEPS", 1)
    monkeypatch.setattr(check_prefill, "speedup", lambda spec: 1.5)
    check_decode.forget()


def test_without_metal_it_says_so_and_times_the_rest(capsys: pytest.CaptureFixture[str]):
    assert main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metal"] is False
    assert found["prefill"] == []
    assert found["machine"]["mlx"] == mx.__version__
    assert [row["passed"] for row in found["kernels"]] == [None]
    for row in found["kernels"]:
        assert row["kernel_us"] is None
        assert row["ops_us"] > 0
        assert row["sdpa_us"] > 0
    assert main(SMALL) == 0
    assert "no Metal on this machine" in capsys.readouterr().out


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
        patch.setattr(check_decode, "check", lambda spec: wrong)
        check_decode.verdict_of(specs[0])
        # Of another machine, and unreadable: neither is of this machine.
        patch.setattr(source, "stamp", lambda *names: "another text")
        check_decode.verdict_of(specs[0])
    (tmp_path / "broken.json").write_text("[")
    assert main([*SMALL, "--dtype", "float32", "--queries", "1", "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert {row["kernel"]: row["passed"] for row in kept} == {
        specs[0].name: False,
        specs[1].name: True,
    }
    assert main([*SMALL, "--dtype", "float32", "--queries", "1"]) == 0
    out = capsys.readouterr().out
    assert "verdicts kept from use: 2, 1 of them WRONG" in out
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
    monkeypatch.setattr(check_decode, "check", lambda spec: wrong)
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
    monkeypatch.setattr(check_prefill, "speedup", lambda spec: 0.7)
    assert main(small) == 0
    assert re.search(
        r"prefill\S+ +right +\S+ +0.70x  the plain operations", capsys.readouterr().out
    )
    wrong = trust.Verdict(False, 0.25, "its results are off by 0.25")
    monkeypatch.setattr(check_prefill, "check", lambda spec: wrong)
    assert main(small) == 1
    assert re.search(r"prefill\S+ +WRONG +2.5e-01 +-  its results", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--head-dim", "40"], "--head-dim must be multiples of 16"),
        (["--group", "17"], "--group must be at most 16, got 17"),
        (["--queries", "1", "9"], "--queries must be at most 8, got 9"),
        (["--window", "0"], "window must be at least 1"),
        (["--kv-bits", "8", "--head-dim", "48", "80"], "--kv-group-size 64 divides none of"),
        (["--kv-bits", "5"], "kv_bits must be 8 or 4, got 5"),
    ],
)
def test_bad_input(arguments: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        main(arguments)
