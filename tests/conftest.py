"""Settings for every test."""

from __future__ import annotations

import os

import pytest

# A stray download would hang a machine without a network, and no test needs one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Attend in blocks of the (indirect) parameter's size, so that a chunk has many."""
    monkeypatch.setattr("mlx_sink.attention.BLOCK", request.param)
    return request.param
