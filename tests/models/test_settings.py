"""Which setting applies: an argument, the model's own section, or the default; what says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from folder import make_folder

import mlx_sink
from mlx_sink import ConfigError, ModelError, SinkConfig
from mlx_sink.commands.generate.command import main
from mlx_sink.models.checkpoints.settings import Settings, apply

CONTEXT = 64


@pytest.mark.parametrize(
    ("own", "num_sinks", "window", "expected"),
    [
        ({}, None, None, (4, 60, "default", "default")),
        ({}, 2, None, (2, 62, "argument", "default")),
        ({}, None, 9, (4, 9, "default", "argument")),
        ({"num_sinks": 1, "window": 31}, None, None, (1, 31, "config.json", "config.json")),
        ({"num_sinks": 0, "window": 31}, None, None, (0, 31, "config.json", "config.json")),
        ({"num_sinks": 1, "window": 31}, 5, None, (5, 31, "argument", "config.json")),
        ({"num_sinks": 1, "window": 31}, 0, None, (0, 31, "argument", "config.json")),
        ({"num_sinks": 1, "window": 31}, None, 9, (1, 9, "config.json", "argument")),
        ({"num_sinks": 1, "window": 31}, 5, 9, (5, 9, "argument", "argument")),
        ({"window": 31}, None, None, (4, 31, "default", "config.json")),
        ({"num_sinks": 1}, None, None, (1, 63, "config.json", "default")),
        # More sinks than the section had in mind: its window makes room.
        ({"num_sinks": 1, "window": 63}, 10, None, (10, 54, "argument", "config.json")),
    ],
)
def test_precedence(
    own: dict[str, int], num_sinks: int | None, window: int | None, expected: tuple[Any, ...]
):
    config, sources = apply(Settings(**own), CONTEXT, num_sinks, window)
    assert (config.num_sinks, config.window, *sources.values()) == expected
    assert list(sources) == ["num_sinks", "window"]


def test_a_section_beyond_the_context_is_refused():
    with pytest.raises(ConfigError, match="more than the 64 tokens"):
        apply(Settings(4, 61), CONTEXT)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ([], "not a JSON object"),
        (None, "not a JSON object"),
        ({"windw": 3}, "unknown key 'windw'"),
        ({"window": "many"}, "window must be an integer, got 'many'"),
        ({"window": True}, "window must be an integer"),
        ({"window": None}, "window must be an integer, got None"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"num_sinks": -1}, "num_sinks must be at least 0"),
        ({"num_sinks": 1.5}, "num_sinks must be an integer"),
        ({"calibration": 3}, "calibration"),
    ],
)
def test_a_section_is_validated(section: object, words: str):
    with pytest.raises(ModelError, match=words) as caught:
        Settings.of({"mlx_sink": section})
    assert "config.json" in str(caught.value)


def test_no_section_asks_for_nothing():
    assert Settings.of({"model_type": "llama"}) == Settings(None, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    section = {"num_sinks": 1, "window": 23}
    return make_folder(tmp_path_factory.mktemp("models") / "own", mlx_sink=section)


def test_load_takes_the_section(folder: Path):
    model, _, report = mlx_sink.load(folder, return_report=True)
    assert (report.config.num_sinks, report.config.window) == (1, 23)
    assert report.sources == {"num_sinks": "config.json", "window": "config.json"}
    assert "num_sinks 1 (config.json), window 23 (config.json)" in str(report)
    assert report.to_dict()["sources"] == dict(report.sources)
    assert model.make_cache()[0].ring.capacity == 24


def test_load_prefers_what_it_is_given(folder: Path):
    model, _, report = mlx_sink.load(folder, SinkConfig(2, 9), return_report=True)
    assert report.sources == {"num_sinks": "argument", "window": "argument"}
    assert model.make_cache()[0].ring.capacity == 11


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], (1, 23, "config.json", "config.json")),
        (["--window", "40"], (1, 40, "config.json", "argument")),
        (["--num-sinks", "3"], (3, 23, "argument", "config.json")),
    ],
)
def test_generate_says_what_applied(
    flags: list[str],
    expected: tuple[Any, ...],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
):
    argv = ["--model", str(folder), "-p", "the cat", "-m", "2", "--ignore-eos", *flags]
    assert main([*argv, "--json"]) == 0
    said = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (said["num_sinks"], said["window"], *said["sources"].values()) == expected
    assert main(argv) == 0
    line = f"settings from num_sinks: {expected[2]}, window: {expected[3]}"
    assert line in capsys.readouterr().err
