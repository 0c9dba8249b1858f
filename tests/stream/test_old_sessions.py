"""Sessions that earlier releases saved go on: the files in ``data`` were written by 165b64a.

Made with the demo model: ``--window 28 --seed 7 --prompt-file story.txt --ignore-eos --temp 0.7``,
one whole (``--max-tokens 30``), one interrupted in the middle of an answer (``--max-tokens 60``).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mlx_sink.commands.generate.command import main
from mlx_sink.models import demo

DATA = Path(__file__).with_name("data")
REST = (
    "ping, and and the children were not scarce; and when clever and unbelieved, they could not "
    "get so far away, and were"
)
NEXT = 'The dog said, "I will show you what I might ride; I will also!"\n\nTHE T'


def test_an_interrupted_answer_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = shutil.copy(DATA / "broken.session", tmp_path / "s")
    options = ["--max-tokens", "60", "--ignore-eos", "--temp", "0.7"]
    story = ["--prompt-file", str(demo.STORY)]
    assert main(["--session", str(file), "--window", "28", "--seed", "7", *story, *options]) == 0
    out, err = capsys.readouterr()
    assert out == REST
    assert "going on at token 1878, after 68 bytes of text" in err


def test_a_whole_session_takes_another_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = shutil.copy(DATA / "whole.session", tmp_path / "s")
    prompt = ["--prompt", "Then a dog came.", "--max-tokens", "20"]
    assert main(["--session", str(file), *prompt]) == 0
    assert capsys.readouterr().out == NEXT
