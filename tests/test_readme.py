"""What the README tells people to type works, and what it says of the model inside is true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import mlx_sink
from mlx_sink.commands import entry
from mlx_sink.commands.generate.command import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO = ROOT / "mlx_sink" / "models" / "demo"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_examples_run(capsys: pytest.CaptureFixture[str]):
    examples = blocks("python")
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
        assert re.search(r"\d+ tokens seen, \d+ bytes held", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["generate", "convert", "plan", "compare"])
def test_commands_are_understood(name: str):
    """Every flag of every command in the README exists."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    commands = re.findall(rf"python -m mlx_sink\.{name} (.*)", text)
    assert commands
    for command in commands:
        entry.command(name).parser().parse_args(shlex.split(command, comments=True))


def test_scripts_exist_and_are_named():
    for name in re.findall(r"scripts/[\w.]+", README):
        assert (ROOT / name).is_file(), name


def test_the_model_inside_is_small():
    """8 MB at most, all of it: it rides along in every wheel."""
    assert sum(f.stat().st_size for f in DEMO.iterdir()) <= 8e6


def test_the_first_command_needs_nothing(capsys: pytest.CaptureFixture[str]):
    """No model, no prompt, no network: text, and how to go on from there."""
    assert main(["--max-tokens", "40", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.split()) > 10
    assert "--model" in captured.err


def test_the_demo_reads_the_story_past_its_window(capsys: pytest.CaptureFixture[str]):
    story = DEMO / "story.txt"
    argv = ["--prompt-file", str(story), "--window", "124", "--max-tokens", "20", "--ignore-eos"]
    assert main(argv) == 0
    assert "4 sinks + window 124" in capsys.readouterr().err


def test_the_demo_starts_every_text_with_its_sink():
    """It was trained with <s> at the start of every sequence: that token is its sink."""
    _, tokenizer = mlx_sink.load("demo")
    tokens = tokenizer.encode("Once upon a time")
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens[1:]) == "Once upon a time"
