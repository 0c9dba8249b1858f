"""Settings for every test, and the table of those that are slow."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest
import slow
from hypothesis import HealthCheck, settings
from slow import Slow

# A stray download would hang a machine without a network, and no test needs one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Points that no run has seen before: some in each run, many in that of all tests.
for name, examples in (("dev", 8), ("ci", 120)):
    settings.register_profile(
        name,
        settings.get_profile("default"),
        max_examples=examples,
        deadline=None,
        derandomize=False,
        suppress_health_check=[HealthCheck.too_slow],
    )

SLOW: list[Slow] = []
"""What the default set leaves out."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is slow; skip, with the reason, what runs Metal text where Metal itself is."""
    by_name = any("::" in argument for argument in config.args) or config.getoption("lf", False)
    if not by_name:  # Who asks for some tests of a file gets them.
        slow.mark(SLOW, items)
    skip = pytest.mark.skip(reason="the Metal runner is for Linux; here the kernels run for real")
    for item in items:
        if sys.platform == "darwin" and item.path.name.startswith("test_host_metal"):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the tests what a command has at a terminal, and nothing of what this user keeps.

    A shell's background job ignores Ctrl-C, and a program under ``nohup`` ignores SIGHUP. What a
    process ignores its children ignore too, and Python leaves it so.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLX_SINK_KERNEL", raising=False)
        patch.setenv("MLX_SINK_CACHE", str(tmp_path_factory.mktemp("verdicts")))
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Attend in blocks of the (indirect) parameter's size, so that a chunk has many."""
    monkeypatch.setattr("mlx_sink.attention.dispatch.BLOCK", request.param)
    return request.param
