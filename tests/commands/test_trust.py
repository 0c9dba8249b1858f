"""``--trust-remote-code`` is for a model's tokenizer too, wherever one is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from folder import make_folder
from transformers import dynamic_module_utils

import mlx_sink
from mlx_sink import ModelError, SinkConfig
from mlx_sink.commands import entry
from mlx_sink.models.load import load_draft

CODE = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose tokenizer is code of its own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    path = make_folder(tmp_path / "model")
    (path / "own.py").write_text(CODE)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer"}
    settings["auto_map"] = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def arguments(name: str, model: Path, out: Path) -> list[str]:
    """Return the arguments with which a command loads a model's tokenizer, or two."""
    text = out / "text.txt"
    text.write_text("the cat and the dog went to the sea. " * 40)
    if name == "compare":
        few = ["--lengths", "48", "--arms", "ours", "--trials", "0", "--window", "20"]
        return ["--model", str(model), "--text", str(text), "--output", str(out / "run"), *few]
    if name == "convert":
        return ["--hf-path", str(model), "--mlx-path", str(out / "made"), "--calibrate", str(text)]
    short = ["-p", "cat", "-m", "2", "--window", "20"]
    if name == "draft":
        plain = str(make_folder(out / "plain"))
        return ["--model", plain, "--draft-model", str(model), *short]
    return ["--model", str(model), *short]


@pytest.mark.parametrize("name", ["generate", "draft", "compare", "convert"])
def test_commands(name: str, folder: Path, tmp_path: Path):
    """Without it they refuse in one line, and nobody is asked on the terminal."""
    command: Any = entry.command("generate" if name == "draft" else name)
    argv = arguments(name, folder, tmp_path)
    with pytest.raises(ModelError, match=r"custom code.*\(--trust-remote-code"):
        command.main(argv)
    assert command.main([*argv, "--trust-remote-code"]) == 0


def test_functions(folder: Path):
    """One word for the model and its tokenizer, or one for the tokenizer alone."""
    with pytest.raises(ModelError, match="custom code"):
        mlx_sink.load(folder)
    for options in (
        {"trust_remote_code": True},
        {"tokenizer_config": {"trust_remote_code": True}},
    ):
        _, tokenizer = mlx_sink.load(folder, SinkConfig(4, 20), **options)
        assert type(tokenizer._tokenizer).__name__ == "OwnTokenizer"
        load_draft(folder, tokenizer, SinkConfig(4, 20), **options)
    no = {"trust_remote_code": True, "tokenizer_config": {"trust_remote_code": False}}
    with pytest.raises(ModelError, match="custom code"):
        mlx_sink.load(folder, **no)
