"""The prefill kernel's text, run on the CPU, against float64.

Every case runs under the runner's checks, and every launch's fragment products are held against
the count that `scripts/bench/count_prefill.py` makes from the tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import host_metal
import mlx.core as mx
import numpy as np
import pytest
from checkout import ROOT
from decode_case import Arrays, Case, arrays, error, ring_at
from hypothesis import given
from hypothesis import strategies as st
from test_kernel_decode import TOLERANCES, view_of

from mlx_sink.attention.kernels import prefill as kernel
from mlx_sink.attention.kernels import source
from mlx_sink.attention.kernels.tables import PrefillTables, prefill_tables
from mlx_sink.attention.layout import Layout, layout_of
from mlx_sink.attention.ring import Ring, Run
from mlx_sink.attention.rope import Rotation
from mlx_sink.errors import KernelError

DTYPES = list(TOLERANCES)
W = 30
"""A window that a chunk of a few tiles outruns."""
AFTER = (ring_at(4, 90, 271),)
"""A ring that has wrapped, in its first epoch: the sinks need a turn."""
SWITCH = (ring_at(4, 90, 215, epoch=100),)
"""15 tokens into its third epoch: most of the window lies in the second."""


@pytest.fixture(autouse=True, scope="module")
def on_the_host() -> Iterator[None]:
    """Build the kernel with the runner in the place of MLX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", host_metal.metal_kernel)
        kernel.forget()
        yield
    kernel.forget()


def tile(case: Case) -> kernel.Tile:
    found = kernel.tile_of(case.head_dim, case.v_head_dim or case.head_dim, case.dtype)
    assert found is not None
    return found


def prepared(case: Case) -> Arrays:
    size = tile(case).queries

    def make(layout: Layout, rotation: Rotation) -> PrefillTables:
        return prefill_tables(layout, layout.ring.tokens, layout.end, rotation, size)

    return arrays(case, make)


def run(case: Case, a: Arrays) -> mx.array:
    options = {"softcap": case.softcap, "learned_sinks": a.learned}
    return kernel.prefill(a.q, a.k, a.v, a.tables, scale=a.scale, **options)


def report() -> host_metal.Report:
    """What the latest launch did."""
    built = kernel._kernel()
    assert isinstance(built, host_metal.HostKernel)
    return built.report


def counted(case: Case, a: Arrays) -> int:
    """Fragment products, from the tables alone."""
    from count_prefill import fragments_of

    heads = case.n_kv * case.group
    sides = (case.head_dim + (case.v_head_dim or case.head_dim)) // 8
    tables = np.array(a.tables.ranges)
    if len(tables) < len(case.rings):
        tables = np.repeat(tables, len(case.rings), axis=0)
    met = sum(fragments_of(table, case.n, tile(case))[0] for table in tables)
    return met * heads * sides


def check(case: Case, a: Arrays | None = None) -> Arrays:
    a = a or prepared(case)
    assert error(case, a, run(case, a)) <= TOLERANCES[case.dtype]
    assert report().fragment_products == counted(case, a)
    return a


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "n"), [(64, 40), (80, 33), (96, 17), (128, 40), (256, 20)])
def test_head_dims(dtype: mx.Dtype, D: int, n: int):
    """Several shapes of tiles, the last of them not full."""
    check(Case(SWITCH, dtype, D, n_kv=1, group=1, n=n))


@pytest.mark.parametrize("group", [2, 5, 16])
@pytest.mark.parametrize("n_kv", [1, 3])
def test_query_heads_of_a_kv_head(group: int, n_kv: int):
    check(Case(AFTER, mx.float16, 16, n_kv=n_kv, group=group, n=9))


STATES = {
    "nothing yet": lambda S: ring_at(S, W, 0),
    "before the wrap": lambda S: ring_at(S, W, S + 11),
    "at the wrap": lambda S: ring_at(S, W, S + W - 1),
    "first evicted": lambda S: ring_at(S, W, S + W),
    "after the wrap": lambda S: ring_at(S, W, S + 101),
    "the epoch has just begun": lambda S: ring_at(S, W, 3 * (S + W), epoch=S + W),
    "two epochs": lambda S: ring_at(S, W, 3 * (S + W) + 19, epoch=S + W),
    "endless": lambda S: ring_at(S, W, (1 << 40) + 5, epoch=1 << 10),
    "window of one": lambda S: ring_at(S, 1, S + 9),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("S", [0, 1, 4, 41])
@pytest.mark.parametrize("n", [9, 32, 90])
def test_states_of_the_ring(state: str, S: int, n: int):
    """Chunks up to three windows long that begin before, at and after the wrap, over epochs."""
    check(Case((STATES[state](S),), head_dim=16, n_kv=1, group=1, n=n))


@dataclass(frozen=True)
class InSlots(Case):
    """The ring's rows lie as in its slots, wrapped, and the chunk's after them."""

    @property
    def layouts(self) -> list[Layout]:
        made = []
        for layout in super().layouts:
            held = layout.ring.live_runs()
            new = Run(sum(run.length for run in held), layout.ring.tokens, layout.n)
            made.append(replace(layout, runs=(*held, new), held=held))
        return made


@pytest.mark.parametrize("S", [0, 4])
@pytest.mark.parametrize("tokens", [83, 97, 104, 119])
def test_a_ring_in_slot_order(S: int, tokens: int):
    """Pieces before and after the wrap, each under two epochs: every range there can be."""
    case = InSlots((ring_at(S, W, tokens, epoch=S + W + 3),), head_dim=16, n_kv=1, group=1, n=40)
    a = check(case)
    assert (np.array(a.tables.ranges)[0, 0, :, 1] > 0).sum() >= 3 + (S > 0)


@pytest.mark.parametrize("n", [12, 50])
def test_sequences_at_different_tokens(n: int):
    rings = tuple(STATES[state](4) for state in ("nothing yet", "first evicted", "two epochs"))
    check(Case(rings, head_dim=16, n=n, n_kv=2))


def test_sequences_that_share_their_tables():
    """One row of tables serves a batch whose sequences stand at the same token."""
    one = prepared(Case(SWITCH, head_dim=16, n=40))
    both = Case(SWITCH * 3, head_dim=16, n=40)
    check(both, replace(prepared(both), tables=one.tables))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_learned_sinks_and_softcap(learned: bool, softcap: float | None, dtype: mx.Dtype):
    check(Case(SWITCH, dtype, 32, n=20, learned=learned, softcap=softcap))


@pytest.mark.parametrize("rotated", [0, 2, 24, 64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_kinds_of_rotation(rotated: int, interleaved: bool):
    """Partial rotary, both pairings; a layer without positions has nothing to turn."""
    check(Case(SWITCH, rotated=rotated, interleaved=interleaved, n=10, n_kv=1, group=1))


@pytest.mark.parametrize("dims", [(192, 128), (16, 80), (64, 16)])
def test_values_of_another_size(dims: tuple[int, int]):
    check(Case(SWITCH, mx.float16, *dims, n=35, n_kv=1))


def test_large_scores_do_not_overflow():
    """Scores far above 128 overflow exp2 in float32 unless the maximum is taken off first."""
    case = Case(SWITCH, head_dim=16, n=40)
    a = prepared(case)
    a = replace(a, q=a.q * 100)
    assert error(case, a, run(case, a)) <= 1e-4


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any ring and chunk, with one specialisation that is compiled anyway."""
    S, window = draw(st.sampled_from([0, 1, 2, 4, 41])), draw(st.integers(1, 50))
    epoch = S + window + draw(st.integers(0, 50))

    def ring() -> Ring:
        return ring_at(S, window, draw(st.integers(0, 3 * epoch)), epoch)

    kind = draw(st.sampled_from([Case, InSlots]))
    rings = tuple(ring() for _ in range(draw(st.integers(1, 2))))
    n, seed = draw(st.integers(9, 3 * max(window, 4))), draw(st.integers(0, 1000))
    return kind(rings, head_dim=16, n_kv=1, group=draw(st.integers(1, 2)), n=n, seed=seed)


@given(case=cases())
def test_any_ring(case: Case):
    check(case)


def test_other_schedules_give_the_same(monkeypatch: pytest.MonkeyPatch):
    """Bit by bit: nothing depends on which simdgroup comes first."""
    case = Case(SWITCH, head_dim=32, n=40)
    a = prepared(case)
    outs = []
    for seed in (0, 1, 2):
        with monkeypatch.context() as patch:

            def made(seed: int = seed, **given: object) -> host_metal.HostKernel:
                return host_metal.metal_kernel(seed=seed, **given)

            patch.setattr(mx.fast, "metal_kernel", made)
            kernel.forget()
            outs.append(np.array(run(case, a)))
    kernel.forget()
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


@pytest.mark.parametrize("kind", ["slice", "rows before heads", "every second", "transposed"])
def test_strided(kind: str):
    """Keys and values are read where they lie, and the result is that of contiguous ones."""
    case = Case((SWITCH[0], AFTER[0]), mx.float16, 64, 32, n=11, learned=True)
    a = prepared(case)
    k, v, q = view_of(a.k, kind), view_of(a.v, kind), view_of(a.q, "rows before heads")
    strided = replace(a, q=q, k=k, v=v, learned=mx.repeat(a.learned, 2)[::2])
    mx.eval(k, v, q)
    assert memoryview(k).strides != memoryview(a.k).strides
    np.testing.assert_array_equal(np.array(run(case, strided)), np.array(run(case, a)))
    check(case, strided)


@pytest.mark.parametrize(("D", "dtype"), [(64, mx.float16), (128, mx.bfloat16)])
def test_bytes(D: int, dtype: mx.Dtype, record_property: pytest.RecordProperty):
    """A tile loads each row that one of its queries sees once, and nothing else of K and V."""
    case = Case((ring_at(4, 200, 999),), dtype, D, n_kv=1, group=2, n=70)
    a = check(case)
    rows = int(np.array(a.tables.ranges)[..., 1].sum())
    assert rows == 3 * 4 + sum(200 + size - 1 for size in (32, 32, 6))
    found = report()
    assert found.buffers["k"].loaded == 2 * rows * D * dtype.size
    assert found.buffers["v"].loaded == 2 * rows * D * dtype.size
    assert found.stored == 2 * 70 * D * dtype.size
    record_property("threadgroup bytes", found.counts["threadgroup_bytes"])


@pytest.mark.parametrize("window", [256, 1024, 4096])
@pytest.mark.parametrize("tokens", ["first chunk", "two epochs"])
def test_products_are_near_the_least(window: int, tokens: str):
    """Chunks of 2,048, by the count that small launches confirm."""
    from count_prefill import count, wrapped

    ring = wrapped(4, window)
    if tokens == "first chunk":
        ring = Ring(4, window, ring.epoch)
    found = count(layout_of(ring, 2048))
    assert found.visible <= found.fragments <= 1.15 * found.visible
    assert found.fragments <= found.tiles <= found.mask * 1.05


def test_a_whole_chunk():
    """2,048 tokens, for which the docs say what is multiplied, as they are."""
    from count_prefill import count, wrapped

    case = Case((wrapped(4, 256),), mx.float16, 16, n_kv=1, group=1, n=2048)
    check(case)
    (layout,) = case.layouts
    assert report().fragment_products == count(layout).fragments // 64 * 4


def test_the_script_prints_its_table(capsys: pytest.CaptureFixture[str]):
    import count_prefill

    assert count_prefill.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(count_prefill.SHAPES)
    docs = (ROOT / "docs" / "kernels.md").read_text()
    assert all(line in docs for line in lines), "docs/kernels.md holds another table"


def test_tiles_fit():
    """At most 32 KB, 128 threads, and None where nothing fits."""
    for dtype in DTYPES:
        for D in (16, 64, 80, 96, 112, 128, 192, 256):
            assert kernel.tile_of(D, D, dtype) is not None
    assert kernel.tile_of(64, 64, mx.float16) == kernel.Tile(32, 32)
    assert kernel.tile_of(128, 128, mx.bfloat16) == kernel.Tile(32, 16)
    assert kernel.tile_of(256, 256, mx.float32) == kernel.Tile(16, 8)
    assert kernel.tile_of(1024, 1024, mx.float16) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"q": (1, 4, 21, 64)}, "queries must have the tables' 20 rows, got 21"),
        ({"k": (1, 2, 97, 32)}, "keys must have the queries' head_dim of 64, got 32"),
        ({"k": (1, 2, 99, 64), "v": (1, 2, 99, 64)}, "keys must have the 114 rows"),
        ({"v": (1, 2, 116, 64)}, "values must have the keys' heads and rows"),
        ({"learned": (3,)}, "learned_sinks must be"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, tuple[int, ...]], named: str):
    a = prepared(Case(SWITCH, n=20))
    q, k, v, learned = (
        mx.zeros(changes[name]) if name in changes else x
        for name, x in zip(("q", "k", "v", "learned"), (a.q, a.k, a.v, None), strict=True)
    )
    with pytest.raises(KernelError, match=named):
        kernel.prefill(q, k, v, a.tables, scale=1.0, learned_sinks=learned)


def test_tables_for_other_tiles_are_refused():
    case = Case(SWITCH, n=20)
    a = prepared(case)
    layout = case.layouts[0]
    other = prefill_tables(layout, layout.ring.tokens, layout.end, case.rotation, 16)
    with pytest.raises(KernelError, match="tables must be for tiles of 32 queries, got 16"):
        run(case, replace(a, tables=other))
    wide = mx.zeros((1, 4, 20, 1024))
    with pytest.raises(KernelError, match="head_dim whose tiles fit 32 KB, got 1024, 64"):
        kernel.prefill(wide, mx.zeros((1, 2, 117, 1024)), a.v, a.tables, scale=1.0)


def test_too_many_ranges_are_refused():
    layout = layout_of(Ring(0, 20, 60, 40), 12)
    runs = tuple(Run(2 * token, token, 1) for token in range(20, 52))
    with pytest.raises(KernelError, match="at most 8 ranges, got 31"):
        prefill_tables(replace(layout, runs=runs), 40, 52, Rotation([]), 32)


def test_tables_are_made_once_a_step():
    """All layers of a model ask for the same tables."""
    case = Case(SWITCH, n=20)
    layout, rotation = case.layouts[0], case.rotation
    asked = (layout, layout.ring.tokens, layout.end, rotation, 32)
    assert prefill_tables(*asked) is prefill_tables(*asked)


def test_text_is_plain():
    for name in kernel.TEXTS:
        assert "//" not in source.text(name)
        assert max(len(line) for line in source.text(name).splitlines()) <= 99
