"""A model is found by the same rules, whether all of it is wanted or its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from folder import make_folder
from mlx_lm import utils

from mlx_sink import ModelError
from mlx_sink.commands.plan import main
from mlx_sink.models.load import DEMO, find, find_config

REPOSITORIES = ["gpt2", "me/model", "me/model-1.5_b", "2ndrepo"]
NO_NAMES = [
    "", "./nowhere", "/nowhere/model", "a/b/c", "~nobody/model", "a b", "me/", "-x",
    "./" + "x" * 5000, "a/config.json", "config.json", "\0", "a\nb",
]  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """A hub whose repositories all hold the same model; returns what it was asked for."""
    asked: list[tuple[str, Any]] = []
    folder = make_folder(tmp_path / "snapshot")

    def download(name: str, *, allow_patterns: list[str], revision: str | None = None) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(utils, "snapshot_download", download)
    return asked


@pytest.mark.parametrize("name", REPOSITORIES)
def test_repositories(name: str, hub: list[tuple[str, Any]]):
    """With and without an owner. Of one that is planned no weights are fetched."""
    folder = find(name)
    assert find_config(name) == folder / "config.json"
    assert main(["--model", name, "--window", "20"]) == 0
    (first, everything), *others = hub
    assert first == name
    assert "*.safetensors" in str(everything)
    assert others == [(name, ["config.json"])] * 2


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name(name: str, hub: list[tuple[str, Any]]):
    for look in (find, find_config):
        with pytest.raises(ModelError) as caught:
            look(name)
        assert repr(name) in str(caught.value)
    assert hub == []


def test_folders_and_files(tmp_path: Path, hub: list[tuple[str, Any]]):
    """A folder of the name of a repository comes first; a file is a configuration, no model."""
    folder = make_folder(tmp_path / "model")
    config = folder / "config.json"
    assert find(str(folder)) == folder
    assert find_config(str(folder)) == find_config(str(config)) == config
    assert find_config(DEMO) == find(DEMO) / "config.json"
    with pytest.raises(ModelError, match="is a file"):
        find(str(config))
    config.unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find_config(str(folder))
    assert hub == []


def test_a_repository_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch):
    def download(name: str, **_: Any) -> str:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(utils, "snapshot_download", download)
    with pytest.raises(ModelError, match=r"^cannot download model 'gpt2': Conn.*no network$"):
        find("gpt2")
    with pytest.raises(ModelError, match=r"^cannot download config\.json of model 'gpt2': Conn"):
        find_config("gpt2")
