"""Each mistake that ``scripts/dev/mutate_kernel.py`` plants is noticed by the test that it names.

pytest runs within pytest here: what notices a mistake is the very test that passes without it.
"""

from __future__ import annotations

from dataclasses import replace

import mutate_kernel
import pytest
from mutate_kernel import MUTATIONS, Mutation


def test_there_are_many_and_no_two_are_one():
    assert len({m.what for m in MUTATIONS}) == len(MUTATIONS) >= 15


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what)
def test_killed(mutation: Mutation):
    outcome = mutate_kernel.outcome_of(mutation, mutation.tests)
    assert outcome.kills(mutation), f"{outcome.failed or 'nothing failed'}: {outcome.reason}"


def test_a_survivor_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A change that is no mistake survives, and so does one that is noticed for another reason."""
    harmless = Mutation("none", "decode", "int live = 0;", "int live = 0 + 0;", "any_number")
    noticed = next(m for m in MUTATIONS if m.kind == "unwritten-output")
    chosen = [harmless, noticed, replace(noticed, kind="race")]
    monkeypatch.setattr(mutate_kernel, "MUTATIONS", chosen)
    assert mutate_kernel.main([]) == 1
    said = capsys.readouterr().out
    assert said.count("SURVIVED") == 2
    assert "1 of 3 killed" in said


def test_a_machine_on_which_all_fails_kills_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("host_metal.kernel.HostKernel.__call__", None)
    monkeypatch.setattr(mutate_kernel, "MUTATIONS", MUTATIONS[:1])
    assert mutate_kernel.main([]) == 1
    assert "the text as it is fails test_" in capsys.readouterr().out


def test_a_text_that_has_changed_is_named():
    with pytest.raises(ValueError, match="decode: not exactly once in the text: no such text"):
        Mutation("none", "decode", "no such text", "", "").applied("other text")


def test_the_list(capsys: pytest.CaptureFixture[str]):
    assert mutate_kernel.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(MUTATIONS)
