"""What a person may call a model: understood, or told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from folder import make_folder
from mlx_lm import utils

from mlx_sink import ModelError
from mlx_sink.commands.plan import main
from mlx_sink.models.demo import FOLDER
from mlx_sink.models.load import find, find_config, repository_of

REPOSITORIES = {
    "gpt2": ("gpt2", None),
    "me/model-1.5_b": ("me/model-1.5_b", None),
    "me/model/": ("me/model", None),
    " me/model\n": ("me/model", None),
    "me/model@v2": ("me/model", "v2"),
    "https://huggingface.co/me/model": ("me/model", None),
    "https://huggingface.co/me/model/": ("me/model", None),
    "https://huggingface.co/me/model?library=mlx#usage": ("me/model", None),
    "http://www.huggingface.co/me/model": ("me/model", None),
    "https://hf.co/me/model": ("me/model", None),
    "HTTPS://HuggingFace.co/me/model": ("me/model", None),
    "https://huggingface.co/me/model/tree/v2": ("me/model", "v2"),
    "https://huggingface.co/me/model/tree/refs%2Fpr%2F3": ("me/model", "refs/pr/3"),
    "https://huggingface.co/me/model/blob/main/config.json": ("me/model", "main"),
    "https://huggingface.co/me/model/resolve/abc/model.safetensors": ("me/model", "abc"),
    "https://huggingface.co/me/model.git": ("me/model", None),
    "https://huggingface.co/gpt2": ("gpt2", None),
    "huggingface.co/me/model": ("me/model", None),
    "hf.co/me/model": ("me/model", None),
    "hf://me/model": ("me/model", None),
    "hf://me/model@v2": ("me/model", "v2"),
}

NO_NAMES = {
    "": "does not exist",
    " ": "does not exist",
    "./nowhere": "does not exist",
    "/nowhere/model": "does not exist",
    "nowhere\\model": "does not exist",
    "C:\\models\\llama": "does not exist",
    "~nobody/model": "does not exist",
    "a/b/c": "does not exist",
    "a b": "does not exist",
    "me/": "does not exist",
    "-x": "does not exist",
    "a\0b": "does not exist",
    "a\nb": "does not exist",
    "./" + "x" * 5000: "does not exist",
    "a/config.json": "does not exist",
    "llama3.2:3b": "Ollama",
    "llama3:latest": "Ollama",
    "hf.co/me/model-GGUF:Q4_K_M": "Ollama",
    "library/llama3.2:3b": "Ollama",
    "https://example.com/me/model": "outside huggingface.co",
    "https://github.com/me/model": "outside huggingface.co",
    "file:///models/llama": "outside huggingface.co",
    "https://[": "no address",
    "https://huggingface.co": "not that of a model",
    "https://huggingface.co/": "not that of a model",
    "https://huggingface.co/datasets/me/data": "not that of a model",
    "https://huggingface.co/spaces/me/app": "not that of a model",
    "hf://datasets/me/data": "does not exist",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any]]:
    """A hub whose repositories all hold the same model; returns what it was asked for."""
    asked: list[tuple[str, Any, Any]] = []
    folder = make_folder(tmp_path / "snapshot")

    def download(name: str, *, allow_patterns: list[str], revision: str | None = None) -> str:
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(utils, "snapshot_download", download)
    return asked


@pytest.mark.parametrize("name", REPOSITORIES)
def test_repositories(name: str, hub: list[tuple[str, Any, Any]]):
    """Of one that is planned no weights are fetched."""
    assert repository_of(name) == REPOSITORIES[name][0]
    folder = find(name)
    assert find_config(name) == folder / "config.json"
    assert main(["--model", name, "--window", "20"]) == 0
    assert {(repo, revision) for repo, revision, _ in hub} == {REPOSITORIES[name]}
    assert "model*.safetensors" in hub[0][2]
    assert all(patterns == ["config.json"] for _, _, patterns in hub[1:])


def test_an_argument_goes_before_the_name(hub: list[tuple[str, Any, Any]]):
    find("me/model@v2", "v3")
    assert hub[0][:2] == ("me/model", "v3")


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name(name: str, hub: list[tuple[str, Any, Any]]):
    for look in (find, find_config):
        with pytest.raises(ModelError, match=NO_NAMES[name]) as caught:
            look(name)
        assert repr(name) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert hub == []


@pytest.mark.parametrize("spelling", ["{0}", "{0}/", "{0}//", " {0}", "{0}/../model", "./model"])
def test_folders(spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    name = spelling.format(folder)
    assert find(name).resolve() == find_config(name).parent.resolve() == folder
    assert repository_of(name) is None


def test_a_folder_with_spaces_and_one_named_like_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is there goes before what could be downloaded."""
    monkeypatch.chdir(tmp_path)
    for name in (" spaced ", "me/model", "llama3.2:3b"):
        make_folder(tmp_path / name)
        assert find(name) == Path(name)


def test_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = make_folder(tmp_path / "models" / "mine")
    assert find("~/models/mine") == find("~/models/mine/") == folder
    assert find("~\\models\\mine") == folder


def test_a_folder_of_the_hubs_cache(tmp_path: Path):
    """Its path is what a file manager shows; the model is two levels further in."""
    repository = tmp_path / "models--me--model"
    snapshot = make_folder(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert find(str(repository)) == snapshot


def test_a_file_is_told(tmp_path: Path):
    folder = make_folder(tmp_path / "model")
    (folder / "model.gguf").write_bytes(b"GGML")
    for file, words in (
        ("config.json", "is a file, and none of GGUF: name the folder"),
        ("model.safetensors", "is a file, and none of GGUF: name the folder"),
        ("model.gguf", "is a file, and none of GGUF: name the folder"),
    ):
        with pytest.raises(ModelError, match=words):
            find(str(folder / file))
    assert find_config(str(folder / "config.json")) == folder / "config.json"
    assert find_config("demo") == find("demo") / "config.json" == FOLDER / "config.json"


def test_a_repository_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch):
    """The hub's client says what to do about it in the lines after the first."""

    def download(name: str, **_: Any) -> str:
        raise ConnectionError("401 Client Error.\n\nNot Found.\nLog in for private ones.")

    monkeypatch.setattr(utils, "snapshot_download", download)
    said = "ConnectionError: 401 Client Error. Not Found. Log in for private ones."
    for look, what in ((find, "model"), (find_config, r"config\.json of model")):
        with pytest.raises(ModelError, match=rf"^cannot download {what} 'gpt2': {said}$"):
            look("gpt2")
