"""What the README and the pages of docs tell people: their code, commands, links and paths.

A command is understood by what would parse it: the parser of the command or script itself.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from checkout import ROOT

from mlx_sink.commands import entry

PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_BEGINNING = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|mlx-sink|uv|pip|scripts/\w+)(?= |$)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:docs|examples|metal|mlx_sink|scripts|tests)/[\w./]*)`")
_NEEDS_TORCH = {"train_demo"}


class NotUnderstoodError(Exception):
    """A command that a page names does not exist, or does not take what it is given."""


def text_of(page: Path) -> str:
    """Return a page."""
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """Return a page's blocks of code in a language."""
    return [code for name, code in _BLOCK.findall(text_of(page)) if name == language]


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return _BLOCK.sub("", text_of(page))


def commands(page: Path) -> list[str]:
    """Return a page's commands: lines of shell blocks, after a ``$``, and those in its prose."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]
    indented = re.findall(r"^    (.+)$", prose(page), re.MULTILINE)
    lines += re.findall(r"^\$ (.+)$", "\n".join(blocks(page, "text")), re.MULTILINE)
    found = [line for line in lines if line.strip()]
    found += [s for s in [*spans, *indented] if _BEGINNING.match(s) and not (ROOT / s).is_dir()]
    return list(dict.fromkeys(" ".join(line.split()) for line in found))


def paths(page: Path) -> list[str]:
    """Return the files and folders of the checkout that a page's prose names."""
    return sorted(set(_PATH.findall(prose(page))))


def broken_links(page: Path) -> list[str]:
    """Return the links of a page that lead to no file, or to no heading of it."""
    broken: list[str] = []
    for link in _LINK.findall(" ".join(prose(page).split())):
        if link.startswith(("http://", "https://")):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append(link)
    return broken


def headings(page: Path) -> set[str]:
    """Return the names by which a page's headings are linked to, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def understand(line: str) -> None:
    """Do as a shell and a program would until the arguments are parsed, and no further.

    Raises:
        NotUnderstoodError: There is no such command, or it does not take these arguments.
    """
    words = shlex.split(line, comments=True)
    if ">" in words:
        if not (ROOT / words[words.index(">") + 1]).is_file():
            raise NotUnderstoodError(f"{line}: writes to no file of the checkout")
        words = words[: words.index(">")]
    while words and (re.match(r"[A-Z_]+=", words[0]) or words[0] in ("$", "command", "time")):
        words.pop(0)
        words = words[1:] if words[:1] == ["-v"] else words
    if words[:2] == ["uv", "run"]:
        words = words[2:]
    elif words[:2] == ["uv", "pip"]:
        words = words[1:]
    try:
        _program(words)
    except (NotUnderstoodError, SystemExit, SyntaxError, argparse.ArgumentError) as error:
        raise NotUnderstoodError(f"{line}: {error}") from None


def _program(words: list[str]) -> None:
    match words:
        case ["python", "-m", "mlx_sink", name, *arguments] | ["mlx-sink", name, *arguments]:
            _command(name, arguments)
        case ["python", "-m", name, *arguments] if name.startswith("mlx_sink."):
            _command(name.removeprefix("mlx_sink."), arguments)
        case ["python", "-c", code]:
            compile(code, "-c", "exec")
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.Import):
                    _ = [importlib.import_module(alias.name) for alias in node.names]
        case ["python", script, *arguments] if script.endswith(".py"):
            _script(ROOT / script, arguments)
        case ["scripts/demo", *arguments]:
            own = arguments[1:] if arguments[:1] == ["--real"] else arguments
            _parse(entry.command("generate").parser(), own)
        case ["scripts/test", *arguments]:
            script = ROOT / "scripts" / "test"
            if not os.access(script, os.X_OK):
                raise NotUnderstoodError(f"{script} cannot be run")
            _flags(script, arguments, others=_pytest_help())
        case ["pip", "install", package]:
            _package(package)
        case _:
            raise NotUnderstoodError("no such program")


def _command(name: str, arguments: Sequence[str]) -> None:
    if (name, arguments) == ("COMMAND", []):
        return
    if name not in entry.COMMANDS:
        raise NotUnderstoodError(f"no command {name!r}")
    parser = entry.command(name).parser()
    if arguments:  # Without any it is the command's name that a sentence mentions.
        _parse(parser, arguments)


def _script(path: Path, arguments: Sequence[str]) -> None:
    if not path.is_file():
        raise NotUnderstoodError(f"no file {path}")
    if path.stem in _NEEDS_TORCH:
        _flags(path, arguments)
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict("sys.modules", {path.stem: module}):
        spec.loader.exec_module(module)
    if not hasattr(module, "main"):
        if arguments:
            raise NotUnderstoodError("it takes no arguments")
        return
    parser = parser_of(module.main)
    parsed = _parse(parser, arguments) if arguments else None
    if rest := getattr(parsed, "command", None):
        _program(rest[1:] if rest[0] == "--" else rest)


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    # An abbreviated flag would work, and is a misspelt one here.
    parser.allow_abbrev = False
    return parser.parse_args(arguments)


def _flags(program: Path, arguments: Sequence[str], others: str = "") -> None:
    """Raise unless each flag stands in a program's text, or in that of others that get them."""
    known = set(re.findall(r"--[\w-]+", text_of(program) + others))
    for flag in (a.partition("=")[0] for a in arguments if a.startswith("-")):
        if flag not in known:
            raise NotUnderstoodError(f"{program.name} knows no {flag}")


@functools.cache
def _pytest_help() -> str:
    """Return pytest's options: what scripts/test does not know goes to it."""
    command = [sys.executable, "-m", "pytest", "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _package(package: str) -> None:
    """Raise unless a package is this one, with extras that it has."""
    found = re.fullmatch(r"(?:\.|mlx-sink)(?:\[([\w,-]+)\])?", package)
    if not found:
        raise NotUnderstoodError(f"{package} is not this package")
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    for extra in filter(None, (found[1] or "").split(",")):
        if extra not in project["optional-dependencies"]:
            raise NotUnderstoodError(f"the package has no extra {extra}")


class _Asked(Exception):  # noqa: N818 (it stops a script, nothing is wrong)
    """A script has made its parser and is about to parse."""


def parser_of(main: Callable[[Sequence[str]], object]) -> argparse.ArgumentParser:
    """Return the parser that a script's ``main`` parses its arguments with.

    Args:
        main: It is stopped before it does anything else.
    """

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Asked(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
        try:
            main([])
        except _Asked as asked:
            return asked.args[0]
    raise ValueError(f"{main} parses nothing")
