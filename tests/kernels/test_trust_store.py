"""The store of verdicts, which processes and threads use at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlx_sink.attention.kernels import trust
from mlx_sink.attention.kernels.trust import Verdict

GOOD = Verdict(True, 1e-6, "", 2.5)
BAD = Verdict(False, 0.5, "its results are off by 0.5")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "verdicts"
    monkeypatch.setenv(trust.FOLDER, str(folder))
    return folder


def never() -> Verdict:
    raise AssertionError("it was checked again")


def test_a_verdict_is_found_again(store: Path):
    for name, verdict in (("a", GOOD), ("b", BAD)):
        assert trust.verdict_of(name, lambda verdict=verdict: verdict) == verdict
        assert trust.verdict_of(name, never) == verdict
    assert trust.stored() == {"a": GOOD, "b": BAD}
    assert len(os.listdir(store)) == 2


def test_files_that_vanish_while_they_are_listed(store: Path, monkeypatch: pytest.MonkeyPatch):
    """Someone empties the cache folder while the doctor looks into it."""
    for name in ("a", "b"):
        trust.verdict_of(name, lambda: GOOD)
    plain = Path.read_text

    def read_and_lose(self: Path, *args: Any, **options: Any) -> str:
        text = plain(self, *args, **options)
        if self.parent == store:
            self.unlink()
        return text

    monkeypatch.setattr(Path, "read_text", read_and_lose)
    assert trust.stored() == {"a": GOOD, "b": GOOD}

    def lose(self: Path, *args: Any, **options: Any) -> str:
        # Of these files alone: whoever else reads one in this process keeps it.
        if self.parent == store:
            self.unlink()
        return plain(self, *args, **options)

    for name in ("a", "b"):
        trust.verdict_of(f"{name} again", lambda: GOOD)
    monkeypatch.setattr(Path, "read_text", lose)
    assert trust.stored() == {}
    assert not os.listdir(store)


FACTS: dict[str, Any] = {"passed": True, "error": 1e-6, "reason": "", "speedup": None}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"passed"',
        "null",
        "[" * 100_000,
        json.dumps({**FACTS, "passed": "false"}),
        json.dumps({**FACTS, "passed": 1}),
        json.dumps({**FACTS, "error": "small"}),
        json.dumps({**FACTS, "speedup": [2]}),
        json.dumps({**FACTS, "reason": None}),
        json.dumps({name: FACTS[name] for name in ("error", "reason")}),
    ],
)
def test_a_damaged_verdict_is_as_good_as_none(text: str, store: Path):
    trust.verdict_of("a", lambda: BAD)
    (path,) = store.iterdir()
    path.write_text(text)
    assert trust.stored() == {}
    assert trust.verdict_of("a", lambda: GOOD) == GOOD
    assert trust.stored() == {"a": GOOD}
