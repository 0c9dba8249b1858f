"""However the tests are started, and by whom, a test finds the same signals, folders, switches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEFAULTS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGQUIT: signal.SIG_DFL,
}
ASK = f"import signal; print(*[repr(signal.getsignal(n)) for n in {[int(n) for n in DEFAULTS]}])"


def test_as_at_a_terminal():
    assert {number: signal.getsignal(number) for number in DEFAULTS} == DEFAULTS
    child = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    assert child.stdout.count("SIG_IGN") == 0
    assert "default_int_handler" in child.stdout


def test_in_the_background_too():
    """As ``nohup scripts/test &`` starts them."""
    tests = [sys.executable, "-m", "pytest", __file__, "-q", "-n", "0", "-k", "terminal"]
    tests += ["-p", "no:cacheprovider"]
    shell = ["sh", "-c", "trap '' INT TERM HUP QUIT; exec \"$@\"", "sh", *tests]
    done = subprocess.run(shell, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_what_this_user_keeps_is_left_alone(tmp_path_factory: pytest.TempPathFactory):
    """No verdict on a kernel is read from the user's folder, or written into it."""
    from mlx_sink.attention.kernels import trust

    assert trust.folder().is_relative_to(tmp_path_factory.getbasetemp())
    assert trust.SWITCH not in os.environ
