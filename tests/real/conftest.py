"""A real model: SmolLM2-135M-Instruct, in GGUF, out of the Python registry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from checkout import ROOT

from mlx_sink.models.load import load_unattached


@pytest.fixture(scope="session")
def real_file() -> Path:
    """Return the model's file; where it cannot be had say why, and in CI fail."""
    import sys

    sys.path.insert(0, str(ROOT / "scripts"))
    import real_model

    try:
        return real_model.fetch()
    except (real_model.FetchError, OSError) as error:
        if os.environ.get("MLX_SINK_REAL_MODEL") == "required":
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def real(real_file: Path) -> tuple[nn.Module, Any]:
    """Return the model, nothing attached, in float32, and its tokenizer."""
    loaded = load_unattached(str(real_file))
    loaded.model.set_dtype(mx.float32)
    mx.eval(loaded.model.parameters())
    return loaded.model, loaded.tokenizer
