"""The set-up scripts say in one line what a machine lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from checkout import ROOT

SHELL = ("bash", "basename", "cat", "chmod", "cksum", "dirname", "mkdir")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that has no environment yet."""
    shutil.copytree(ROOT / "scripts", tmp_path / "repo" / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "repo")
    return tmp_path / "repo"


def run(checkout: Path, script: str, python: str | None) -> subprocess.CompletedProcess[str]:
    """Run a script where there is little but a shell, and ``python`` as python3."""
    programs = checkout.parent / "bin"
    programs.mkdir()
    for name in SHELL:
        os.symlink(shutil.which(name) or name, programs / name)
    if python is not None:
        (programs / "python3").write_text(f"#!/bin/sh\n{python}\n")
        (programs / "python3").chmod(0o755)
    environment = {"PATH": str(programs)}
    command = [str(checkout / "scripts" / script)]
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
