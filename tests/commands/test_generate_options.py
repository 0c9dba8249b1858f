"""What `generate` makes of its command line before a model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mlx_sink.commands.generate.command import main
from mlx_sink.commands.generate.options import parse
from mlx_sink.io import terminal

WINDOWS = r"C:\new\table.txt"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (r"a\nb\tc", "a\nb\tc"),
        (r"a\\nb", r"a\nb"),
        (r"C:\\new", r"C:\new"),
        (r"\d \r\\", "\\d \\r\\"),
    ],
)
def test_one_rule_for_all_texts(typed: str, read: str):
    options = ["--prompt", "--system-prompt", "--prefill-response"]
    argv = [word for option in options for word in (option, typed)]
    args, stated = parse([*argv, "--stop", typed, "x", "--extra-eos-token", typed])
    assert [args.prompt, args.system_prompt, args.prefill_response] == [read] * 3
    assert args.stop == [read, "x"] == stated["stop"]
    assert args.extra_eos_token == [read]
    args, _ = parse(["--follow", "log", "--marker", r"\\n", "-p", "x"])
    assert args.marker == r"\n"


def test_literally():
    args, stated = parse(["--literal", "-p", WINDOWS, "--stop", r"\n"])
    assert args.prompt == WINDOWS
    assert args.stop == [r"\n"]
    assert "seed" not in stated
    assert parse(["-p", WINDOWS])[0].prompt != WINDOWS


def test_what_was_stated():
    args, stated = parse(["--temp", "0.5", "--max-tokens", "100"])
    assert stated == {"temp": 0.5, "max_tokens": 100}
    assert args.prefill_step_size == 2048
    assert args.stop == []


def test_json_stands_alone(tmp_path, capsys: pytest.CaptureFixture[str]):
    """Also where there is something to tell: a budget, a session gone on with."""
    argv = ["-m", "3", "--memory", "60MB", "--session", str(tmp_path / "s"), "--json"]
    argv += ["--prefill-step-size", "64"]
    for prompt in ("Once", "Then"):
        assert main([*argv, "-p", prompt]) == 0
        statistics = json.loads(capsys.readouterr().err)
        assert statistics["generation_tokens"] == 3
    assert statistics["resumed_at"] > 0
    assert statistics["memory"]["limit"] == 60_000_000


def test_notes_for_machines(capsys: pytest.CaptureFixture[str]):
    with terminal.notes_as_json(True):
        terminal.say("reading")
        terminal.warn("the disk is full")
    terminal.warn("as before")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == '{"warning": "the disk is full"}\nwarning: as before\n'


@pytest.mark.parametrize("argv", [["--help"], ["--temp", "nan"], ["--follow", "x"]])
def test_answers_at_once(argv: list[str]):
    """Nothing that takes seconds to import is needed for help, or for a mistyped option."""
    code = (
        "import sys\n"
        "from mlx_sink.commands.entry import run\n"
        "try:\n"
        f"    run('generate', {argv!r})\n"
        "finally:\n"
        "    heavy = {'mlx', 'mlx_lm', 'transformers', 'numpy', 'torch'} & set(sys.modules)\n"
        "    print('heavy:', *heavy, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode in (0, 2)
    assert done.stderr.endswith("heavy:\n")
