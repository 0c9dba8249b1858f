"""Dataclasses to JSON and back: whatever the JSON holds, the answer is a record or one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from mlx_sink.config import SinkConfig
from mlx_sink.errors import InputError
from mlx_sink.io import records


@dataclass(frozen=True, slots=True)
class Inner:
    since: int = field(metadata={"key": "from"})
    name: str


@dataclass(frozen=True, slots=True)
class Outer:
    number: float
    flag: bool
    maybe: int | None
    inner: Inner
    many: tuple[Inner, ...]
    named: Mapping[str, tuple[float, ...]]
    config: SinkConfig
    new: int = 7


VALUES: dict[str, Any] = {
    "number": 1,
    "flag": True,
    "maybe": None,
    "inner": {"from": 3, "name": "ä"},
    "many": [{"from": 4, "name": ""}],
    "named": {"a": [1.5, 2]},
    "config": SinkConfig(2, 9).to_dict(),
}


def test_there_and_back():
    record = records.from_dict(Outer, VALUES)
    assert record.inner == Inner(3, "ä")
    assert record.many == (Inner(4, ""),)
    assert record.named == {"a": (1.5, 2)}
    assert record.config == SinkConfig(2, 9)
    assert record.new == 7
    assert records.to_dict(record) == VALUES | {"new": 7}
    assert json.loads(json.dumps(records.to_dict(record))) == VALUES | {"new": 7}


def test_keys_of_later_versions_are_passed_over():
    assert records.from_dict(Outer, VALUES | {"later": [1]}) == records.from_dict(Outer, VALUES)


WRONG: dict[str, tuple[Any, str]] = {
    "number": (float("nan"), "number must be a number, got nan"),
    "flag": (1, "flag must be true or false, got 1"),
    "maybe": (True, "maybe must be an integer, got True"),
    "inner": ([], "inner must be an object, got a list"),
    "many": (
        [{"from": 1, "name": "x"}, {"from": 1.0, "name": "x"}],
        "many[1].from must be an int",
    ),
    "named": ({"a": [1, "2"]}, "named.a[1] must be a number, got '2'"),
    "config": ({"window": 0}, "config: window must be at least 1, got 0"),
    "new": (10**30, "new must be an integer, got 1000"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_by_its_place(name: str):
    value, words = WRONG[name]
    with pytest.raises(InputError) as caught:
        records.from_dict(Outer, VALUES | {name: value})
    assert str(caught.value).startswith(words)


def test_what_is_missing_is_named():
    with pytest.raises(InputError, match=r"it lacks inner\.name"):
        records.from_dict(Outer, VALUES | {"inner": {"from": 1}})
    with pytest.raises(InputError, match="it must be an object, got a list"):
        records.from_dict(Outer, [])


@pytest.mark.parametrize("value", [1e300, -1e300, float("inf"), "\ud800"])
def test_what_cannot_be_used_later_is_refused(value: Any):
    key = "name" if isinstance(value, str) else "from"
    with pytest.raises(InputError):
        records.from_dict(Inner, {"from": 1, "name": "x", key: value})
    with pytest.raises(InputError):
        records.from_dict(Outer, VALUES | {"number": value})
