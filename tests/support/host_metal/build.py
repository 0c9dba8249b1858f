"""Compile a kernel's unit with g++ into a runner; everything compiled is kept by its content."""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checkout import ROOT

from .errors import TextError, ToolError
from .text import Place

CPP = Path(__file__).parent / "cpp"

# One rounding per operation, as Metal has it, and no more knowledge than a GPU compiler has.
# Kernels are instrumented at -O1: vectorised loads would pass the hooks by.
_SANITIZERS = (
    "bounds,alignment,object-size,integer-divide-by-zero,signed-integer-overflow,"
    "shift,float-cast-overflow,return,unreachable"
)
_KERNEL_FLAGS = [
    *("-std=gnu++17", "-O1", "-g1", "-w", "-c", "-fno-pie", "-fno-exceptions", "-fno-rtti"),
    *("-fsigned-char", "-fsingle-precision-constant", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-strict-aliasing", "-fno-finite-loops", "-fno-tree-vectorize"),
    *("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"),
    *(f"-fsanitize={_SANITIZERS}", "-ftrivial-auto-var-init=pattern"),
]
# swapcontext-based fibers, for other processors; here for the test of that path.
_UCONTEXT = "HOST_METAL_UCONTEXT"


def cache_folder() -> Path:
    """Where compiled kernels are kept: $HOST_METAL_CACHE, or a folder in this checkout."""
    folder = Path(os.environ.get("HOST_METAL_CACHE") or ROOT / ".cache" / "host_metal")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@functools.cache
def compiler() -> str:
    """The C++ compiler, $CXX or g++.

    Raises:
        ToolError: There is none, or it is not g++ 12 or later on Linux.
    """
    command = os.environ.get("CXX", "g++")
    found = shutil.which(command)
    if platform.system() != "Linux" or not found:
        raise ToolError(f"host_metal needs g++ 12 or later on Linux; '{command}' is not that")
    version = _version(found)
    number = re.search(r"\b(\d+)\.\d+\.\d+", version)
    if "clang" in version or not number or int(number[1]) < 12:
        line = version.splitlines()[0] if version else "unknown"
        raise ToolError(f"host_metal needs g++ 12 or later on Linux; '{command}' is {line}")
    return found


@functools.cache
def _version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True).stdout


@functools.cache
def _target_flags() -> tuple[str, ...]:
    """Hardware conversion of half where the processor has it: calls are ten times slower."""
    if platform.machine() != "x86_64":
        return ()
    flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    has = [f"-m{name}" for name in ("f16c", "fma") if name in flags]
    return ("-fexcess-precision=16", *has)


@functools.cache
def _headers_stamp() -> str:
    digest = hashlib.sha256()
    for path in sorted(CPP.rglob("*.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(*parts: str) -> str:
    """A name for what these parts make, with this version of the headers and runtime."""
    return hashlib.sha256("\0".join([*parts, _headers_stamp()]).encode()).hexdigest()[:24]


def _compile(command: Sequence[str], input_: str = "") -> str:
    """Run the compiler; return what it says against its input, or nothing."""
    result = subprocess.run([compiler(), *command], input=input_, capture_output=True, text=True)
    return result.stderr or f"exit {result.returncode}" if result.returncode else ""


def _runtime() -> Path:
    extra = ["-DHM_UCONTEXT"] if os.environ.get(_UCONTEXT) else []
    flags = ["-std=c++17", "-O2", "-fno-pie", f"-I{CPP}", *extra]
    target = cache_folder() / f"runtime-{key_of(_version(compiler()), *flags)}.o"
    if target.exists():
        return target
    sources = [str(path) for path in sorted((CPP / "runtime").glob("*.cpp"))]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        said = _compile([*flags, "-r", "-nostdlib", *sources, "-o", str(made)])
        if said:
            raise ToolError("host_metal's runtime does not compile: " + said)
        os.replace(made, target)
    return target


def build_runner(unit: str) -> Path:
    """Compile and link a unit made by `host_unit`.

    What is made lies in a folder of its own until it is whole: processes may build the same
    kernel at once, and one may be killed.

    Returns:
        The program to run.

    Raises:
        TextError: Kernel text does not compile; names its first wrong line.
    """
    flags = [*_KERNEL_FLAGS, *_target_flags(), f"-I{CPP}"]
    portable = os.environ.get(_UCONTEXT, "")
    target = cache_folder() / f"kernel-{key_of(unit, _version(compiler()), *flags, portable)}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        object_, program = f"{folder}/kernel.o", f"{folder}/kernel"
        said = _compile([*flags, "-x", "c++", "-", "-o", object_], unit)
        if said:
            raise _first_error(said)
        said = _compile(["-no-pie", object_, str(_runtime()), "-o", program])
        if said:
            raise ToolError("host_metal cannot link a kernel: " + said)
        os.replace(program, target)
    return target


def _first_error(said: str) -> TextError:
    """Turn what g++ prints into an error at a line of kernel text.

    Where the text calls a library function wrongly, g++ first complains inside our headers and
    tells later where that was required from.
    """
    message, where = said.strip().splitlines()[0], None
    for line in said.splitlines():
        match = re.match(r"^(?:In file included from )?(\S+?):(\d+)(?::\d+)?[:,]\s*(.*)", line)
        if not match:
            continue
        if "error:" in match[3] and message == said.strip().splitlines()[0]:
            message = match[3].partition("error:")[2].strip()
        if where is None and _is_kernel_text(match[1]):
            where = Place(match[1], int(match[2]))
    return TextError("compile", str(where or "?"), message)


def _is_kernel_text(file: str) -> bool:
    ours = ("<stdin>", "host-entry", "mlx-signature", "??", "")
    return str(CPP) not in file and os.path.basename(file) not in ours


def place_of_address(runner: Path, address: int) -> Place | None:
    """The line of kernel text that an instruction of a runner belongs to, if one does."""
    # A hook is called from the access: its return address is one instruction further.
    command = ["addr2line", "-i", "-e", str(runner), hex(address - 1)]
    result = subprocess.run(command, capture_output=True, text=True)
    for line in result.stdout.splitlines():  # innermost function first
        file, _, number = line.partition(" (")[0].rpartition(":")
        if _is_kernel_text(file) and number.isdigit():
            return Place(os.path.basename(file), int(number))
    return None
