"""A small model with real weights, converted, against transformers.

Needs the evaluation data: set MLX_SINK_DATA to the folder that holds ``models/stories260K`` and
``train/tinystories_head.txt``.
"""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
import transformers

import mlx_sink
from mlx_sink.commands.convert.card import SAMPLE, sample_text
from mlx_sink.commands.convert.convert import Text, convert

DATA = os.environ.get("MLX_SINK_DATA")
pytestmark = pytest.mark.skipif(
    DATA is None, reason="MLX_SINK_DATA names no folder with the evaluation data"
)


def halves(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Reorder the rows of a projection: transformers knows no interleaved rotary pairs."""
    rows, width = weight.shape
    pairs = weight.reshape(n_heads, rows // n_heads // 2, 2, width)
    return pairs.transpose(1, 2).reshape(rows, width)


def test_logits_and_first_tokens(tmp_path: Path):
    assert DATA is not None
    source = Path(DATA) / "models" / "stories260K"
    made = convert(source, tmp_path / "made")
    model, tokenizer = mlx_lm.load(str(made.path))
    text = (Path(DATA) / "train" / "tinystories_head.txt").read_text(encoding="utf-8")[:1000]
    tokens = np.array([tokenizer.encode(text)])
    assert 300 < tokens.shape[1] <= 512
    reference = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        for layer in reference.model.layers:
            attention = layer.self_attn
            for projection, heads in ((attention.q_proj, 8), (attention.k_proj, 4)):
                projection.weight.copy_(halves(projection.weight, heads))
        expected = reference(torch.tensor(tokens), use_cache=False).logits.numpy()
    assert np.abs(np.array(model(mx.array(tokens))) - expected).max() <= 1e-3
    texts = {
        mlx_lm.generate(*loaded[:2], prompt="Once upon a time", max_tokens=40)
        for loaded in (mlx_lm.load(str(source)), (model, tokenizer))
    }
    loaded = mlx_sink.load(made.path)
    texts.add(mlx_sink.generate(*loaded, prompt="Once upon a time", max_tokens=40))
    assert len(texts) == 1


def test_it_has_no_sink(tmp_path: Path):
    """Known of this model: no attention to speak of on its first token, and no use for sinks."""
    assert DATA is not None
    text = Text(sample_text()[:3000], SAMPLE)
    made = convert(Path(DATA) / "models" / "stories260K", tmp_path / "made", calibrate_on=text)
    assert made.calibration is not None
    assert not made.calibration.sinks_matter
    assert max(made.calibration.share.of_layer(1)) < 0.01
