"""The tests that need PyTorch are all slow; their helpers are those of the other tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# A stray download would hang a machine without a network, and no test needs one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave them alone where slow tests are: to look at them takes PyTorch."""
    return True if "not slow" in config.option.markexpr else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("slow")
