"""A small model with real weights, far past its trained context of 512 tokens.

Needs the evaluation data: set MLX_SINK_DATA to the folder that holds ``models/stories260K`` and
``train/tinystories_head.txt``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

DATA = os.environ.get("MLX_SINK_DATA")


@pytest.mark.skipif(DATA is None, reason="MLX_SINK_DATA names no folder with the evaluation data")
def test_perplexity_stays_flat_and_follows_the_oracle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Five windows into a stream the loss is that of the second, and that of recomputing."""
    import eval_stream

    assert DATA is not None
    figures = tmp_path / "figures.json"
    status = eval_stream.main(
        [
            *("--model", f"{DATA}/models/stories260K"),
            *("--text", f"{DATA}/train/tinystories_head.txt", "--separator", "<|endoftext|>"),
            *("--tokens", "1280", "--streams", "8", "--num-sinks", "4", "--window", "252"),
            *("--arms", "recompute", "ours", "--json", str(figures)),
        ]
    )
    assert status == 0
    assert "mlx_sink" in capsys.readouterr().out
    result = json.loads(figures.read_text())
    buckets = {b["from"]: b["perplexity"] for b in result["arms"]["ours"]["buckets"]}
    assert buckets[1024] < 1.1 * buckets[256]
    assert 3.5 < buckets[1024] < 5.0
    assert result["same_tokens"]["count"] > 150
    assert 0.99 < result["same_tokens"]["ratio"] < 1.01
