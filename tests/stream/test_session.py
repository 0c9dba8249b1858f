"""Sessions: gone on with exactly, or refused in one line; never half written."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folder import make_folder
from forgery import forged, places, signed
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, KVCache, QuantizedKVCache, RotatingKVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import mlx_sink
from mlx_sink import CacheError, OutputError, SessionError, SinkConfig, Stream
from mlx_sink.io import tensors as store
from mlx_sink.io.tensors import copied, pack, unpack
from mlx_sink.stream import session

CONFIG = SinkConfig(num_sinks=4, window=20, epoch=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return mlx_sink.load(folder, CONFIG)


def fed(loaded: tuple[Any, Any]) -> Stream:
    stream = Stream(*loaded, seed=5, penalty_window=16)
    stream.feed("the cat went to the sea")
    return stream


OPTIONS: dict[str, Any] = {
    "sampler": make_sampler(0.9, top_p=0.95),
    "logits_processors": make_logits_processors(repetition_penalty=1.2),
    "stop": ["zzzz"],
    "ignore_eos": True,
    "flush": False,
}


def write(stream: Stream, n: int) -> tuple[list[int], str]:
    responses = list(stream.generate(n, **OPTIONS))
    return [r.token for r in responses], "".join(r.text for r in responses)


@pytest.mark.parametrize("at", [1, 3, 40, 95])
def test_resumed_text_is_the_uninterrupted_one(at: int, loaded: tuple[Any, Any], tmp_path: Path):
    """Before the wrap, after it, after an epoch: caches, luck, penalties, half characters."""
    tokens, text = write(fed(loaded), 120)
    file = tmp_path / "a session.safetensors"
    stream = fed(loaded)
    first = write(stream, at)
    stream.save(file, {"made": at})
    later = write(stream, 120 - at)
    resumed = Stream.resume(file, *loaded)
    assert resumed.note == {"made": at}
    assert resumed.position == stream.position - (120 - at)
    assert write(resumed, 120 - at) == later
    assert (first[0] + later[0], first[1] + later[1]) == (tokens, text)
    assert os.listdir(tmp_path) == [file.name]


def test_two_streams_of_one_reading(loaded: tuple[Any, Any], tmp_path: Path):
    """What was read stays as it is: neither stream writes into it, or into the other."""
    stream = fed(loaded)
    write(stream, 40)
    stream.save(tmp_path / "s", {"a": [1]})
    saved = session.read(tmp_path / "s")
    (tmp_path / "s").unlink()
    expected = write(stream, 60)
    for _ in range(2):
        resumed = Stream.resume(saved, *loaded)
        assert write(resumed, 60) == expected
        resumed.note["a"].append(2)
    assert saved.note == {"a": [1]}


def test_saved_in_the_middle_of_an_answer(loaded: tuple[Any, Any], tmp_path: Path):
    expected = write(fed(loaded), 50)[0]
    stream, file, got = fed(loaded), tmp_path / "s", []
    for response in stream.generate(50, **OPTIONS):
        got.append(response.token)
        if len(got) == 23:
            stream.save(file)
    assert got == expected
    assert got[:23] + write(Stream.resume(file, *loaded), 27)[0] == expected


def test_saved_while_reading(loaded: tuple[Any, Any], tmp_path: Path):
    """Between two chunks of a long prompt: the rest, read later, leads to the same text."""
    tokens = loaded[1].encode("the cat and the dog and the sea " * 8)
    whole = Stream(*loaded, seed=1)
    whole.feed(tokens, prefill_step_size=16)
    stream, file = Stream(*loaded, seed=1), tmp_path / "s"

    def progress(done: int, total: int) -> None:
        if done == 48:
            stream.save(file, {"read": done})

    stream.feed(tokens, prefill_step_size=16, progress=progress)
    resumed = Stream.resume(file, *loaded)
    with pytest.raises(CacheError, match="read nothing"):
        next(resumed.generate())
    resumed.feed(tokens[48:], prefill_step_size=16)
    assert write(resumed, 40) == write(whole, 40)


def test_an_empty_stream_can_be_saved(loaded: tuple[Any, Any], tmp_path: Path):
    Stream(*loaded, seed=9).save(tmp_path / "s")
    resumed = Stream.resume(tmp_path / "s", *loaded)
    resumed.feed("the cat went to the sea")
    other = Stream(*loaded, seed=9)
    other.feed("the cat went to the sea")
    assert write(resumed, 20) == write(other, 20)


def test_a_stream_without_luck_of_its_own_is_not_saved(loaded: tuple[Any, Any], tmp_path: Path):
    stream = Stream.over(*loaded, loaded[0].make_cache())
    with pytest.raises(CacheError, match="random"):
        stream.save(tmp_path / "s")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision(dtype: Any, folder: Path, tmp_path: Path):
    model, tokenizer = mlx_sink.load(folder, CONFIG)
    model.set_dtype(dtype)
    loaded = model, tokenizer
    stream = fed(loaded)
    write(stream, 30)
    stream.save(tmp_path / "s")
    assert write(Stream.resume(tmp_path / "s", *loaded), 20) == write(stream, 20)


def test_any_tool_can_look_inside(loaded: tuple[Any, Any], tmp_path: Path):
    stream, file = fed(loaded), tmp_path / "s.safetensors"
    stream.save(file)
    arrays, metadata = mx.load(str(file), return_metadata=True)
    assert json.loads(metadata["session"])["position"] == stream.position
    keys = stream.caches[0].keys
    assert any(a.shape == keys.shape and mx.array_equal(a, keys) for a in arrays.values())


# Whose a session is.


def refused(file: Path, loaded: tuple[Any, Any], *words: str) -> None:
    """Expect one line that names the file, and the file as it was."""
    before = file.read_bytes() if file.is_file() else None
    with pytest.raises(SessionError) as caught:
        Stream.resume(file, *loaded)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 200 + len(str(file))
    for word in (repr(str(file)), *words):
        assert word in line
    assert before is None or file.read_bytes() == before


@pytest.fixture(scope="module")
def saved(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    stream = fed(loaded)
    write(stream, 40)
    file = tmp_path_factory.mktemp("sessions") / "good"
    stream.save(file, {"made": 40})
    return file


def test_another_model(saved: Path, folder: Path):
    model, tokenizer = mlx_sink.load(folder, CONFIG)
    model.model.norm.weight = model.model.norm.weight * 1.001
    refused(saved, (model, tokenizer), "another model")


def test_another_tokenizer(saved: Path, loaded: tuple[Any, Any], folder: Path):
    tokenizer = mlx_sink.load(folder, CONFIG)[1]
    tokenizer.add_tokens(["<new>"])
    refused(saved, (loaded[0], tokenizer), "another tokenizer")


def test_another_window(saved: Path, folder: Path):
    loaded = mlx_sink.load(folder, SinkConfig(num_sinks=4, window=21, epoch=32))
    refused(saved, loaded, "window 20, not 21")


def test_not_there_or_not_a_file(loaded: tuple[Any, Any], tmp_path: Path):
    refused(tmp_path / "nowhere", loaded, "No such file")
    refused(tmp_path, loaded)
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", loaded, "not a file")


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 4000, b"\xff" * 4000])
def test_foreign_files(content: bytes, loaded: tuple[Any, Any], tmp_path: Path):
    (tmp_path / "f").write_bytes(content)
    refused(tmp_path / "f", loaded, "not a session")


def test_other_safetensors(loaded: tuple[Any, Any], folder: Path, tmp_path: Path):
    refused(folder / "model.safetensors", loaded, "not a session")


# Files that a damaged disk, or someone, changed.


def tensor(header: dict[str, Any]) -> dict[str, Any]:
    return next(v for k, v in header.items() if k.startswith("cache.0"))


FORGERIES: dict[str, Any] = {
    "huge shape": lambda h, s: tensor(h).update(shape=[1 << 30, 1 << 30, 1 << 30]),
    "huge shape and offsets": lambda h, s: tensor(h).update(
        shape=[1 << 30, 1 << 10], data_offsets=[0, 1 << 42]
    ),
    "beyond 64 bits": lambda h, s: tensor(h).update(shape=[1 << 80]),
    "nothing, hugely": lambda h, s: tensor(h).update(shape=[0, 1 << 40]),
    "negative": lambda h, s: tensor(h).update(shape=[-1, -4]),
    "no integer": lambda h, s: tensor(h).update(shape=[1.5]),
    "a hundred axes": lambda h, s: tensor(h).update(shape=[1] * 100),
    "unknown type": lambda h, s: tensor(h).update(dtype="F8_E4M3"),
    "another type": lambda h, s: tensor(h).update(dtype="I32"),
    "overlapping": lambda h, s: tensor(h).update(data_offsets=[8, 16]),
    "no offsets": lambda h, s: tensor(h).pop("data_offsets"),
    "a tensor is a list": lambda h, s: h.update({"cache.0.0": []}),
    "another format": lambda h, s: h["__metadata__"].update(format="mlx_sink session 999"),
    "format no text": lambda h, s: h["__metadata__"].update(format=["x" * 1000]),
    "more data": lambda h, s: b"\0" * 100_000,
    "no caches": lambda h, s: s.update(caches=[]),
    "cache of another kind": lambda h, s: s["caches"][0].__setitem__(0, "KVCache"),
    "class of anything": lambda h, s: s["caches"][0].__setitem__(0, "os.system"),
    "cache without a state": lambda h, s: s["caches"][0].__setitem__(1, {"tuple": []}),
    "state of a missing tensor": lambda h, s: s["caches"][0].__setitem__(1, {"array": "x"}),
    "state of an unknown kind": lambda h, s: s["caches"][0].__setitem__(1, {"pickle": "x"}),
    "state a list": lambda h, s: s["caches"][0].__setitem__(1, []),
    "negative integers": lambda h, s: s["caches"][0][1]["tuple"].__setitem__(5, -3),
    "text for integers": lambda h, s: s["caches"][0][1]["tuple"].__setitem__(5, "3"),
    "moved cache": lambda h, s: s["caches"][1][1]["tuple"].__setitem__(5, 12345),
    "position": lambda h, s: s.update(position=-1),
    "position a list": lambda h, s: s.update(position=[1]),
    "position of no cache": lambda h, s: s.update(position=7),
    "penalty window": lambda h, s: s.update(penalty_window=1 << 90),
    "recent": lambda h, s: s.update(recent=["a"]),
    "text": lambda h, s: s.update(text=[1]),
    "text of another kind": lambda h, s: s["text"].__setitem__(1, ["zz", 1, 2]),
    "note": lambda h, s: s.update(note=3),
    "no owner": lambda h, s: s.pop("whose"),
    "settings": lambda h, s: s.update(config=[]),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_headers(name: str, saved: Path, loaded: tuple[Any, Any], tmp_path: Path):
    """Even with the right sum: nothing is allocated or called because a header says so."""
    (tmp_path / "f").write_bytes(forged(saved, FORGERIES[name]))
    refused(tmp_path / "f", loaded)


VALUES: list[Any] = [
    None, True, -1, 0, 1, 1.5, 1 << 31, 1 << 80, float("nan"), "", "x", "9" * 1000,
    [], [1], [[1]], [0] * 100, {}, {"a": 1}, {"array": "cache.0.0"}, {"tuple": []},
]  # fmt: skip


def test_random_forgeries_are_refused_or_go_on(
    saved: Path, loaded: tuple[Any, Any], tmp_path: Path
):
    """Any value for any other, signed: what is believed can be gone on with, and nothing fails."""
    random, refusals, taken = np.random.default_rng(1), [], 0
    file = tmp_path / "f"

    def change(header: dict[str, Any], session: dict[str, Any]) -> None:
        root = session if random.random() < 0.8 else header
        everywhere = [place for place in places(root)[1:] if place != ("__metadata__",)]
        *way, last = everywhere[random.integers(len(everywhere))]
        for key in way:
            root = root[key]
        root[last] = VALUES[random.integers(len(VALUES))]

    for _ in range(300):
        file.write_bytes(forged(saved, change))
        try:
            stream = Stream.resume(file, *loaded)
        except SessionError as error:
            refusals.append(str(error))
        else:
            assert len(write(stream, 2)[0]) == 2
            taken += 1
    assert len(refusals) > 200 > taken > 0
    assert not any("\n" in line for line in refusals)


def test_a_forgery_that_changes_nothing_is_taken(
    saved: Path, loaded: tuple[Any, Any], tmp_path: Path
):
    """Without this the table above could pass because nothing forged is ever sound."""
    (tmp_path / "f").write_bytes(forged(saved, lambda h, s: None))
    assert Stream.resume(tmp_path / "f", *loaded).note == {"made": 40}


@pytest.mark.parametrize(
    "bomb", [b"[" * 900_000, b'{"a":' * 150_000, b"[]," * 300_000, b"1" * 900_000]
)
def test_json_bombs(bomb: bytes, loaded: tuple[Any, Any], tmp_path: Path):
    header = store.START + store.NO_SUM + b'","x":"y"},"a":' + bomb
    (tmp_path / "f").write_bytes(signed(header, b""))
    refused(tmp_path / "f", loaded, "not a session")


def test_a_header_longer_than_the_file(saved: Path, loaded: tuple[Any, Any], tmp_path: Path):
    content = saved.read_bytes()
    for length in (0, 1, len(content), 1 << 30, (1 << 64) - 1):
        (tmp_path / "f").write_bytes(struct.pack("<Q", length) + content[8:])
        refused(tmp_path / "f", loaded, "damaged")


def mutated(content: bytes, random: np.random.Generator, n: int) -> bytes:
    """Change a file as disks, copies and people do: the n-th way of five."""
    length = struct.unpack("<Q", content[:8])[0]
    data = bytearray(content)
    if n % 5 == 0:
        return content[: random.integers(0, len(content))]
    if n % 5 == 1:
        at = random.integers(0, len(content))
        data[at] ^= 1 << int(random.integers(0, 8))
    elif n % 5 == 2:
        at = random.integers(0, 8 + length)
        data[at] ^= 1 << int(random.integers(0, 8))
    elif n % 5 == 3:
        at = random.integers(0, len(content) - 64)
        data[at : at + 64] = random.bytes(64)
    else:
        at = random.integers(0, len(content))
        data[at:at] = random.bytes(int(random.integers(1, 5000)))
    return bytes(data)


PEAK = """
import resource, sys
from pathlib import Path
from mlx_sink import SessionError
from mlx_sink.io import tensors as store
import mlx.core as mx
mx.eval(mx.zeros(4))
folder = Path(sys.argv[1])
files = sorted(folder.iterdir())
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0
for file in files:
    try:
        store.read(file)
    except SessionError as error:
        assert len(str(error).splitlines()) == 1
        refused += 1
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
print(len(files), refused, peak)
"""


def test_five_hundred_damaged_files(saved: Path, loaded: tuple[Any, Any], tmp_path: Path):
    """Each refused, none believed, none crashes, and next to no memory is taken by any."""
    content, random = saved.read_bytes(), np.random.default_rng(0)
    for n in range(500):
        (tmp_path / f"{n:03}").write_bytes(mutated(content, random, n))
    changes = [lambda h, s, n=n: tensor(h).update(shape=[n]) for n in (1 << 20, 1 << 31, 1 << 62)]
    for n, change in enumerate(changes):
        (tmp_path / f"forged {n}").write_bytes(forged(saved, change))
    for n, bomb in enumerate([b"[" * 900_000, b"[]," * 300_000, b'{"a":' * 150_000]):
        header = store.START + store.NO_SUM + b'","x":"y"},"a":' + bomb
        (tmp_path / f"bomb {n}").write_bytes(signed(header, b""))
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    files, refusals, peak = map(int, run.stdout.split())
    assert files == refusals == 506
    assert peak < 100e6 + len(content)
    for name in ("000", "001", "002", "003", "004"):
        refused(tmp_path / name, loaded)


# Writing.


class FullDisk:
    """A file that takes only so many bytes."""

    def __init__(self, file: Any, room: int):
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@pytest.mark.parametrize("room", [0, 3000, 8000])
def test_a_full_disk_leaves_the_session_before(
    room: int, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stream, file = fed(loaded), tmp_path / "s"
    stream.save(file)
    before, plain = file.read_bytes(), os.fdopen
    write(stream, 10)
    with monkeypatch.context() as patch:
        patch.setattr(store.os, "fdopen", lambda *a: FullDisk(plain(*a), room))
        with pytest.raises(OutputError, match=r"cannot save .*No space left"):
            stream.save(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]
    stream.save(file)
    assert Stream.resume(file, *loaded).position == stream.position


@pytest.mark.parametrize("call", ["fdopen", "fsync", "replace"])
def test_an_error_at_any_call_leaves_no_stray_file(
    call: str, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stream, file = fed(loaded), tmp_path / "s"
    stream.save(file)
    before = file.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(store.os, call, fail)
    with pytest.raises(OutputError, match="error"):
        stream.save(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["s"]


def test_a_small_file_system(loaded: tuple[Any, Any], tmp_path: Path):
    """A disk that is really full, where root may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        stream, file = fed(loaded), place / "s"
        stream.save(file)
        before = file.read_bytes()
        (place / "rest").write_bytes(b"x" * (128 * 1024 - len(before) - 8192))
        write(stream, 10)
        with pytest.raises(OutputError, match="No space left"):
            stream.save(file)
        assert file.read_bytes() == before
        assert sorted(os.listdir(place)) == ["rest", "s"]
        (place / "rest").unlink()
        stream.save(file)
        assert write(Stream.resume(file, *loaded), 5) == write(stream, 5)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_dead_writers_files_are_removed(loaded: tuple[Any, Any], tmp_path: Path):
    """And nothing else: not those of a writer that lives, nor what only looks like one."""
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], text=True,
                          capture_output=True, check=True).stdout.strip()  # fmt: skip
    gone = [f".s.{dead}.tmp", f".s.{os.getpid()}.tmp", f".s.{10**30}.tmp"]
    kept = [f".s.{os.getppid()}.tmp", f".other.{dead}.tmp", f"s.{dead}.tmp", ".s.x.tmp"]
    for name in gone + kept:
        (tmp_path / name).write_bytes(b"x")
    fed(loaded).save(tmp_path / "s")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "s"])


def test_a_link_stays_a_link(loaded: tuple[Any, Any], tmp_path: Path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "s")
    fed(loaded).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "far") == ["s"]
    assert Stream.resume(tmp_path / "link", *loaded).position > 0


def test_no_such_folder(loaded: tuple[Any, Any], tmp_path: Path):
    with pytest.raises(OutputError, match="No such file"):
        fed(loaded).save(tmp_path / "nowhere" / "s")


# Trees, and mlx-lm's own caches.

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
)


@given(TREES)
def test_any_tree_comes_back(tree: Any):
    arrays: dict[str, mx.array] = {}
    assert unpack(json.loads(json.dumps(pack(tree, "t", arrays))), arrays) == tree


def test_what_is_no_value_is_refused():
    with pytest.raises(CacheError, match="object"):
        pack([object()], "t", {})


@pytest.mark.parametrize("dtype", list(store.NAMES))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_every_type_and_shape(dtype: Any, shape: tuple[int, ...], tmp_path: Path):
    with mx.stream(mx.cpu):
        array = mx.arange(6)[: int(np.prod(shape))].reshape(shape).astype(dtype)
        store.write(tmp_path / "f", {"a": 1}, {"x": array, "y": mx.array([1.5])})
        note, arrays = store.read(tmp_path / "f")
        assert note == {"a": 1}
        assert arrays["x"].dtype == dtype
        assert arrays["x"].shape == shape
        assert mx.array_equal(arrays["x"], array).item()
        assert arrays["y"].item() == 1.5


def test_states_of_mlx_lm_s_caches():
    """Nothing depends on our own cache: whatever has a ``state`` is saved and copied."""
    rows = mx.random.normal((1, 2, 5, 64))
    caches: list[Any] = [KVCache(), RotatingKVCache(max_size=4, keep=1), QuantizedKVCache()]
    for cache in caches:
        cache.update_and_fetch(rows, rows)
    mixed = ArraysCache(3)
    mixed[0], mixed[2] = rows, rows[:, :1]
    for cache in [*caches, mixed]:
        arrays: dict[str, mx.array] = {}
        packed = json.loads(json.dumps(pack(cache.state, "c", arrays)))
        again = type(cache).from_state(unpack(packed, arrays))
        first, second = {}, {}
        assert pack(again.state, "c", first) == pack(cache.state, "c", second)
        assert all(mx.array_equal(first[name], second[name]) for name in second)
    keys, *_ = copied(caches[0].state)
    keys[...] = 0
    assert mx.abs(caches[0].keys).max().item() > 0
