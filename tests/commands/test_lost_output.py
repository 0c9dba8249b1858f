"""The terminal or the reader goes away in the middle of an answer: the session has all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_sink import OutputError
from mlx_sink.commands.generate.command import main
from mlx_sink.io import terminal

PROMPT = ["--prompt", "Once upon a time", "--seed", "3", "--ignore-eos"]


@pytest.mark.parametrize("error", [OutputError("Input/output error"), BrokenPipeError()])
@pytest.mark.parametrize("after", [1, 4])
def test_what_could_not_be_shown_comes_first_when_it_goes_on(
    after: int, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shown: list[str] = []
    monkeypatch.setattr(terminal, "write", shown.append)
    assert main([*PROMPT, "-m", "12", "--session", str(tmp_path / "whole")]) == 0
    whole, shown[:] = "".join(shown), []

    def write(text: str) -> None:
        if len(shown) == after:
            raise error
        shown.append(text)

    monkeypatch.setattr(terminal, "write", write)
    argv = [*PROMPT, "-m", "12", "--session", str(tmp_path / "s")]
    with pytest.raises(type(error)):
        main(argv)
    monkeypatch.setattr(terminal, "write", shown.append)
    assert main(argv) == 0
    assert "".join(shown) == whole
