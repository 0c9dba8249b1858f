"""The bytes of weights that `plan` says are those that `convert` writes, and that are loaded."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from every import config as tiny_config
from every import tiny
from every_configs import OVERRIDES
from folder import make_folder
from mlx.utils import tree_flatten

from mlx_sink import ModelError
from mlx_sink.commands.convert.convert import convert
from mlx_sink.commands.convert.quantize import Recipe
from mlx_sink.measure.estimate import Estimate, estimate

KEYS = ("dtype", "torch_dtype")


def planned(path: Path) -> Estimate:
    return estimate(str(path), num_sinks=1, window=4)


def types_of(folder: Path) -> set[str]:
    weights = mx.load(str(folder / "model.safetensors"))
    return {str(weight.dtype).removeprefix("mlx.core.") for weight in weights.values()}


def bytes_of(folder: Path) -> int:
    return sum(
        w.nbytes for file in folder.glob("*.safetensors") for w in mx.load(str(file)).values()
    )


def stored(folder: Path, dtype: mx.Dtype) -> Path:
    """Write the weights of a folder again, in another type."""
    weights = mx.load(str(folder / "model.safetensors"))
    cast = {name: weight.astype(dtype) for name, weight in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), cast, {"format": "mlx"})
    return folder


WITH_PREFIX = pytest.param(
    "torch.bfloat16",
    marks=pytest.mark.skipif(
        find_spec("torch") is not None, reason="transformers refuses this where PyTorch is there"
    ),
)
SAID = ("float32", "float16", "bfloat16", WITH_PREFIX, "float64", None)


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("key", KEYS)
def test_either_key_says_the_same(key: str, said: str | None, held: str, tmp_path: Path):
    """transformers 5 writes dtype; mlx-lm's converter asks for torch_dtype alone."""
    fields = {} if said is None else {key: said}
    folder = stored(make_folder(tmp_path / "model", **fields), getattr(mx, held))
    made = convert(folder, tmp_path / "made")
    known = None if said in (None, "float64") else said.removeprefix("torch.")
    assert types_of(made.path) == {known or held}
    plan = planned(folder)
    assert plan.weights.nbytes == made.nbytes == bytes_of(made.path)
    assert (plan.dtype, plan.dtype_assumed) == (known or held, False)


def test_both_keys_and_the_text_models(tmp_path: Path):
    for i, (fields, dtype) in enumerate(
        [
            ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
            ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
            ({"text_config": {"dtype": "float16"}}, "float16"),
            ({"text_config": {"torch_dtype": "float16"}}, "float16"),
        ]
    ):
        folder = make_folder(tmp_path / f"model{i}", **fields)
        assert types_of(convert(folder, tmp_path / f"made{i}").path) == {dtype}
        assert planned(folder).dtype == dtype


def test_a_folder_that_is_larger_as_it_is(tmp_path: Path):
    """`generate` casts nothing: who loads the files as they are is told what that takes."""
    folder = make_folder(tmp_path / "model", torch_dtype="bfloat16")
    plan = planned(folder)
    assert plan.weights.nbytes == bytes_of(folder) // 2
    (note,) = (note for note in plan.notes if "files hold" in note)
    assert "its files hold float32: before they are converted to bfloat16" in note


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(quantize=True, q_bits=4, q_group_size=32),
        Recipe(quantize=True, q_bits=8, q_group_size=32, dtype="bfloat16"),
        Recipe(quantize=True, q_mode="mxfp4"),
        Recipe(quantize=True, quant_predicate="mixed_3_6", q_group_size=32),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_quantised(recipe: Recipe, tied: bool, tmp_path: Path):
    """Embeddings included; from the files, and from the configuration alone."""
    folder = make_folder(tmp_path / "model", tie_word_embeddings=True, torch_dtype="float16")
    if not tied:
        weights = dict(mx.load(str(folder / "model.safetensors")))
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    made = convert(folder, tmp_path / "made", recipe=recipe)
    assert made.nbytes == bytes_of(made.path)
    again = convert(made.path, tmp_path / "again")
    alone = tmp_path / "config.json"
    alone.write_bytes((made.path / "config.json").read_bytes())
    counts = {planned(made.path).weights.nbytes, planned(alone).weights.nbytes}
    # A type of its own for what is not quantised is in no configuration that mlx-lm writes.
    expected = {again.nbytes}
    assert counts == expected


CASES = ["qwen3", "gemma3n", "deepseek_v3", "recurrent_gemma", "qwen3_next", "mixtral", "gpt_oss"]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_architectures(name: str, dtype: str | None, tmp_path: Path):
    """Some parameters stay in float32 whatever is said, and some files mix types."""
    folder = tmp_path / "model"
    make_folder(folder)
    model = tiny(name, dtype=mx.bfloat16)
    weights = dict(tree_flatten(model.parameters()))
    odd = min(name for name, weight in weights.items() if weight.ndim == 2)
    weights[odd] = weights[odd].astype(mx.float32)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    fields: dict[str, Any] = tiny_config(name, OVERRIDES.get(name, {}))
    fields |= {"max_position_embeddings": 64}
    fields.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(fields | ({"dtype": dtype} if dtype else {})))
    made = convert(folder, tmp_path / "made")
    assert planned(folder).weights.nbytes == made.nbytes == bytes_of(made.path)
    if dtype is None:
        assert made.nbytes == bytes_of(folder)


def test_without_files_the_configuration_counts(tmp_path: Path):
    folder = make_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    plan = planned(folder)
    assert (plan.dtype, plan.dtype_assumed) == ("bfloat16", True)


def test_files_that_are_not_whole_are_told_and_not_counted(tmp_path: Path):
    """A download that is under way can be planned."""
    folder = make_folder(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    plan = planned(folder)
    assert plan.weights.nbytes > 0
    assert any("its weight files are not counted: " in note for note in plan.notes)
    assert any("is damaged" in note for note in plan.notes)


def test_an_unknown_dtype_without_files(tmp_path: Path):
    folder = make_folder(tmp_path / "model", dtype="int7")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="unknown dtype 'int7'"):
        planned(folder)
