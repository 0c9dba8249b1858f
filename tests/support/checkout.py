"""Where the checkout is that these tests lie in, however deep: each path in it begins here."""

from __future__ import annotations

from pathlib import Path

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").is_file())
