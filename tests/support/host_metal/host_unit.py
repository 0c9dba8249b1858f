"""The C++ translation unit that g++ compiles: the generated text, and a way to call it."""

import re

from .errors import TextError
from .text import Place, line_marker, places, without_comments
from .trace import Parameter, Traced

# Attributes that are three numbers; all others are one.
_TRIPLES = {
    "dispatch_threads_per_threadgroup",
    "grid_origin",
    "grid_size",
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "threads_per_grid",
    "threads_per_threadgroup",
}

# `threadgroup T a[N], b;` where a statement starts (or behind a #line marker, which ends in a
# quote). Pointers do not match: T ends in a name.
_VARIABLE = re.compile(
    r"(?:\A|(?<=[;{}\"]))(?P<space>\s*)threadgroup\s+(?P<type>[\w:]+(?:\s*<[^;<>]*>)?)\s+"
    r"(?P<names>\w+\s*(?:\[[^\]]*\]\s*)*(?:,\s*\w+\s*(?:\[[^\]]*\]\s*)*)*)(?P<end>[;=])"
)
_DECLARATOR = re.compile(r"(\w+)\s*((?:\[[^\]]*\]\s*)*)")


def host_unit(traced: Traced, header: str, source: str) -> str:
    """Assemble the unit.

    Args:
        traced: What MLX generated.
        header: Its header with #line markers.
        source: Its source with #line markers.
    """
    values = ", ".join(value for _, _, value in traced.template)
    declared = ", ".join(f"{kind} {name}" for kind, name, _ in traced.template)
    template = f"template <{declared}>" if declared else ""
    signature = ",\n".join(f"  {p.type}{p.form} {p.name}" for p in traced.parameters)
    arguments = ",\n".join(f"    {argument}" for argument in _arguments(traced))
    return "\n".join(
        [
            '#include "metal/metal.h"',
            "using namespace metal;",
            header,
            line_marker(Place("mlx-signature", 1)) + template,
            f"[[kernel]] void {traced.name}(\n{signature}) {{",
            share_variables(source),
            line_marker(Place("host-entry", 1)) + "}",
            'extern "C" HM_UNCHECKED',
            "void hm_kernel(void* const* buffers, const hm::Attributes& attributes) {",
            f"  {traced.name}{f'<{values}>' if values else ''}(\n{arguments});",
            "}\n",
        ]
    )


def _arguments(traced: Traced) -> list[str]:
    """What each parameter is bound to, in the order of the signature."""
    index, out = 0, []
    for parameter in traced.parameters:
        if parameter.attribute is None:
            out.append(_buffer_argument(parameter, index))
            index += 1
        elif parameter.attribute in _TRIPLES:
            out.append(f"hm_uint3(attributes.{parameter.attribute})")
        else:
            out.append(f"attributes.{parameter.attribute}")
    return out


def _buffer_argument(parameter: Parameter, index: int) -> str:
    plain = re.sub(r"\b(?:device|constant)\s+", "", parameter.type)
    return f"{'*' if parameter.form == '&' else ''}({plain}*)buffers[{index}]"


def share_variables(source: str) -> str:
    """Make threadgroup variables references into memory that the runtime shares.

    C++ has no storage that all threads of a threadgroup share, and a macro cannot tell
    `threadgroup float x[4]`, a variable, from `threadgroup float* p`, a pointer of the thread's
    own. Line numbers stay.
    """
    code = without_comments(source)
    out, end, count = [], 0, 0
    for match in _VARIABLE.finditer(code):
        if match["end"] == "=":
            place = places(source)[code.count("\n", 0, match.start("type"))]
            raise TextError("compile", str(place), "a threadgroup variable has an initialiser")
        shared = []
        for name, dimensions in _DECLARATOR.findall(match["names"]):
            type_ = f"{match['type']}{dimensions.strip()}"
            shared.append(f'auto& {name} = hm::threadgroup_variable<{type_}>({count}, "{name}");')
            count += 1
        lines_lost = "\n" * (match[0].count("\n") - match["space"].count("\n"))
        out += [source[end : match.start()], match["space"], " ".join(shared), lines_lost]
        end = match.end()
    return "".join(out) + source[end:]
