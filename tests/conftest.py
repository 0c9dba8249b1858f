"""Settings for every test."""

from __future__ import annotations

import os
import re
import sys

import pytest

# A stray download would hang a machine without a network, and no test needs one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

RUNS_ON_A_CPU = re.compile(
    r"(^|/)test_(host_metal|kernel_|doctor)\w*\.py|test_scripts\.py::test_(measure|sweep)"
)
"""Tests that run the kernels' text on a CPU, or pretend that this machine has a GPU or none."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what runs Metal text on a CPU where Metal itself is (`test_gpu`)."""
    skip = pytest.mark.skip(reason="the Metal runner is for Linux; here the kernels run for real")
    for item in items:
        if sys.platform == "darwin" and RUNS_ON_A_CPU.search(item.nodeid):
            item.add_marker(skip)


@pytest.fixture
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Attend in blocks of the (indirect) parameter's size, so that a chunk has many."""
    monkeypatch.setattr("mlx_sink.attention.dispatch.BLOCK", request.param)
    return request.param
