"""Compiled kernels are kept in the checkout, whole, under a name that says all they depend on."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import mlx.core as mx
import pytest
from checkout import ROOT
from host_metal import ToolError, build
from host_metal.examples import SOURCE, rms_norm_kernel, run_rms_norm

X = mx.ones((2, 256))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, but for the runtime."""
    shared = build._runtime()
    monkeypatch.setenv("HOST_METAL_CACHE", str(tmp_path))
    os.link(shared, tmp_path / shared.name)
    return tmp_path


def run(source: str = SOURCE) -> None:
    run_rms_norm(rms_norm_kernel(source), X, X[0])


def kernels(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("kernel-")}


def test_in_the_checkout_and_not_in_git(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HOST_METAL_CACHE", raising=False)
    assert build.cache_folder() == ROOT / ".cache" / "host_metal"
    assert ".cache/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_second_run_compiles_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    run()
    (name,) = kernels(folder)
    monkeypatch.setattr(build, "_compile", None)
    run()
    assert kernels(folder) == {name}


@pytest.mark.parametrize("what", ["unit", "headers", "flags", "compiler"])
def test_what_it_depends_on_is_in_its_name(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def compiled(command: list[str], input_: str = "") -> str:
        Path(command[command.index("-o") + 1]).touch()
        return ""

    monkeypatch.setenv("HOST_METAL_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_compile", compiled)
    before = build.build_runner("a unit")
    assert build.build_runner("a unit") == before
    match what:
        case "headers":
            monkeypatch.setattr(build, "_headers_stamp", lambda: "others")
        case "flags":
            monkeypatch.setattr(build, "_KERNEL_FLAGS", [*build._KERNEL_FLAGS, "-DANOTHER"])
        case "compiler":
            monkeypatch.setattr(build, "_version", lambda _: "g++ 99.0.0")
    assert build.build_runner("another" if what == "unit" else "a unit") != before


UNITS = [f'extern "C" void hm_kernel(void* const*, const void*) {{}} // {i}' for i in range(4)]


def _build(start: multiprocessing.Barrier) -> None:
    start.wait()
    for unit in UNITS:
        build.build_runner(unit)


def test_processes_that_build_the_same_kernels_at_once(folder: Path):
    """None is in another's way, and nothing but one program of each is left."""
    spawn = multiprocessing.get_context("spawn")
    start = spawn.Barrier(3)
    processes = [spawn.Process(target=_build, args=(start,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 3
    assert len(kernels(folder)) == len(UNITS)
    assert len(list(folder.iterdir())) == len(UNITS) + 1


def test_what_is_half_written_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A linker that is stopped, or finds the disk full, has begun its file."""
    plain = build._compile

    def stopped(command: list[str], input_: str = "") -> str:
        said = plain(command, input_)
        return "no space left on device" if "-no-pie" in command else said

    with monkeypatch.context() as patch:
        patch.setattr(build, "_compile", stopped)
        with pytest.raises(ToolError, match="no space left"):
            run()
    assert kernels(folder) == set()
    run()
