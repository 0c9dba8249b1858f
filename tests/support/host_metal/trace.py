"""What MLX would hand to the Metal compiler: taken from MLX itself, and taken apart."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .errors import ToolError

_PARAMETER = re.compile(
    r"^\s*(?P<type>.*?)\s*(?P<form>[*&]?)\s*(?P<name>\w+)"
    r"\s*\[\[(?P<binding>\w+)(?:\((?P<index>\d+)\))?\]\]\s*$"
)


@dataclass(frozen=True)
class Parameter:
    """One parameter of the generated function: a buffer, or an attribute such as a position."""

    type: str  # with address space, without * or &
    form: str  # "*", "&" or ""
    name: str
    attribute: str | None  # None for a buffer; buffers are bound in the order of the list


@dataclass(frozen=True)
class Traced:
    """One specialisation of a kernel, as MLX generates it."""

    name: str
    text: str  # all of it
    header: str
    source: str
    template: tuple[tuple[str, str, str], ...]  # (kind, name, value)
    parameters: tuple[Parameter, ...]

    @property
    def buffers(self) -> list[Parameter]:
        """The parameters that are memory, in binding order."""
        return [p for p in self.parameters if p.attribute is None]


def trace(
    kernel: Callable[..., Any],
    inputs: Sequence[mx.array],
    header: str,
    source: str,
    **launch: Any,
) -> Traced:
    """Capture the text that a call of `kernel` would compile.

    Without Metal a kernel cannot be called, except while a function is exported: then MLX
    generates the text and hands it to the callback as an argument of the primitive.
    """
    captured = []

    def keep(event: dict[str, Any]) -> None:
        if event.get("type") == "primitive" and event.get("name") == "CustomKernel":
            captured.append(event["arguments"])

    mx.export_function(keep, lambda *xs: kernel(inputs=list(xs), **launch), *inputs)
    if not captured:
        raise ToolError(f"MLX {mx.__version__} exports no CustomKernel: see test_host_metal_trace")
    name, text = captured[0][:2]
    return _take_apart(name, text, header, source)


def _take_apart(name: str, text: str, header: str, source: str) -> Traced:
    """Split the text where MLX joined it; the two parts given are known verbatim."""
    opening, closing = f"[[kernel]] void {name}(", ") {\n" + source + "\n}\n"
    head, found, rest = text.removeprefix(header).partition(opening)
    signature, closed, tail = rest.partition(closing)
    if not (text.startswith(header) and found and closed):
        raise ToolError(f"MLX {mx.__version__} generates kernels of another form than expected")
    return Traced(
        name=name,
        text=text,
        header=header,
        source=source,
        template=_template(name, head.strip(), tail),
        parameters=tuple(_parameter(line) for line in signature.split(",\n")),
    )


def _template(name: str, head: str, tail: str) -> tuple[tuple[str, str, str], ...]:
    """Names from `template <...>`, values from the instantiation below the kernel."""
    declared = re.fullmatch(r"template <(.*)>", head, re.S)
    given = re.search(rf"{re.escape(name)}<([^>]*)>\)", tail)
    if not declared or not given:
        return ()
    pairs = zip(declared[1].split(", "), given[1].split(", "), strict=True)
    return tuple((*declaration.split(), value) for declaration, value in pairs)  # type: ignore  (two words each)


def _parameter(line: str) -> Parameter:
    match = _PARAMETER.match(line)
    if not match:
        raise ToolError(f"MLX generates a parameter of unknown form: {line.strip()}")
    attribute = None if match["binding"] == "buffer" else match["binding"]
    return Parameter(match["type"], match["form"], match["name"], attribute)
