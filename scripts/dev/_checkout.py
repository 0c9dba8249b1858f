"""Import this first for what the tests have and scripts use: the runner, its cases, tiny models.

It puts this checkout and what its tests share at the head of the path.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").is_file())
TESTS = ROOT / "tests"
sys.path[:0] = [str(ROOT), str(TESTS / "support")]
