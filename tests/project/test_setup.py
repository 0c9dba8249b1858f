"""The set-up scripts say in one line what a machine lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from checkout import ROOT

SHELL = ("bash", "basename", "cat", "chmod", "cksum", "dirname", "grep", "mkdir", "uname")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that has no environment yet."""
    shutil.copytree(ROOT / "scripts", tmp_path / "repo" / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "repo")
    return tmp_path / "repo"


def run(
    checkout: Path, script: str, python: str | None, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run a script where there is little but a shell, and ``python`` as python3."""
    programs = checkout.parent / "bin"
    programs.mkdir()
    for name in SHELL:
        os.symlink(shutil.which(name) or name, programs / name)
    if python is not None:
        (programs / "python3").write_text(f"#!/bin/sh\n{python}\n")
        (programs / "python3").chmod(0o755)
    environment = {"PATH": str(programs)}
    command = [str(checkout / "scripts" / script), *arguments]
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run([bash, *command], env=environment, capture_output=True, text=True)


OLD = 'case "$*" in *platform*) echo 3.9.2;; *) exit 1;; esac'
NO_VENV = 'case "$*" in *venv*) echo "a traceback" >&2; exit 1;; *) exit 0;; esac'
NO_PIP = """case "$*" in *"-m venv"*)
    mkdir -p .venv/bin; echo 'exit 1' >.venv/bin/python; chmod +x .venv/bin/python;;
esac"""


@pytest.mark.parametrize("script", ["demo", "test"])
@pytest.mark.parametrize(
    ("python", "words"),
    [
        (None, ["needs Python 3.11", "found none"]),
        (OLD, ["needs Python 3.11", "python3 (3.9.2)"]),
        (NO_VENV, ["venv", "apt-get install python3-venv"]),
        (NO_PIP, ["without pip"]),
    ],
    ids=["no python", "old python", "no venv", "no pip"],
)
def test_what_is_missing(script: str, python: str | None, words: list[str], checkout: Path):
    done = run(checkout, script, python)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("installing")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


CHECKS = ["ruff check .", "ruff format --check .", "pyright"]
LOG = '#!/bin/sh\necho "${0##*/} $*" >>"${0%/*}/log"\n'
NO_TORCH = 'case "$*" in *"import torch"*) exit 1;; esac\n'


def commands(checkout: Path, *arguments: str, torch: bool = True) -> list[str]:
    """Run ``scripts/test`` where all is installed, and return what it runs."""
    programs = checkout / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "ruff", "pyright", "lint-imports"):
        (programs / name).write_text(LOG + NO_TORCH * (name == "python" and not torch))
        (programs / name).chmod(0o755)
    stamp = 'echo "$(cksum <pyproject.toml) $PWD" >".venv/installed[dev]"'
    subprocess.run(["bash", "-c", stamp], cwd=checkout, check=True)
    done = run(checkout, "test", None, *arguments)
    assert done.returncode == 0, done.stderr
    return [line.strip() for line in (programs / "log").read_text().splitlines()]


def test_the_default_set(checkout: Path):
    """What pyproject.toml says, and what is asked for."""
    ran = commands(checkout, "-k", "ring")
    assert [c for c in ran if c != "lint-imports"] == [*CHECKS, "python -m pytest -k ring"]


@pytest.mark.parametrize("torch", [True, False])
def test_all(torch: bool, checkout: Path):
    ran = commands(checkout, "--all", "-k", "ring", torch=torch)
    assert ran[-1] == "python -m pytest -m  --hypothesis-profile=ci -k ring"
    assert any("pip install" in c and "torch" in c for c in ran) != torch


@pytest.mark.parametrize("configured", [True, False])
def test_imports_are_linted_where_there_are_rules(configured: bool, checkout: Path):
    text = (checkout / "pyproject.toml").read_text().replace("[tool.importlinter]", "[tool.none]")
    rules = "[tool.importlinter]\n" if configured else ""
    (checkout / "pyproject.toml").write_text(f"{text}\n{rules}")
    assert ("lint-imports" in commands(checkout)) == configured
