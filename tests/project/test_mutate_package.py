"""``scripts/dev/mutate_package.py``: a mistake is one, in one place; the rates are what ran."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import mutate_package
import pytest
from mutate_package import mutations

MISTAKES = {
    "a < b": {"(a <= b)"},
    "a is not None": {"(a is None)"},
    "a == b != c": {"(a != b != c)", "(a == b == c)"},
    "a + b * c": {"(a - b * c)"},
    "a and b or c": {"(a or b) or c", "((a and b) and c)"},
    "not a": {"(a)"},
    "f(True)": {"f((False))"},
    "x[2]": {"x[(3)]", "x[(1)]"},
    "# é\nä = 'ö' if b > 'ü' else c": {"# é\nä = 'ö' if (b >= 'ü') else c"},
    "f(\n    a,\n    not b,\n)": {"f(\n    a,\n    (b),\n)"},
    "zip(a, b, strict=True)": set(),
    "x: Literal[3] = y": set(),
    "@dataclass(slots=False)\nclass A:\n    'not 3'": set(),
    "raise ValueError(f'{n + 1} and {m}')": set(),
}


@pytest.mark.parametrize(("text", "expected"), MISTAKES.items())
def test_mistakes(text: str, expected: set[str], tmp_path: Path):
    module = tmp_path / "module.py"
    module.write_text(text, encoding="utf-8")
    made = [mutation.applied(module.read_bytes()).decode() for mutation in mutations(module)]
    assert set(made) == expected
    assert all(ast.dump(ast.parse(one)) != ast.dump(ast.parse(text)) for one in made)


def test_what_concerns_a_module_comes_nearest_first():
    modules = {path.stem: path for path in mutate_package.PACKAGE.rglob("*.py")}
    for name in ("ring", "rope", "session"):
        tests = [path.stem for path in mutate_package.concerned(modules[name])]
        assert tests[0] == f"test_{name}"
        assert mutate_package.FEWEST <= len(tests) <= mutate_package.MOST


@pytest.mark.parametrize("name", mutate_package.MODULES)
def test_every_module_is_there_and_can_be_mistaken(name: str):
    (module,) = mutate_package.PACKAGE.rglob(f"{name}.py")
    assert mutations(module)
    assert mutate_package.concerned(module)


def test_what_the_tests_notice_and_what_they_cannot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A real run, of one mistake and of one that is none."""
    (config,) = mutate_package.PACKAGE.rglob("config.py")
    (real,) = [m for m in mutations(config) if m.good == "self.epoch < self.slots"]
    chosen = [real, replace(real, bad=real.good)]
    file = mutate_package.concerned(config)[0]
    monkeypatch.setattr(mutate_package, "mutations", lambda _: chosen)
    monkeypatch.setattr(mutate_package, "concerned", lambda _: [file])
    assert mutate_package.main(["--modules", "config"]) == 0
    out = capsys.readouterr().out
    assert out.count("killed by") == out.count("SURVIVED") == 1
    assert re.search(r"killed by \S*test_config.py", out)
    assert "all tests:   1 of 2 (50%; 95% interval 9% to 91%)" in out
