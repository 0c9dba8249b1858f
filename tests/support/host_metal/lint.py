"""Rules about kernel text that neither compiler knows.

Some are Metal's (its front end is another one than those we have), some are this project's.
"""

import re
from collections.abc import Iterator, Sequence

from .errors import TextError
from .text import identifiers, places, without_comments
from .trace import Traced

MAX_THREADS = 512  # Metal allows 1024, but a kernel that needs many registers gets fewer: #3885
MAX_BUFFERS = 31

_FORBIDDEN = [
    (r"(?:\)|=|\(|,|return)\s*(\[[^\[\]]*\])\s*(?:\([^()]*\)\s*)?(?:->\s*\w+\s*)?\{",
     "Metal before 3.2 has no lambda expressions"),
    (r"\b(goto)\b", "Metal has no goto"),
    (r"\b(double)\b", "Metal has no double"),
    (r"\b(new|delete|virtual|try|catch|throw|typeid|dynamic_cast|thread_local|noexcept|asm)\b",
     "Metal has no such C++"),
    (r"\b(std)\s*::", "Metal has no std"),
    (r"(#\s*include)\b", "MLX compiles the text as a string: it cannot include"),
]  # fmt: skip

_SPACES = re.compile(r"\b(device|constant|thread|threadgroup)\b")
_SCALARS = {
    *("bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "size_t"),
    *("half", "bfloat", "float", "float16_t", "bfloat16_t", "int8_t", "uint8_t", "int16_t"),
    *("uint16_t", "int32_t", "uint32_t", "int64_t", "uint64_t"),
}
_POINTER = re.compile(
    r"^\s*(?:(?:const|volatile|inline|static|constexpr|METAL_FUNC)\s+)*(?:metal::)?"
    r"(?P<type>\w+)(?:<[^<>]*>)?\s*(?:const\s*)?[*&]+\s*(?:const\s+)?\w*\s*(?:=.*|\[.*)?$",
    re.S,
)
_NOT_A_TYPE = {"return", "case", "else", "do", "goto", "constexpr", "const"}

Finding = tuple[int, str]  # offset in the text, message


def lint_text(traced: Traced, header: str, source: str) -> None:
    """Refuse a specialisation whose text breaks a rule.

    Raises:
        TextError: With the first finding's line, and all messages.
    """
    types = _type_names(header + source)
    rules = [_foreign_characters, _forbidden, lambda text: _pointers(text, types)]
    found = []
    for text in (header, source):
        extra = [lambda text: _names(text, traced)] if text is source else []
        origin = places(text)
        for rule in [*rules, *extra]:
            for offset, message in rule(text):
                found.append((origin[text.count("\n", 0, offset)], message))
    if found:
        messages = [found[0][1], *(f"{place}: {message}" for place, message in found[1:])]
        raise TextError("lint", str(found[0][0]), "; ".join(messages))


def lint_launch(traced: Traced, grid: Sequence[int], threadgroup: Sequence[int]) -> None:
    """Refuse a launch that MLX, Metal or this project does not allow."""
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    message = None
    if min(*grid, *threadgroup) < 1:
        message = f"grid {tuple(grid)} and threadgroup {tuple(threadgroup)} must be positive"
    elif threads > MAX_THREADS:
        message = f"{threads} threads a threadgroup, {MAX_THREADS} are allowed"
    elif len(traced.buffers) > MAX_BUFFERS:
        message = f"{len(traced.buffers)} buffers, Metal binds {MAX_BUFFERS}"
    if message:
        raise TextError("lint", traced.name, message)


def _foreign_characters(text: str) -> Iterator[Finding]:
    for match in re.finditer(r"[^\x00-\x7f]", text):
        yield match.start(), f"MLX hands over ASCII, this is {match[0]!r}"


def _forbidden(text: str) -> Iterator[Finding]:
    code = without_comments(text)
    for pattern, message in _FORBIDDEN:
        for match in re.finditer(pattern, code):
            yield match.start(1), f"{message}: {match[1].strip()}"


def _type_names(text: str) -> set[str]:
    """Names that stand for types; every other `a * b` is a product."""
    vectors = {f"{scalar}{n}" for scalar in _SCALARS for n in "234"}
    pattern = r"\b(?:typename|class|struct|using)\s+(\w+)"
    declared = re.findall(pattern, without_comments(text))
    return {"vec", *_SCALARS, *vectors, *declared}


def _pointers(text: str, types: set[str]) -> Iterator[Finding]:
    """Metal: every pointer and reference names its address space."""
    code = re.sub(r"^\s*#.*$", lambda m: " " * len(m[0]), without_comments(text), flags=re.M)
    for part in re.finditer(r"[^;{}(),]+", code):
        match = _POINTER.match(part[0])
        if match and match["type"] in types and not _SPACES.search(part[0]):
            wording = " ".join(part[0].split())
            yield part.start() + match.start("type"), f"no address space: {wording}"


def _names(source: str, traced: Traced) -> Iterator[Finding]:
    """MLX adds a parameter for every name of its own that it finds anywhere in the body.

    Even in a comment, or as a part of another name: `q_shape` is found in `seq_shape`.
    """
    code = without_comments(source)
    for parameter in traced.parameters:
        name = parameter.name
        shape = re.search(r"_(shape|strides|ndim)$", name)
        if parameter.attribute is None and not shape:
            continue
        if name not in identifiers(source):
            offset = max(source.find(name), 0)
            yield offset, f"MLX adds {name}, for this mentions it, but no code uses it"
        for match in re.finditer(rf"\b(\w+)\s+({name})\s*[=;,\[({{]", code):
            if match[1] not in _NOT_A_TYPE:
                yield match.start(2), f"{name} is a parameter that MLX adds: choose another name"
