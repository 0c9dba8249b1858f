"""Plant mistakes in the kernels' text, one at a time, and see that the tests notice each.

A test set that no mistake can pass is what a kernel's claim to be right rests on. Prints what
killed each mutant, and ends with status 1 if one survived.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import _checkout
import _prefill_mutations
import pytest
from hypothesis import settings

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Mutation:
    """A mistake in the place of what is right.

    Attributes:
        what: The mistake in words.
        file: The file of kernel text.
        good: A part of it, comments out, that occurs once.
        bad: What takes its place.
        tests: Which tests are to notice, as pytest's ``-k`` says it.
        kind: What the runner must call it, naming the line; empty if wrong numbers tell.
        kernel: The kernel whose tests are to notice.
    """

    what: str
    file: str
    good: str
    bad: str
    tests: str
    kind: str = ""
    kernel: str = "decode"

    def applied(self, text: str) -> str:
        """Return the text with the mistake.

        Raises:
            ValueError: The text has changed, and the mutation must be written anew.
        """
        if text.count(self.good) != 1:
            raise ValueError(f"{self.file}: not exactly once in the text: {self.good}")
        return text.replace(self.good, self.bad)


COMMON, PASS_1, PASS_2 = "decode_common", "decode", "decode_merge"
PLAIN, PACKED, ROWS = "decode_plain", "decode_packed", "packed_rows"

# fmt: off
MUTATIONS = [
    Mutation("window one too long", COMMON,
             "token > query - sight.reach", "token >= query - sight.reach", "test_queries[1-3]"),
    Mutation("a query does not see itself", COMMON, "token <= query", "token < query",
             "test_queries[1-4]"),
    Mutation("sum of weights not rescaled", COMMON,
             "rows.l[r] * fade + weight", "rows.l[r] + weight", "bytes"),
    Mutation("outputs not rescaled", COMMON, "rows.o[r][e] *= fade", "rows.o[r][e] *= 1.0f",
             "bytes"),
    Mutation("queries turned backwards", COMMON, "second ? sine : -sine", "second ? -sine : sine",
             "head_dims"),
    Mutation("pairs counted wrongly if interleaved", COMMON,
             "INTERLEAVED ? d / 2 :", "INTERLEAVED ? d % (DIMS / 2) :",
             "kinds_of_rotation[True-24-1]"),
    Mutation("dimensions beyond the rotated ones turned", COMMON,
             "turned && d < DIMS", "turned && d <= DIMS", "kinds_of_rotation"),
    Mutation("lanes exchange the wrong half", COMMON,
             "upper ? values[j] : values[left + j]", "upper ? values[left + j] : values[j]",
             "head_dims"),
    Mutation("weights taken from the wrong lanes", COMMON, "ushort(j * SHARE)", "ushort(j)",
             "head_dims"),
    Mutation("dead rows loaded", COMMON, "held >= TK", "held > 0", "states", "out-of-bounds"),
    Mutation("dead rows weighted", COMMON,
             "seen ? fast::exp2(score - top) : 0.0f", "fast::exp2(score - top)", "states"),
    Mutation("maximum of the lanes incomplete", COMMON,
             "ushort bit = 16; bit >= SHARE;", "ushort bit = 16; bit > SHARE;", "bytes"),
    Mutation("softcap not scaled back", COMMON, "cap * precise::tanh(score)",
             "precise::tanh(score)", "softcap[2-1.5-False-1]"),
    Mutation("learned logit in another base", COMMON, "logit * M_LOG2E_F", "logit",
             "softcap[2-None-True-1]"),
    Mutation("learned sink forgets the rest", COMMON, "l * fade + fast::exp2(score - top)",
             "l + fast::exp2(score - top)", "softcap[16-1.5-True-1]"),
    Mutation("learned sink of another kv head", PASS_1, "learned[hk * G + row / L]",
             "learned[row / L]", "softcap[2-None-True-1]"),
    Mutation("first table serves every sequence", PASS_1, "ranges_shape[0] == 1 ? 0 : b",
             "ranges_shape[0] == 1 ? 0 : 0", "different_tokens"),
    Mutation("turns of the first sequence serve all", PASS_1, "b * turns_shape[1]", "0",
             "different_tokens"),
    Mutation("ranges counted twice", PASS_1, "base += range[1]", "base += 2 * range[1]", "states"),
    Mutation("slices overlap", PASS_1, "max(begin - base, 0)", "0", "queries"),
    Mutation("splits all take the first keys", PASS_1, "(split * KS + slice) * size",
             "slice * size", "test_queries[3-1]"),
    Mutation("last keys left out", PASS_1, "(live + parts - 1) / parts", "live / parts",
             "bytes or states"),
    Mutation("turn of the other kind", PASS_1, "max(turn - 1, 0) * L", "max(2 - turn, 0) * L",
             "head_dims"),
    Mutation("turn of another query", PASS_1, "* L + row % L) * DIMS", "* L + 0) * DIMS",
             "test_queries[1-3]"),
    Mutation("rows beyond the last read", PASS_1, "min(row0 + r, R - 1)", "row0 + r",
             "any_number", "out-of-bounds"),
    Mutation("rows beyond the last stored", PASS_1, "if (row < R)", "if (true)",
             "any_number", "out-of-bounds"),
    Mutation("values found by the strides of keys", PLAIN, "hk * size_t(v_strides[1])",
             "hk * size_t(k_strides[1])", "values_of", "out-of-bounds"),
    Mutation("sequences taken for contiguous", PLAIN, "b * size_t(k_strides[0])",
             "b * size_t(threadgroups_per_grid.y * k_strides[1])", "strided"),
    Mutation("rows taken for contiguous", PLAIN, "values.row = int(v_strides[2])",
             "values.row = DV", "strided"),
    Mutation("elements of a row taken for neighbours", COMMON, "if (step != 1)", "if (false)",
             "strided[dims0-2-every"),
    Mutation("elements found as if neighbours", COMMON, "at * rows.step", "at", "strided"),
    Mutation("kv head ignored", PASS_1, "threadgroups_per_grid.y + size_t(hk)",
             "threadgroups_per_grid.y + size_t(0)", "queries", "race"),
    Mutation("a tile overwritten while others read it", PASS_1,
             f"{BARRIER}\n      for (int c = int(thread_index_in_threadgroup); c < n * D / 4",
             "for (int c = int(thread_index_in_threadgroup); c < n * D / 4",
             "bytes and 128 and 16", "race"),
    Mutation("a tile read before it is there", PASS_1,
             f"{BARRIER}\n      for (int t = 0", "for (int t = 0",
             "bytes and 128 and 16", "uninitialised"),
    Mutation("slices merged before they are given", PASS_1,
             f"{BARRIER}\n  if (slice < half_of)", "if (slice < half_of)", "head_dims",
             "uninitialised"),
    Mutation("a barrier for other memory", PASS_1,
             f"{BARRIER}\n  if (slice < half_of)",
             "threadgroup_barrier(mem_flags::mem_device);\n  if (slice < half_of)", "head_dims",
             "race"),
    Mutation("a barrier that half the slices skip", PASS_1,
             f"{BARRIER}\n  if (slice < half_of)",
             f"if (slice < half_of) {BARRIER}\n  if (slice < half_of)", "head_dims",
             "barrier-divergence"),
    Mutation("a sum that half the lanes skip", PASS_1,
             "rows.l[r] += simd_shuffle_xor", "if (lane < 16) rows.l[r] += simd_shuffle_xor",
             "head_dims", "simd-divergence"),
    Mutation("more than 32 KB shared", PASS_1, "STAGED = RG > 1 ? TILE * (D + DV) / 4",
             "STAGED = RG > 1 ? TILE * (D + DV)", "bytes and 128 and 16", "threadgroup-memory"),
    Mutation("last row not stored", PASS_1, "if (row < R)", "if (row < R - 1)", "any_number",
             "unwritten-output"),
    Mutation("staged tiles taken for device memory", PASS_1,
             "v_staged.here = reinterpret_cast<const threadgroup T*>",
             "v_staged.here = reinterpret_cast<const device T*>", "head_dims", "strict"),
    Mutation("slices merged under one maximum", PASS_1,
             "theirs = fast::exp2(given_ml[from * 2] - m)", "theirs = mine", "head_dims"),
    Mutation("splits' sums not rescaled", PASS_2, "from[DV + 1] * fade", "from[DV + 1]",
             "queries"),
    Mutation("splits' outputs not rescaled", PASS_2, "from[lane + 32 * i] * fade",
             "from[lane + 32 * i]", "queries"),
    Mutation("low bits of a word taken for the high ones", ROWS, "unit >> (j * BITS)",
             "unit >> ((EACH - 1 - j) * BITS)", "head_dims"),
    Mutation("a bit too many", ROWS, "(1u << BITS) - 1u", "(1u << (BITS + 1)) - 1u", "head_dims"),
    Mutation("bias left out", ROWS, "static_cast<float>(q) + bias", "static_cast<float>(q)",
             "head_dims"),
    Mutation("scale of the first group", ROWS, "scales_row + at / GS", "scales_row", "head_dims"),
    Mutation("bias of the next row", ROWS, "rows.biases_here[row *",
             "rows.biases_here[(row + 1) *", "head_dims"),
    Mutation("units counted as elements", ROWS, "units[at / EACH + i]", "units[at + i]",
             "head_dims"),
    Mutation("sinks read from the ring", ROWS, "row >= size_t(rows.split)",
             "row + 1 >= size_t(rows.split)", "states"),
    Mutation("ring counted from the first sink", ROWS, "row - size_t(rows.split)", "row",
             "states"),
    Mutation("sinks all alike", ROWS, "rows.sinks_here + row * rows.sinks_row", "rows.sinks_here",
             "dtypes"),
    Mutation("packed sequences taken for contiguous", PACKED, "b * size_t(k_words_strides[0])",
             "b * size_t(threadgroups_per_grid.y * k_words_strides[1])", "strided"),
    Mutation("scales found by the strides of words", PACKED,
             "values.scales_row = int(v_scales_strides[2])",
             "values.scales_row = int(v_words_strides[2])", "head_dims"),
    Mutation("values unpacked as keys", PACKED, "SinkRows<T, VBITS, GS> values",
             "SinkRows<T, KBITS, GS> values", "dtypes_and_bits"),
    Mutation("last dimensions not merged", PASS_2,
             "lane + 32 * i < DV) {\n      o[i]", "lane + 32 * i < DV - 1) {\n      o[i]",
             "queries"),
]
# fmt: on
MUTATIONS = [replace(m, kernel="packed") if m.file in (PACKED, ROWS) else m for m in MUTATIONS]
MUTATIONS += [Mutation(*m, kernel="prefill") for m in _prefill_mutations.MUTATIONS]


class _Outcome:
    """A plugin that notes the first test which failed, and keeps pytest quiet."""

    def __init__(self) -> None:
        self.failed = ""
        self.reason = ""
        self.ran = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran += report.when == "call"
        if report.failed and not self.failed:
            self.failed = report.nodeid.partition("::")[2]
            crash = getattr(report.longrepr, "reprcrash", None)
            self.reason = str(getattr(crash, "message", "")).split("\n")[0]

    def kills(self, mutation: Mutation) -> bool:
        """Tell whether a test failed, and for the reason that the mutation is to give."""
        named = f"[{mutation.kind}]" in self.reason and ".metal:" in self.reason
        return bool(self.failed) and (named or not mutation.kind)


def outcome_of(mutation: Mutation | None, tests: str, kernel: str = "decode") -> _Outcome:
    """Run the tests of the mutation's kernel, or of one, on a changed text until one fails."""
    from mlx_sink.attention.kernels import source

    text = source.text

    def planted(name: str) -> str:
        whole = text(name)
        return mutation.applied(whole) if mutation and name == mutation.file else whole

    outcome = _Outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "text", planted)
        quiet = ["-x", "-qq", "--no-header", "--no-summary", "-p", "no:cacheprovider"]
        quiet += ["-p", "no:terminalreporter", "-n", "0", "-m", ""]
        quiet += ["--hypothesis-profile", settings.get_current_profile_name()]
        name = mutation.kernel if mutation else kernel
        file = next(_checkout.TESTS.rglob(f"test_kernel_{name}.py"))
        pytest.main([str(file), "-k", tests, *quiet], plugins=[outcome])
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="mutations whose words contain this")
    parser.add_argument("--list", action="store_true", help="say what there is, run nothing")
    given = parser.parse_args(arguments)
    chosen = [m for m in MUTATIONS if not given.only or given.only in m.what]
    for kernel in [] if given.list else sorted({m.kernel for m in chosen}):
        # A machine on which every test fails would seem to kill every mutant.
        named = {f"({m.tests})" for m in chosen if m.kernel == kernel}
        unchanged = outcome_of(None, " or ".join(sorted(named)), kernel)
        if unchanged.failed or not unchanged.ran:
            print(f"the text as it is fails {unchanged.failed}: {unchanged.reason}")
            return 1
        print(f"the text as it is passes {unchanged.ran} tests", flush=True)
    survivors = 0
    for number, mutation in enumerate(chosen, start=1):
        label = f"{number:2}/{len(chosen)} {mutation.what}"
        if given.list:
            print(f"{label} ({mutation.file}): {mutation.good!r} -> {mutation.bad!r}")
            continue
        began = time.perf_counter()
        outcome = outcome_of(mutation, mutation.tests)
        took = time.perf_counter() - began
        killed = outcome.kills(mutation)
        survivors += not killed
        said = f"killed by {outcome.failed}" if killed else "SURVIVED"
        print(f"{label}: {said} after {outcome.ran} tests, {took:.0f} s", flush=True)
        if outcome.reason:
            print(f"      {outcome.reason[:120]}", flush=True)
    if not given.list:
        print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
