"""Settings for the tests that need PyTorch; the helpers are those of tests/."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# A stray download would hang a machine without a network, and no test needs one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
