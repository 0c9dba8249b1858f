"""What earlier releases left of a comparison still serves: ``data`` was written by 165b64a.

Made with the demo model: ``--text story.txt --lengths 64 128 --num-sinks 2 --window 22 --samples 4
--prefill-step-size 16 --trials 2 --arms ours recompute``; ``results.json`` by a whole run, the
others by runs that were interrupted while they read, and while they put questions.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_sink.commands.compare import command
from mlx_sink.io import tensors
from mlx_sink.measure import machine
from mlx_sink.measure.comparison.results import Results
from mlx_sink.models import demo

DATA = Path(__file__).with_name("data")
OLD: dict[str, Any] = json.loads((DATA / "results.json").read_text())
OPTIONS = """
    --lengths 64 128 --num-sinks 2 --window 22 --samples 4 --prefill-step-size 16 --trials 2
    --arms ours recompute
"""
ARGUMENTS = ["--text", str(demo.STORY), *OPTIONS.split()]


def measured(values: dict[str, Any]) -> dict[str, Any]:
    """Return what depends neither on the clock nor on what else the machine does."""
    keys = ("length", "from", "count", "cache_bytes", "loss", "perplexity", "low", "high")
    methods = values["arms"].items()
    return {
        "numbers": {
            f"{name} {key}": [m[key] for m in method["at"]]
            for name, method in methods
            for key in keys
        }
        | {
            f"beside {name} {key}": [value]
            for name, beside in values["beside_recompute"].items()
            for key, value in beside.items()
        },
        "methods": {name: (method["tokens"], method["stopped"]) for name, method in methods},
        **{key: values[key] for key in ("recall", "lengths", "config", "text", "finished")},
    }


def assert_same(values: dict[str, Any], expected: dict[str, Any]):
    """Losses may differ in their last digits from machine to machine."""
    result, wanted = measured(values), measured(expected)
    numbers, wanted_numbers = result.pop("numbers"), wanted.pop("numbers")
    assert result == wanted
    assert numbers.keys() == wanted_numbers.keys()
    for name, row in wanted_numbers.items():
        assert numbers[name] == pytest.approx(row, abs=1e-3), name


@pytest.mark.parametrize("when", ["reading", "asking"])
def test_an_interrupted_run_is_resumed(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # Full attention may take a share of the machine's memory: that is part of what a run is.
    here = replace(machine.machine(), memory=OLD["machine"]["memory"])
    monkeypatch.setattr(command, "machine", lambda: here)
    shutil.copy(DATA / f"{when}.state", tmp_path / "run.state")
    assert command.main([*ARGUMENTS, "--output", str(tmp_path / "run")]) == 0
    assert "resuming from" in capsys.readouterr().err
    assert_same(json.loads((tmp_path / "run.json").read_text()), OLD)


def test_old_results_are_shown(tmp_path: Path):
    output = tmp_path / "page"
    assert command.main(["--from", str(DATA / "results.json"), "--output", str(output)]) == 0
    page = output.with_name("page.html").read_text()
    assert "mlx_sink.compare --model demo" in page
    assert page.count("<svg") == 7


def test_results_keep_their_form():
    """An earlier release shows what this one writes: the same keys, and the same values."""
    assert Results.from_dict(OLD).to_dict() == OLD
    assert list(Results.from_dict(OLD).to_dict()) == list(OLD)


@pytest.mark.parametrize("when", ["reading", "asking"])
def test_the_file_of_a_run_keeps_its_form(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An earlier release resumes what this one saves: saved again at once, it is the same."""
    here = replace(machine.machine(), memory=OLD["machine"]["memory"])
    monkeypatch.setattr(command, "machine", lambda: here)
    file = tmp_path / "run.state"
    shutil.copy(DATA / f"{when}.state", file)
    args = command.parser().parse_args([*ARGUMENTS, "--output", str(tmp_path / "run")])
    run = command._Run(args, [])
    scores = command.comparison_file.restore(file, run.comparison, run.key)
    command.comparison_file.save(file, run.comparison, run.key, scores)
    (note, arrays), (old_note, old_arrays) = (
        tensors.read(path) for path in (file, DATA / f"{when}.state")
    )
    assert note == old_note
    assert arrays.keys() == old_arrays.keys()
    for name, array in arrays.items():
        assert array.dtype == old_arrays[name].dtype
        assert bool((array == old_arrays[name]).all()), name
