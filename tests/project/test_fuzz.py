"""Wrong inputs of every kind, as `scripts/dev/fuzz_inputs.py` makes them by the thousand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

SCRIPT = ROOT / "scripts" / "dev" / "fuzz_inputs.py"


@pytest.mark.parametrize(("first", "cases"), [(0, 24), (1000, 240)])
def test_no_input_ends_in_a_traceback(first: int, cases: int):
    command = [sys.executable, str(SCRIPT), "--first", str(first), "--cases", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{cases} cases, 0 findings" in done.stdout


def test_a_finding_is_reported(tmp_path: Path):
    """With a command that raises in the place of `plan`."""
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import _checkout, fuzz_inputs\n"
        "from pathlib import Path\n"
        "from mlx_sink.commands import plan\n"
        "plan.main = lambda argv: 1 / 0\n"
        "try:\n"
        "    fuzz_inputs.run('plan', [], Path('.'))\n"
        "except ZeroDivisionError:\n"
        "    print('seen')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "seen\n", done.stderr
