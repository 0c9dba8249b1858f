"""The strict pass: kernel text as C++ for OpenCL, where address spaces are types.

Runs clang's front end inside this process (the PyPI package libclang), for diagnostics only.
"""

import ctypes
import functools
import re
from importlib import metadata
from typing import Any

from .build import CPP, cache_folder, key_of
from .errors import TextError, ToolError
from .text import Place, line_marker
from .trace import Parameter, Traced

_ARGUMENTS = [
    *("-x", "clcpp", "-cl-std=clc++2021", "--target=x86_64-linux-gnu", "-fsyntax-only"),
    *("-cl-single-precision-constant", "-cl-no-stdinc", "-nostdinc", "-ferror-limit=0"),
    *("-Wno-everything", "-Wimplicit-float-conversion", f"-I{CPP}"),
]
# Whether pointers without an address space are generic. Metal's rule lies between: only with
# generic ones does clang let structs be copied, only without does it refuse a pointer parameter
# that names no space. Metal 4.1 makes `this` generic.
_GENERIC = ["-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space"]
_NAMED = ["-Xclang", "-cl-ext=-all,+cl_khr_fp16"]
# Consequences of having no generic space, which Metal does not share.
_UNSHARED = re.compile(r"(default|generic) address space|implicit (copy|move)")
# Warnings to clang, errors to Metal.
_HARD = re.compile(r"implicit conversion loses floating-point precision: .* to .*(bfloat|__bf16)")

_OUR_FILES = {"metal.h", "macros.h", "kernel.cl", "?"}
_VECTOR_CALL = re.compile(r"\b(?:metal::)?vec\s*<\s*([\w:]+)\s*,\s*(\w+)\s*>\s*\(")


def strict_unit(traced: Traced, header: str, source: str) -> str:
    """The text as C++ for OpenCL: one specialisation, its parameters as variables of the body.

    OpenCL allows neither templates nor references as kernel parameters; the body cannot tell.
    """
    bound = [
        f"using {name} = {value};" if kind == "typename" else f"constexpr {kind} {name} = {value};"
        for kind, name, value in traced.template
    ]
    bound += [_bind(parameter) for parameter in traced.parameters]
    return "\n".join(
        [
            '#include "strict/metal.h"',
            "using namespace metal;",
            _without_vector_calls(header),
            line_marker(Place("mlx-signature", 1)) + f"__kernel void {traced.name}() {{",
            " ".join(bound),
            _without_vector_calls(source),
            "}\n",
        ]
    )


def _bind(parameter: Parameter) -> str:
    type_, name = parameter.type, parameter.name
    match parameter.form:
        case "*":
            return f"{type_}* {name} = nullptr;"
        case "&":
            return f"{type_}& {name} = *({type_}*)nullptr;"
        case _:
            return f"{type_} {name} = {type_}(0);"


def _without_vector_calls(text: str) -> str:
    """`vec<T, 4>(...)` constructs in Metal; clang's vectors have no constructors."""
    return _VECTOR_CALL.sub(r"metal::make<metal::vec<\1, \2>>(", text)


def check_strict(traced: Traced, header: str, source: str) -> None:
    """Type-check a specialisation; what has passed once is remembered in the cache folder.

    Raises:
        TextError: With the first error's line, and all messages.
    """
    unit = strict_unit(traced, header, source)
    key = key_of(unit, _version(), *_ARGUMENTS, *_GENERIC, *_NAMED)
    passed = cache_folder() / f"strict-{key}"
    if passed.exists():
        return
    found = _diagnose(unit, _GENERIC)
    found += [error for error in _diagnose(unit, _NAMED) if not _UNSHARED.search(error[1])]
    if found:
        place, first = found[0]
        others = {f"{p}: {message}" for p, message in found[1:]} - {f"{place}: {first}"}
        raise TextError("strict", str(place), "; ".join([first, *sorted(others)][:5]))
    passed.touch()


def _diagnose(unit: str, extensions: list[str]) -> list[tuple[Place, str]]:
    cindex = _clang()
    parsed = cindex.Index.create().parse(
        "kernel.cl", args=[*_ARGUMENTS, *extensions], unsaved_files=[("kernel.cl", unit)]
    )
    return [
        (_place_in_kernel(cindex, diagnostic), diagnostic.spelling)
        for diagnostic in parsed.diagnostics
        if diagnostic.severity >= cindex.Diagnostic.Error or _HARD.search(diagnostic.spelling)
    ]


@functools.cache
def _version() -> str:
    try:
        return metadata.version("libclang")
    except metadata.PackageNotFoundError:
        return ""  # The system's own.


def _clang() -> Any:
    try:
        from clang import cindex
    except ImportError:
        message = "host_metal's strict pass needs clang: pip install libclang"
        raise ToolError(message) from None
    return cindex


def _place_in_kernel(cindex: Any, diagnostic: Any) -> Place:
    """Where kernel text is wrong; for an error within our declarations, who instantiated them."""
    found = [_presumed_place(cindex, part.location) for part in (diagnostic, *diagnostic.children)]
    return next((place for place in found if place.file not in _OUR_FILES), found[0])


def _presumed_place(cindex: Any, location: Any) -> Place:
    """Where a diagnostic is by #line markers; the Python bindings only tell the real line."""
    file, line, column = cindex._CXString(), ctypes.c_uint(), ctypes.c_uint()
    cindex.conf.lib.clang_getPresumedLocation(
        location, ctypes.byref(file), ctypes.byref(line), ctypes.byref(column)
    )
    name = cindex.conf.lib.clang_getCString(file)
    return Place((name or "?").rsplit("/", 1)[-1], line.value)
