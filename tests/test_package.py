"""The package as a whole: who imports whom, how long a module is, what a wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mlx_sink

ROOT = Path(__file__).parent.parent
PACKAGE = Path(mlx_sink.__file__).parent
MODULES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py"})
"""All but the package's own ``__init__``, which names everything and imports it when asked."""
NAMES = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in MODULES]

LAYERS = [
    {"errors", "atomic"},
    {"config", "group", "lending", "store", "trees"},
    {"ring", "rope"},
    {"reference", "storage"},
    {"kernels"},
    {"attention"},
    {"cache"},
    {"aligned"},
    {"architectures", "layers", "report"},
    {"hook"},
    {"trace"},
    {"verify"},
    {"attach"},
    {"detokenize"},
    {"choice"},
    {"draft"},
    {"text", "loop"},
    {"session"},
    {"stream"},
]
"""Each module may import those of the sets before its own; every other module is a job."""

RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}

each_module = pytest.mark.parametrize(
    ("path", "name"), list(zip(MODULES, NAMES, strict=True)), ids=NAMES
)


def imports(path: Path) -> set[str]:
    """Return the full names of the modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """Return the modules of mlx_sink that a file imports, by the first name below it."""
    return {
        parts[1]
        for name in imports(path)
        if (parts := name.split("."))[0] == "mlx_sink" and len(parts) > 1
    }


@each_module
def test_imports_point_one_way(path: Path, name: str):
    """A low module that knows a high one can no longer be understood or tested alone."""
    module = name.split("/")[0]
    rank = RANKS.get(module, len(LAYERS))
    for other in own_imports(path) - {module}:
        # `from mlx_sink import report` names a module; other names come from __init__.
        assert (PACKAGE / f"{other}.py").exists() or (PACKAGE / other).is_dir(), other
        below = RANKS.get(other, len(LAYERS))
        assert below < rank or rank == len(LAYERS), f"{module} imports {other}"


@each_module
def test_who_may_know_mlx_and_mlx_lm(path: Path, name: str):
    """The integers know no arrays, and mlx-lm's moving protocol has one seam."""
    roots = {found.split(".")[0] for found in imports(path)}
    if name in {"errors", "config", "ring", "report"}:
        assert not roots & {"mlx", "mlx_lm", "numpy", "transformers"}
    is_low = RANKS.get(name.split("/")[0], len(LAYERS)) < RANKS["attach"] and name != "layers"
    if is_low or name == "cli":
        assert not roots & {"mlx_lm", "transformers"}


@each_module
def test_modules_stay_short(path: Path, name: str):
    """One concern a file: what outgrows this has two."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def fresh(code: str) -> str:
    """Run code in an interpreter of its own and return what it prints."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_package_imports_no_model_code():
    """`--help` and bad input must answer at once, and `python -m` must not load a module twice."""
    heavy = {"mlx", "mlx_lm", "transformers", "numpy", "mlx_sink.generate", "mlx_sink.attach"}
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
