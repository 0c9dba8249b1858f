"""Write docs/help.md: every option of every command, from the commands' own parsers.

    python scripts/dev/help_page.py > docs/help.md

A test checks that the page is up to date. `--help` says the same at the terminal; the page is made
from the options themselves, because the layout of `--help` differs between versions of Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mlx_sink.commands import entry

HEAD = """# Options of every command

Written by `python scripts/dev/help_page.py > docs/help.md` from what `--help` prints; a test
checks that it is up to date. `python -m mlx_sink COMMAND` and `mlx-sink COMMAND` take the same
options as `python -m mlx_sink.COMMAND`.
"""


def section(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the lines of one command."""
    formatter = parser._get_formatter()
    yield from ("", f"## {name}", "", f"`python -m mlx_sink.{name}`", "", f"{parser.description}")
    for group in parser._mutually_exclusive_groups:
        names = " or ".join(f"`{action.option_strings[0]}`" for action in group._group_actions)
        yield from ("", f"Only one: {names}.")
    yield from ("", "| option | what |", "|---|---|")
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        metavar = formatter._get_default_metavar_for_optional(action)
        values = "" if action.nargs == 0 else " " + formatter._format_args(action, metavar)
        first, *others = action.option_strings
        names = ", ".join(f"`{name}`" for name in [first + values, *others])
        text = formatter._expand_help(action) if action.help else ""
        yield "| {} | {} |".format(*(cell.replace("|", r"\|") for cell in (names, text)))


def page() -> str:
    """Return the page."""
    lines = [
        line for name in entry.COMMANDS for line in section(name, entry.command(name).parser())
    ]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
