"""Plant single mistakes in the package, one at a time, and count how many the tests notice.

    python scripts/dev/mutate_package.py --mutations 40 --seed 0 --minutes 60

A mistake is a comparison, an integer, a sign, an ``and`` or ``or``, a ``not`` or a truth value
that is another one. They are drawn at random from the modules that hold the state and the
arithmetic. Each goes into a copy of the package, and the default set of the tests that concern its
module runs on that until one fails; where none does, all tests of these files run. Both rates are
printed, each with its 95% interval. A mistake that changes nothing counts as survived, and so the
rates are lower bounds.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import _checkout

import mlx_sink
from mlx_sink.commands.compare.panels import wilson

PACKAGE = _checkout.ROOT / "mlx_sink"
MODULES = shlex.split("""
    aligned budget checkpoint detokenize dispatch group hook kv_sharing loop reference ring rope
    sampler session settings sink_cache speculative storage stream tensors
""")
"""What is drawn from: what is wrong in these is wrong in every stream."""
FEWEST, MOST = 5, 12
"""Test files that a module is tried with."""
SECONDS = 900
"""Of processor time, after which a run counts as failed: the mistake made something endless."""
UNNOTICEABLE = {"frozen", "slots", "strict", "stacklevel", "check", "encoding"}
"""Arguments that no result depends on while the program is right."""


@dataclass(frozen=True)
class Mutation:
    """A mistake.

    Attributes:
        module: The file of the package that it goes into.
        line: The first line of what it changes.
        span: Where that is in the file, in bytes.
        good: What stands there.
        bad: What takes its place.
    """

    module: Path
    line: int
    span: tuple[int, int]
    good: str
    bad: str

    def applied(self, text: bytes) -> bytes:
        """Return the file's text with the mistake."""
        first, last = self.span
        return text[:first] + f"({self.bad})".encode() + text[last:]

    def __str__(self) -> str:
        """Say where it is and what it changes."""
        name = self.module.relative_to(PACKAGE)
        return f"{name}:{self.line}: {' '.join(self.good.split())}  ->  {self.bad}"


_OTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def mistakes(node: ast.AST) -> list[ast.expr]:
    """Return what could stand in an expression's place by mistake."""
    match node:
        case ast.Compare(left, ops, comparators):
            changed = [[*ops[:i], _OTHER[type(op)](), *ops[i + 1 :]] for i, op in enumerate(ops)]
            return [ast.Compare(left, ops, comparators) for ops in changed]
        case ast.BinOp(left, ast.Add() | ast.Sub() as op, right):
            return [ast.BinOp(left, _OTHER[type(op)](), right)]
        case ast.BoolOp(op, values):
            return [ast.BoolOp(_OTHER[type(op)](), values)]
        case ast.UnaryOp(ast.Not(), operand):
            return [operand]
        case ast.Constant(bool(value)):
            return [ast.Constant(not value)]
        case ast.Constant(int(value)):
            return [ast.Constant(value + 1), ast.Constant(value - 1)]
        case _:
            return []


def _expressions(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the expressions that are computed: no annotations, no decorators, no messages."""
    if isinstance(node, ast.JoinedStr | ast.Raise):
        return
    if isinstance(node, ast.keyword) and node.arg in UNNOTICEABLE:
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name not in {"annotation", "returns", "decorator_list"}:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _expressions(child)


def mutations(module: Path) -> list[Mutation]:
    """Return every mistake that can be planted in a module."""
    text = module.read_bytes()
    begins = [0]
    for line in text.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    out: list[Mutation] = []
    for node in _expressions(ast.parse(text)):
        for wrong in mistakes(node):
            assert isinstance(node, ast.expr)
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            first = begins[node.lineno - 1] + node.col_offset
            last = begins[node.end_lineno - 1] + node.end_col_offset
            good, bad = text[first:last].decode(), ast.unparse(ast.fix_missing_locations(wrong))
            out.append(Mutation(module, node.lineno, (first, last), good, bad))
    return out


@cache
def _named(file: Path) -> frozenset[Path]:
    """Return the files of the package, and of the tests' helpers, that a file names."""
    text = file.read_text(encoding="utf-8")
    names = set(re.findall(r"\bmlx_sink(?:\.\w+)+", text))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    for name in [name for name in names if name.startswith("mlx_sink.")]:
        public = name.split(".")[1]
        if public in mlx_sink.__all__:
            names.add(getattr(mlx_sink, public).__module__)
    return frozenset(path for name in names for path in _files(name))


@cache
def _files(name: str) -> list[Path]:
    """Return the files that a dotted name may be: a module, or a module and a name in it."""
    parts = name.split(".")
    if parts[0] != "mlx_sink":
        return list(_checkout.TESTS.rglob(f"{parts[0]}.py"))
    paths = (
        PACKAGE.joinpath(*parts[1:end]).with_suffix(".py") for end in range(2, len(parts) + 1)
    )
    return [path for path in paths if path.is_file()]


def concerned(module: Path) -> list[Path]:
    """Return the test files to try a module's mistakes with, the nearest first.

    Near are those that are called after it; then those that name it, or name what names it. Those
    that need PyTorch are left out.
    """
    distances: dict[Path, int] = {}
    for test in set(_checkout.TESTS.rglob("test_*.py")) - set(_checkout.TESTS.glob("pytorch/*")):
        seen, edge, steps = {test}, {test}, 0
        while edge and module not in edge:
            edge = {path for file in edge for path in _named(file)} - seen
            seen, steps = seen | edge, steps + 1
        if edge:
            distances[test] = 0 if f"_{module.stem}_" in f"{test.stem}_" else steps
    near = sorted(distances, key=lambda test: (distances[test], test.name))
    direct = sum(distances[test] <= 1 for test in near)
    return near[: min(max(direct, FEWEST), MOST)]


def first_failure(scratch: Path, tests: Sequence[str], *options: str) -> str | None:
    """Run tests on the package in a folder until one fails; return its name, or None."""
    command = [sys.executable, "-m", "pytest", "-c", str(_checkout.ROOT / "pyproject.toml")]
    command += ["-x", "-q", "-n", "0", "--tb=no", "-rfE", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, *options, *tests],
            capture_output=True,
            text=True,
            cwd=scratch,
            env=environment,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS)),
            timeout=4 * SECONDS,  # What waits for ever takes no processor time.
        )
    except subprocess.TimeoutExpired:
        return "no end"
    if done.returncode in (0, 5):
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return failed[1] if failed else f"pytest ended with {done.returncode}: {done.stdout[-300:]}"


@dataclass
class Outcome:
    """What became of a mistake: the first test of each set that noticed it."""

    mutation: Mutation
    default: str | None
    all: str | None


def tried(mutation: Mutation, scratch: Path, sound: set[str]) -> Outcome:
    """Plant a mistake in the copy of the package, run the tests, and take it out again.

    Args:
        mutation: The mistake.
        scratch: The folder that holds the copy.
        sound: Tests that are known to pass without a mistake; grows.

    Raises:
        SystemExit: A test fails without a mistake too, and so says nothing.
    """
    copy = scratch / mutation.module.relative_to(_checkout.ROOT)
    text = copy.read_bytes()
    tests = [str(path) for path in concerned(mutation.module)]
    copy.write_bytes(mutation.applied(text))
    try:
        default = first_failure(scratch, tests)
        every = default or first_failure(scratch, tests, "-m", "", "--hypothesis-profile=ci")
    finally:
        copy.write_bytes(text)
    if every and every not in sound and every.partition("::")[0].endswith(".py"):
        # A file that cannot be imported has no test to name.
        options = ["-m", ""] if "::" in every else ["--collect-only"]
        if first_failure(scratch, [every], *options):
            raise SystemExit(f"{every} fails without a mistake too")
        sound.add(every)
    return Outcome(mutation, default, every)


def rate(killed: int, of: int) -> str:
    """Return a rate with its interval, for people."""
    low, high = wilson(killed, of)
    return f"{killed} of {of} ({killed / of:.0%}; 95% interval {low:.0%} to {high:.0%})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=40, help="how many (40)")
    parser.add_argument("--seed", type=int, default=0, help="which are drawn (0)")
    parser.add_argument("--minutes", type=float, default=60, help="begin none after these (60)")
    parser.add_argument("--modules", nargs="+", default=MODULES, help="names of modules")
    parser.add_argument("--list", action="store_true", help="say what is drawn, run nothing")
    given = parser.parse_args(arguments)
    modules = {path.stem: path for path in sorted(PACKAGE.rglob("*.py"))}
    if unknown := set(given.modules) - set(modules):
        parser.error(f"no module of the package is called {', '.join(sorted(unknown))}")
    possible = [m for name in given.modules for m in mutations(modules[name])]
    drawn = random.Random(given.seed).sample(possible, min(given.mutations, len(possible)))
    if given.list:
        print(*drawn, sep="\n")
        return 0
    end = time.monotonic() + 60 * given.minutes
    outcomes: list[Outcome] = []
    sound: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("mlx_sink", "metal"):
            shutil.copytree(_checkout.ROOT / name, Path(folder, name))
        for number, mutation in enumerate(drawn, start=1):
            if time.monotonic() > end:
                print(f"time is up after {len(outcomes)} of {len(drawn)}")
                break
            began = time.monotonic()
            outcome = tried(mutation, Path(folder), sound)
            outcomes.append(outcome)
            by = f"killed by {outcome.all}" if outcome.all else "SURVIVED"
            late = ", not in the default set" if outcome.all and not outcome.default else ""
            print(f"{number:3}/{len(drawn)} {mutation}", flush=True)
            print(f"        {by}{late} ({time.monotonic() - began:.0f} s)", flush=True)
    if outcomes:
        count = len(outcomes)
        print("default set:", rate(sum(o.default is not None for o in outcomes), count))
        print("all tests:  ", rate(sum(o.all is not None for o in outcomes), count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
