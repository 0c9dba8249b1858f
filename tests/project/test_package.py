"""The package as a whole: who imports whom, how its folders look, what a wheel holds."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT

import mlx_sink

PACKAGE = Path(mlx_sink.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES})

MAX_LINES = 350
MAX_MODULES = 12
GONE = {
    *("arguments", "arms", "asked", "calibration_files", "choice", "cli", "draft"),
    *("files", "functions", "lending", "planning", "prefillcheck", "randomness"),
    *("recipe", "runner", "sampling", "selfcheck", "skeleton", "store", "summary"),
    *("trees", "trial", "turns", "work", "writing"),
}
"""Names that said nothing, or three things; a module that needs one needs a better one."""


def test_modules_stay_short():
    """One concern a file: what outgrows this has two."""
    lines = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in MODULES}
    assert not {str(p): n for p, n in lines.items() if n > MAX_LINES}


def test_folders_can_be_overlooked():
    counts = {f: sum(p.parent == f and p.name != "__init__.py" for p in MODULES) for f in FOLDERS}
    assert not {str(folder): n for folder, n in counts.items() if n > MAX_MODULES}
    assert not {p.stem for p in MODULES} & GONE


def test_every_folder_says_what_it_is_for():
    for folder in FOLDERS:
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), folder


PLANTED = {
    "an upward import": (
        "io/units.py",
        "from mlx_sink.stream import loop",
        "Packages point one way",
    ),
    "a new package": ("batching/__init__.py", '"""New."""', "Packages point one way"),
    "mlx-lm in attention": ("attention/ring.py", "import mlx_lm", "mlx-lm has few doors"),
    "arrays in the integers": ("attention/ring.py", "import numpy", "Integers know no arrays"),
    "a door": ("measure/losses.py", "import mlx_sink.plan", "Nobody imports a door"),
    "a cycle in attention": (
        "attention/rope.py",
        "from mlx_sink.attention import dispatch",
        "Attention, bottom up",
    ),
}


def lint_imports(root: Path) -> tuple[int, str]:
    """Check the import rules of a checkout."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, "--no-cache"], cwd=root, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("what", PLANTED)
def test_the_import_rules_notice(what: str, tmp_path: Path):
    """Each rule fails, and says where, when its kind of mistake is planted in a copy."""
    name, line, rule = PLANTED[what]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(PACKAGE, tmp_path / "mlx_sink", ignore=ignored)
    file = tmp_path / "mlx_sink" / name
    file.parent.mkdir(exist_ok=True)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    file.write_text(f"{text}\n{line}\n", encoding="utf-8")
    status, said = lint_imports(tmp_path)
    assert status == 1
    assert f"{rule} BROKEN" in " ".join(said.split()) or "batching" in said, said
    assert name.split("/")[0] in said


def test_the_import_rules_hold():
    status, said = lint_imports(ROOT)
    assert status == 0, said


def fresh(code: str) -> str:
    """Run code in an interpreter of its own and return what it prints."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_package_imports_no_model_code():
    """`--help` and bad input must answer at once, and `python -m` must not load a module twice."""
    heavy = {"mlx", "mlx_lm", "transformers", "numpy", "mlx_sink.generate", "mlx_sink.models"}
    loaded = fresh("import mlx_sink; print(*sys.modules)").split()
    assert "mlx_sink" in loaded
    assert not heavy & set(loaded)


def test_settings_need_no_arrays():
    loaded = fresh("from mlx_sink import SinkConfig; SinkConfig(); print(*sys.modules)").split()
    assert "mlx_sink.config" in loaded
    assert not {"mlx", "numpy"} & set(loaded)


def test_public_names():
    """Every name that the package promises must be there, and nothing else."""
    for name in mlx_sink.__all__:
        assert getattr(mlx_sink, name).__name__ == name
    assert set(mlx_sink.__all__) <= set(dir(mlx_sink))
    assert mlx_sink.__all__ == sorted(mlx_sink.__all__)
    with pytest.raises(AttributeError, match="module 'mlx_sink' has no attribute 'nothing'"):
        _ = mlx_sink.nothing


def test_the_budget_is_an_attribute_of_the_package():
    """After ``import mlx_sink`` alone, as docs/python.md has it."""
    code = "import mlx_sink; print('budget' in dir(mlx_sink), mlx_sink.budget.plan.__module__)"
    assert fresh(code) == "True mlx_sink.measure.budget"


def test_what_a_program_imports_from_the_door_of_convert():
    """The function and its arguments' types, and nothing that the door does not promise."""
    code = (
        "from mlx_sink.convert import Converted, Recipe, Text, convert; print(convert.__module__)"
    )
    assert fresh(code) == "mlx_sink.commands.convert.convert"
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from mlx_sink.convert import nothing")


def test_the_version_is_said_once_more_in_the_metadata():
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert metadata["project"]["version"] == mlx_sink.__version__


def test_a_wheel_holds_everything(tmp_path: Path):
    """An installed copy must find its kernel text and its model without the repository."""
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    (built,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    held = set(zipfile.ZipFile(built).namelist())
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {f"mlx_sink/{path.relative_to(PACKAGE).as_posix()}" for path in files}
    metal = [path for path in (ROOT / "metal").rglob("*") if path.is_file()]
    expected |= {f"mlx_sink/{path.relative_to(ROOT).as_posix()}" for path in metal}
    assert metal
    assert not expected - held
    inside = {name for name in held if ".dist-info/" not in name}
    assert all(name.startswith("mlx_sink/") for name in inside)
