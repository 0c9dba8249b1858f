"""Files that are written whole, by threads of one process at once."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from mlx_sink.io import atomic


def test_threads_that_write_one_file_write_it_whole(tmp_path: Path):
    """One's clean-up is not the end of another's unfinished file."""
    file, raised = tmp_path / "f", list[BaseException]()
    barrier = threading.Barrier(6)

    def write(i: int) -> None:
        barrier.wait()
        try:
            for _ in range(20):
                atomic.write_whole(file, bytes([65 + i]) * (1000 * (i + 1)))
                data = file.read_bytes()
                assert set(data) <= {data[0]}
                assert len(data) == 1000 * (data[0] - 64)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not raised
    assert os.listdir(tmp_path) == ["f"]


def test_a_file_within_a_file(tmp_path: Path):
    """A writer may write another file before its own is done."""
    with atomic.whole_file(tmp_path / "a") as outer:
        outer.write(b"1")
        atomic.write_whole(tmp_path / "b", b"2")
        assert os.path.exists(tmp_path / "b")
        assert not os.path.exists(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
