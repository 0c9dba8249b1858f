"""Folders that are something else than a model: every command says what, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folder import make_folder

from mlx_sink import ModelError
from mlx_sink.commands.entry import command
from mlx_sink.models.checkpoints.checkpoint import PATTERN

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "good")


def files(**contents: Any) -> Change:
    """Write files in the place of all there are; ``__`` stands for a dot."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        for name, content in contents.items():
            path = folder / name.replace("__", ".").replace("_IN_", "/")
            path.parent.mkdir(exist_ok=True)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            path.write_bytes(data)

    return change


def renamed(to: str) -> Change:
    return lambda folder: (folder / "model.safetensors").rename(folder / to) and None


def pointer(name: str) -> Change:
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    return lambda folder: (folder / name).write_bytes(text) and None


CONFIG = {"model_type": "llama"}
PEFT = {"base_model_name_or_path": "me/base", "peft_type": "LORA"}

FOLDERS: dict[str, tuple[Change, str]] = {
    "empty": (files(), "no config.json: it is empty"),
    "adapter of PEFT": (
        files(adapter_config__json=PEFT, adapter_model__safetensors=b"x"),
        "is an adapter of PEFT for me/base, which mlx-lm does not read: merge it",
    ),
    "adapter of PEFT, pickled": (
        files(adapter_config__json=PEFT, adapter_model__bin=b"x"),
        "is an adapter of PEFT for me/base",
    ),
    "adapter": (
        files(adapter_config__json={"model": "me/base"}, adapters__safetensors=b"x"),
        "is an adapter, not a model: use --model me/base --adapter-path ",
    ),
    "adapter with a tokenizer": (
        files(adapter_config__json=[], adapters__safetensors=b"x", tokenizer__json={}),
        "is an adapter, not a model: use --model its base model",
    ),
    "pipeline": (
        files(model_index__json={"_class_name": "StableDiffusionPipeline"}),
        "is a pipeline of diffusers (StableDiffusionPipeline), not a language model",
    ),
    "part of a pipeline": (
        files(config__json={"_class_name": "UNet2DConditionModel"}),
        "is a part of a pipeline of diffusers (UNet2DConditionModel)",
    ),
    "tokenizer": (files(tokenizer__json={}), "is a tokenizer alone (tokenizer.json)"),
    "pickle": (files(pytorch_model__bin=b"", config__json=CONFIG), "bin is a pickle"),
    "state of a training run": (
        files(training_args__bin=b"", config__json=CONFIG),
        f"has no {PATTERN}",
    ),
    "ONNX": (files(onnx_IN_model__onnx=b"", config__json=CONFIG), "weights for ONNX (model.onnx)"),
    "TensorFlow": (files(tf_model__h5=b"", config__json=CONFIG), "weights for TensorFlow"),
    "Flax": (files(flax_model__msgpack=b"", config__json=CONFIG), "weights for Flax"),
    "npz": (files(weights__npz=b"", config__json=CONFIG), "an early MLX example (weights.npz)"),
    "Mistral's": (
        files(consolidated__safetensors=b"", params__json={}),
        "in Mistral's own format (consolidated.safetensors)",
    ),
    "misnamed": (renamed("weights.safetensors"), "rename it to model.safetensors"),
    "sentences": (
        files(modules__json=[], config__json=CONFIG),
        "is a model of sentence-transformers",
    ),
    "folders of models": (
        files(b_IN_config__json=CONFIG, a_IN_config__json=CONFIG),
        "holds folders of models: name one of them, such as ",
    ),
    "something": (files(notes__txt=b"x"), "has no config.json"),
    "pointer": (pointer("model.safetensors"), "run git lfs pull"),
    "pointer to a tokenizer": (pointer("tokenizer.json"), "run git lfs pull"),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "it has no tokenizer, such as tokenizer.json (",
    ),
}

PLANNED = {"misnamed", "pointer", "pointer to a tokenizer", "no tokenizer", "sentences"}
"""For a plan the configuration is enough, if it is one."""


def arguments(name: str, model: Path, out: Path) -> list[str]:
    text = out / "text.txt"
    text.write_text("the cat and the dog went to the sea. " * 40)
    return {
        "generate": ["--model", str(model), "-p", "the cat"],
        "convert": ["--hf-path", str(model), "--mlx-path", str(out / "made")],
        "compare": ["--model", str(model), "--text", str(text), "--output", str(out / "run")],
        "plan": ["--model", str(model)],
    }[name]


@pytest.mark.parametrize("name", ["generate", "convert", "compare"])
@pytest.mark.parametrize("case", FOLDERS)
def test_folders(case: str, name: str, good: Path, tmp_path: Path):
    change, words = FOLDERS[case]
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    change(folder)
    with pytest.raises(ModelError) as caught:
        command(name).main(arguments(name, folder, tmp_path))
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("pickle" in str(caught.value)) == (case == "pickle")
    assert {file.name for file in tmp_path.iterdir()} <= {"model", "text.txt"}


@pytest.mark.parametrize("case", sorted(FOLDERS.keys() - PLANNED))
def test_plans(case: str, good: Path, tmp_path: Path):
    change, words = FOLDERS[case]
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    change(folder)
    if (folder / "config.json").is_file() and case != "part of a pipeline":
        words = "lacks fields"  # There is a configuration, and of weights no plan knows.
    with pytest.raises(ModelError) as caught:
        command("plan").main(["--model", str(folder)])
    assert words in str(caught.value)


ADAPTERS: dict[str, tuple[Change, str]] = {
    "gone": (lambda folder: shutil.rmtree(folder), "does not exist"),
    "empty": (files(), "has no adapter_config.json: it is empty"),
    "of PEFT": (
        files(adapter_config__json=PEFT, adapter_model__safetensors=b"x"),
        "has no adapters.safetensors: it is an adapter of PEFT for me/base",
    ),
    "a model": (lambda folder: None, "has no adapter_config.json"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case: str, good: Path, tmp_path: Path):
    change, words = ADAPTERS[case]
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    change(folder)
    with pytest.raises(ModelError, match=f"adapter folder .*{words}"):
        command("generate").main(
            ["--model", str(good), "-p", "the cat", "--adapter-path", str(folder)]
        )
