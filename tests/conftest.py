"""Settings for every test."""

from __future__ import annotations

import os
import sys

import pytest

# A stray download would hang a machine without a network, and no test needs one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what runs Metal text on a CPU where Metal itself is."""
    skip = pytest.mark.skip(reason="the Metal runner is for Linux; here the kernels run for real")
    for item in items:
        if sys.platform == "darwin" and item.path.name.startswith("test_host_metal"):
            item.add_marker(skip)


@pytest.fixture
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Attend in blocks of the (indirect) parameter's size, so that a chunk has many."""
    monkeypatch.setattr("mlx_sink.attention.dispatch.BLOCK", request.param)
    return request.param
