"""The CI workflow: GitHub accepts it, and every command in it exists, with every flag and file.

No runner is at hand. What can be known without one is checked here, so that a workflow that
misspells a script does not wait for a push to fail.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT
from documented import NotUnderstoodError, understand

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
TEXT = WORKFLOW.read_text(encoding="utf-8")
SHELL = {"|", "||", "&&", ";", "&"}


def steps(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each step with the name of its job."""
    for name, job in yaml.safe_load(text)["jobs"].items():
        for step in job["steps"]:
            yield name, step


def commands(script: str) -> Iterator[list[str]]:
    """Yield the words of each command of a ``run:``, without assignments and redirections."""
    for line in script.replace("\\\n", " ").splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        tokens = iter([*lexer, ";"])
        for token in tokens:
            if token in SHELL:
                if words:
                    yield words
                words = []
            elif token in (">", ">>"):
                next(tokens)
            elif words or not re.fullmatch(r"\w+=.*", token):
                words.append(token)


def wrong(words: list[str]) -> str:
    """Return what of a command does not exist, or nothing."""
    missing = [word for word in words if "/" in word and not (ROOT / word).exists()]
    if missing:
        return f"there is no {missing[0]}"
    if words[0] == "tee":
        return "" if shutil.which("tee") else "there is no tee"
    try:
        understand(shlex.join(words))
    except NotUnderstoodError as error:
        return str(error)
    return ""


def mistakes(text: str) -> list[str]:
    """Return what is wrong with the commands, actions and files of a workflow."""
    found: list[str] = []
    for _, step in steps(text):
        action = step.get("uses")
        if action is not None and not re.fullmatch(r"actions/[\w-]+@v\d+", action):
            found.append(f"{action} is no action of GitHub's, pinned to a major version")
        if "${{" in step.get("run", ""):
            found.append("an expression in a script may be another's text")
        found += [said for words in commands(step.get("run", "")) if (said := wrong(words))]
    for pattern in re.findall(r"'([^']+\*[^']*)'", "".join(re.findall(r"hashFiles\(.*?\)", text))):
        if not any(map(os.path.isfile, glob.iglob(str(ROOT / pattern), recursive=True))):
            found.append(f"no file is like {pattern}")
    for path in re.findall(r"cache-dependency-path: (\S+)", text):
        if not (ROOT / path).is_file():
            found.append(f"there is no file {path}")
    return found


def schema(path: Path) -> subprocess.CompletedProcess[str]:
    """Check a workflow against GitHub's schema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    return subprocess.run(
        [*command, "vendor.github-workflows", str(path)], capture_output=True, text=True
    )


def test_github_accepts_it(tmp_path: Path):
    checked = schema(WORKFLOW)
    assert checked.returncode == 0, checked.stdout
    broken = tmp_path / "ci.yml"
    broken.write_text(TEXT.replace("runs-on:", "run-on:"))
    assert schema(broken).returncode == 1


def test_every_command_exists():
    assert mistakes(TEXT) == []
    run = [words[0] for _, step in steps(TEXT) for words in commands(step.get("run", ""))]
    assert run == ["scripts/test", "pip", "python", "tee", "python"]


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ("scripts/test --all", "scripts/tests --all", "there is no scripts/tests"),
        ("scripts/test --all", "scripts/setup.sh", "no such program"),
        ("scripts/test --all", "scripts/test --al", "test knows no --al"),
        ("--durations=20", "--duration=20", "test knows no --duration"),
        ("mlx_sink.doctor", "mlx_sink.docter", "no command 'docter'"),
        ("--report doctor", "--raport doctor", "mlx_sink.doctor --json --raport"),
        ("--window 252", "--window=-1", "--window=-1"),
        ("demo/story.txt", "demo/stori.txt", "there is no mlx_sink/models/demo/stori.txt"),
        ("pip install .", "pip instal .", "no such program"),
        ("| tee", "| teee", "no such program"),
        ("checkout@v6", "checkout@main", "is no action of GitHub's"),
        ("uses: actions/cache", "uses: someone/cache", "is no action of GitHub's"),
        ("'metal/**'", "'mettal/**'", "no file is like mettal/**"),
        ("path: pyproject.toml", "path: project.toml", "there is no file project.toml"),
        ("| tee", "${{ github.head_ref }} | tee", "an expression in a script"),
    ],
)
def test_a_mistake_is_noticed(good: str, bad: str, said: str):
    assert good in TEXT
    assert any(said in mistake for mistake in mistakes(TEXT.replace(good, bad)))


def test_it_may_read_and_nothing_else():
    workflow = yaml.safe_load(TEXT)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"] == "${{ github.workflow }}-${{ github.ref }}"
    triggers = workflow[True]  # YAML 1.1 takes `on` for a truth value.
    assert set(triggers) == {"push", "pull_request", "workflow_dispatch"}
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 60
    for _, step in steps(TEXT):
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"] == {"persist-credentials": False}
