"""Recall on the command line: what is asked looks up, and the statistics say in what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_sink.commands.generate.command import main
from mlx_sink.errors import ConfigError
from mlx_sink.models.load import find
from mlx_sink.stream.loop import Loop

STORY = find("demo") / "story.txt"
OPTIONS = ["--window", "64", "--recall", "64", "--recall-memory", "300kB", "-m", "3", "--json"]


def statistics(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main([*argv, *OPTIONS]) == 0
    return json.loads(capsys.readouterr().err.splitlines()[-1])


def test_read_ask_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    session = ["--session", str(tmp_path / "s")]
    read = statistics(capsys, "--prompt-file", str(STORY), *session)
    first, end = read["recall"]["tokens"]
    assert 4 < first < end <= read["position"] - 64
    assert read["recall"]["archive_bytes"] <= 300_000
    assert read["cache_bytes"] == read["cache_bytes_full"]
    asked = statistics(capsys, "--prompt", "Lily", *session)
    assert asked["resumed_at"] == read["position"]
    assert asked["recall"]["tokens"][0] >= first
    with pytest.raises(ConfigError, match="was made with --recall 64, not 96"):
        main(["--prompt", "Lily", *session, "--recall", "96"])


def test_what_is_typed_looks_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And what comes out of files does not, unless it always does; nor does a followed file."""
    fed: list[bool] = []
    original = Loop.read

    def noting(loop: Loop, tokens: Any, step: int, progress: Any, stop: Any, recall: bool) -> int:
        fed.append(recall)
        return original(loop, tokens, step, progress, stop, recall)

    monkeypatch.setattr(Loop, "read", noting)
    (tmp_path / "p").write_text("And then\n")
    (tmp_path / "log").write_text("One\nTwo\n?\nThree\n")
    monkeypatch.setattr("sys.stdin", (tmp_path / "log").open())

    def told(*argv: str) -> list[bool]:
        fed.clear()
        main([*argv, *OPTIONS])
        return list(fed)

    assert told("--prompt", "And then") == [True]
    assert told("--prompt-file", str(tmp_path / "p")) == [False]
    assert told("--prompt-file", str(tmp_path / "p"), "--recall-mode", "always") == [True]
    assert told("--follow", "-", "--marker", "?", "--prompt", "Why?") == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recall", "50"], "recall must be a multiple of recall_block .32., got 50"),
        (["--recall", "64", "--recall-memory", "much"], "--recall-memory must be bytes such as"),
        (["--recall", "64", "--recall-memory", "4"], "recall_memory must hold the 64 tokens"),
        (["--recall", "512"], "is 10[0-9]+|more than the 512 tokens"),
        (["--recall", "64", "--recall-layers", "9"], "layer 9 of recall_layers cannot recall"),
    ],
    ids=str,
)
def test_refusals(argv: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        main(["--prompt", "x", *argv])


@pytest.mark.parametrize("argv", [["--recall-layers", "1,x"], ["--recall-bits", "5"]], ids=str)
def test_mistyped(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "must be" in capsys.readouterr().err.splitlines()[-1]
