"""What the README and the docs tell people to type works, and what they point to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import documented
import help_page
import pytest
from checkout import ROOT
from documented import PAGES, NotUnderstoodError, understand

import mlx_sink
from mlx_sink.commands.generate.command import main
from mlx_sink.models.architectures import REFUSED, VERIFIED
from mlx_sink.models.report import Report

README = ROOT / "README.md"
DOCS = ROOT / "docs"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PACKAGE = ROOT / "mlx_sink"
DEMO = PACKAGE / "models" / "demo"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_readme_fits_a_few_screens():
    text = documented.text_of(README)
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1000
    assert "infinite context" in "\n".join(text.splitlines()[:24])


EXAMPLES = [
    pytest.param(code, id=f"{page.name} {number}")
    for page in (README, *sorted(DOCS.glob("*.md")))
    for number, code in enumerate(documented.blocks(page, "python"), start=1)
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_python_examples_run(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Each by itself, on the demo model; what they print is not what this page would be about."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_there_are_examples():
    assert len(documented.blocks(README, "python")) == 1
    assert len(documented.blocks(README, "python")[0].splitlines()) <= 13
    assert len(documented.blocks(DOCS / "python.md", "python")) >= 5


@pytest.mark.skipif(sys.platform == "darwin", reason="there the kernels run for real")
def test_the_kernel_example_runs():
    """In a process of its own, as it replaces MLX's own function."""
    (code,) = documented.blocks(CONTRIBUTING, "python")
    runner = find_spec("host_metal")
    assert runner is not None
    assert runner.origin is not None
    folder = str(Path(runner.origin).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), folder])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    error, report = done.stdout.split("\n", 1)
    assert float(error) < 4e-3
    assert "loaded" in report


@each_page
def test_commands_are_understood(page: Path):
    """By the parsers of the commands and scripts themselves: every flag, every value."""
    for line in documented.commands(page):
        understand(line)


def test_there_are_commands():
    pages = {page.name: documented.commands(page) for page in PAGES}
    assert all(len(pages[f"{name}.md"]) >= 3 for name in ("README", "generate", "results"))
    lines = [line for commands in pages.values() for line in commands]
    assert len(lines) > 40
    for name in ("generate", "convert", "plan", "compare", "doctor"):
        assert any(f"-m mlx_sink.{name}" in line for line in lines)


@pytest.mark.parametrize(
    "line",
    [
        "python -m mlx_sink.generate --promt x",
        "python -m mlx_sink.generate --max-token 3",
        "python -m mlx_sink.generate --max-tokens many",
        "python -m mlx_sink.gennerate --prompt x",
        "python -m mlx_sink plann",
        "mlx-sink plan --modle demo",
        "uv run python -m mlx_sink.convert --hf-path demo --quantise",
        "python -m mlx_sink.convert --mlx-path no-source",
        "python -m mlx_sink.compare --arms mine",
        "python scripts/bench/soak.py --tokens 100",
        "python scripts/bench/bench_stream.py --section reading",
        "LD_PRELOAD=x python scripts/bench/bench_streams.py",
        "python scripts/bench/watch_memory.py -- python -m mlx_sink.generate --windows 3",
        "python scripts/dev/train_demo.py --minute 3",
        "python scripts/dev/models_table.py > docs/model.md",
        "python scripts/dev/models_table.py --all",
        "python examples/chat_server.py --prot 80",
        "python -c 'import mlx_sink.plans'",
        "scripts/demo --sead 3",
        "scripts/test --al",
        "scripts/tests",
        "pip install '.[plots]'",
        "pip install mlx-sinks",
        "make install",
    ],
)
def test_what_is_misspelt_is_noticed(line: str):
    with pytest.raises((NotUnderstoodError, ModuleNotFoundError)):
        understand(line)


@each_page
def test_links_lead_somewhere(page: Path):
    assert documented.broken_links(page) == []


def test_a_broken_link_is_noticed(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Some title\n[a](b.md) [c](#some-title) [d](#other) [e](page.md#some-title)\n"
    )
    assert documented.broken_links(page) == ["b.md", "#other"]


@each_page
def test_named_files_are_there(page: Path):
    missing = [name for name in documented.paths(page) if not (ROOT / name).exists()]
    assert missing == []
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"`(test_\w+\.py)`", documented.prose(page))) <= tests


def test_the_options_page_is_up_to_date():
    """`python scripts/dev/help_page.py > docs/help.md` writes it."""
    assert documented.text_of(DOCS / "help.md") == help_page.page()


def test_the_table_of_packages_is_that_of_the_folders():
    """A row for every folder and module of the package, none for another; what it names exists."""
    text = documented.text_of(DOCS / "architecture.md")
    rows = re.findall(r"^\| (`[a-z_/]+`|doors) \|.*\|(.*)\|$", text, re.MULTILINE)
    table = {name.strip("`"): re.findall(r"`(\w+)`", modules) for name, modules in rows}
    assert len(table) == len(rows) >= 9
    assert table.pop("doors") == []
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    files = {PACKAGE / "errors.py", PACKAGE / "config.py"}
    names = {p.relative_to(PACKAGE).with_suffix("").as_posix() for p in folders | files}
    assert set(table) == names
    for name, modules in table.items():
        for module in modules:
            assert (PACKAGE / name / f"{module}.py").is_file(), f"{name}/{module}"


def test_the_doors_are_those_of_the_table():
    text = documented.text_of(DOCS / "architecture.md")
    (row,) = re.findall(r"^\| doors \| (.*?): ", text, re.MULTILINE)
    doors = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "errors", "config"}
    assert set(re.findall(r"`(\w+)`", row)) == doors


def test_what_the_readme_says_of_models_is_so():
    text = " ".join(documented.text_of(README).split())
    total = len(VERIFIED) + len(REFUSED)
    models = documented.text_of(DOCS / "models.md")
    attending = len(VERIFIED) - models.count("| it has no attention |")
    assert f"{len(VERIFIED)} of the {total} architectures" in text
    assert f"{attending} of them with attention that is bounded" in text


def test_reports_in_the_docs_look_as_reports_do():
    """The tables that the pages show have the columns of today's."""
    _, _, report = mlx_sink.load("demo", return_report=True)
    assert isinstance(report, Report)
    header = str(report).splitlines()[2]
    shown = [line for page in PAGES for line in documented.text_of(page).splitlines()]
    headers = [line for line in shown if line.lstrip().startswith("layers  cache")]
    assert len(headers) >= 3
    assert set(headers) == {header}


def test_the_model_inside_is_small():
    """8 MB at most, all of it: it rides along in every wheel."""
    assert sum(f.stat().st_size for f in DEMO.iterdir()) <= 8e6


def test_the_first_command_needs_nothing(capsys: pytest.CaptureFixture[str]):
    """No model, no prompt, no network: text, and how to go on from there."""
    assert main(["--max-tokens", "40", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.split()) > 10
    assert "--model" in captured.err


def test_the_demo_reads_the_story_past_its_window(capsys: pytest.CaptureFixture[str]):
    story = DEMO / "story.txt"
    argv = ["--prompt-file", str(story), "--window", "124", "--max-tokens", "20", "--ignore-eos"]
    assert main(argv) == 0
    assert "4 sinks + window 124" in capsys.readouterr().err


def test_the_demo_starts_every_text_with_its_sink():
    """It was trained with <s> at the start of every sequence: that token is its sink."""
    _, tokenizer = mlx_sink.load("demo")
    tokens = tokenizer.encode("Once upon a time")
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens[1:]) == "Once upon a time"
