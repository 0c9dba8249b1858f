"""Results from outside: either they can be shown, or one line says what is wrong with them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from made_up_results import values

from mlx_sink.commands import plots
from mlx_sink.commands.compare.page import notes, picture
from mlx_sink.commands.compare.panels import draw, panels, span_of
from mlx_sink.errors import InputError
from mlx_sink.measure.comparison.results import Results

NEVER: tuple[Any, ...] = ("\ud800", 1e40, float("nan"))
"""Values that stand nowhere in results."""

ODD: tuple[Any, ...] = (*NEVER, None, "$\\x$", -1, 0, True, [], {})


def small() -> dict[str, Any]:
    """Return the results of one method at one length."""
    result = values()
    result["lengths"] = result["lengths"][:1]
    ours = result["arms"]["ours"]
    result["arms"] = {"ours": ours | {"at": ours["at"][:1]}}
    result["recall"] = [score for score in result["recall"] if score["arm"] == "ours"][:1]
    beside = {"count": 9, "perplexity": 2.0, "recompute": 2.1}
    beside |= {"difference": -0.1, "low": -0.2, "high": 0.1}
    result["beside_recompute"] = {"ours": beside}
    return result


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value within a value."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def inside(value: Any, path: tuple[Any, ...]) -> Any:
    """Return what stands at a place."""
    for key in path:
        value = value[key]
    return value


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return results with another value at a place."""
    result = small()
    inside(result, path[:-1])[path[-1]] = copy.deepcopy(value)
    return result


def show(results: Results) -> None:
    """Draw every panel, and write the notes."""
    figure = plots.new_figure(4, 3)
    axes = figure.add_subplot()
    for panel in panels(results):
        axes.clear()
        draw(axes, panel, span_of([panel]))
    "".join(notes(results)).encode()


def test_they_are_read_as_they_were_written():
    whole = {**values(), "config": Results.from_dict(values()).to_dict()["config"]}
    assert Results.from_dict(values()).to_dict() == whole
    show(Results.from_dict(small()))


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_whatever_stands_there(odd: Any):
    """At every place in turn; what is accepted can be shown."""
    accepted: list[tuple[Any, ...]] = []
    for path in places(small()):
        with contextlib.suppress(InputError):
            results = Results.from_dict(changed(path, odd))
            accepted.append(path)
            show(results)
    if any(odd is never for never in NEVER):
        assert accepted == [("config", "capacity")]  # which is the sum of two others
    assert ("mlx_sink_compare",) not in accepted


def test_what_is_missing_is_named():
    """All but the settings, which have defaults, and what is there for some methods only."""
    optional = {("config", name) for name in ("num_sinks", "window", "capacity")}
    optional |= {("arms", "ours"), ("beside_recompute", "ours")}
    for path in places(small()):
        if path not in optional and isinstance(path[-1], str):
            result = small()
            del inside(result, path[:-1])[path[-1]]
            words = "no results" if path[-1] == "mlx_sink_compare" else rf"lacks .*{path[-1]}"
            with pytest.raises(InputError, match=words):
                Results.from_dict(result)


WRONG: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "no version": (("mlx_sink_compare",), None, "holds no results"),
    "another version": (("mlx_sink_compare",), 2, "of version 2: this one reads 1"),
    "unknown method": (("arms",), {"best": {"tokens": 1, "stopped": None, "at": []}}, "'best'"),
    "unknown method asked": (("recall", 0, "arm"), "best", "unknown method 'best'"),
    "unknown test": (("recall", 0, "test"), "haystack", "recall[0].test must be 'needle' or"),
    "no lengths": (("lengths",), [], "lengths must ascend"),
    "lengths go down": (("lengths",), [5, 4], "lengths must ascend, got [5, 4]"),
    "no question": (("recall", 0, "trials"), 0, "trials must be at least 1"),
    "more right than asked": (("recall", 0, "right"), 9, "right must be 0 to 8, got 9"),
    "endless loss": (("arms", "ours", "at", 0, "high"), 1e4, "high must be at most 700"),
    "window": (("config", "window"), 0, "config: window must be at least 1"),
}


def test_a_name_is_no_formula():
    """matplotlib reads what stands between dollars as one."""
    name = "$\\x$"
    results = Results.from_dict(changed(("model", "name"), name) | {"recall": small()["recall"]})
    score = replace(results.scores[0], place=name)
    figure = picture([replace(results, scores=(score,))] * 2)
    figure.draw_without_rendering()


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_shown_is_named(case: str):
    path, value, words = WRONG[case]
    with pytest.raises(InputError) as caught:
        Results.from_dict(changed(path, value))
    assert words in str(caught.value)
