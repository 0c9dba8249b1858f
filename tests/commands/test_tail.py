"""`Tail`: lines as they come, whatever happens to the file, in bounded memory."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from mlx_sink import InputError
from mlx_sink.commands.generate.tail import BLOCK, LONGEST, MARK, Tail


def all_of(tail: Tail) -> list[str]:
    pieces: list[str] = []
    while (piece := tail.next()) is not None:
        pieces.append(piece.text)
    return pieces


def append(file: Path, text: str | bytes) -> None:
    with file.open("ab") as out:
        out.write(text.encode() if isinstance(text, str) else text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.write_text("one\ntwo\n")
    return path


def test_lines_come_when_they_are_whole(file: Path):
    tail = Tail(str(file))
    assert all_of(tail) == ["one\n", "two\n"]
    append(file, "thr")
    assert all_of(tail) == []
    append(file, "ee\n\nfour\r\nfi")
    assert all_of(tail) == ["three\n", "\n", "four\n"]
    assert tail.place["offset"] == len("one\ntwo\nthree\n\nfour\r\n")
    assert not tail.ended


@pytest.mark.parametrize("size", [4095, 4096, 4097, 100_000])
def test_a_long_line_is_cut_alike_however_it_comes(size: int, tmp_path: Path):
    """And never within a character; only real lines are whole."""
    data = ("é€😀x" * 3000 + "\n" + "marker\n" + "a" * LONGEST + "\nend\n").encode()
    file = tmp_path / "log"
    file.write_bytes(b"")
    tail, pieces = Tail(str(file)), []
    for at in range(0, len(data), size):
        append(file, data[at : at + size])
        while (piece := tail.next()) is not None:
            pieces.append(piece)
    assert "".join(p.text for p in pieces).encode() == data
    assert all(len(p.text.encode()) <= LONGEST for p in pieces)
    assert [p.text for p in pieces if p.whole] == ["marker\n", "end\n"]
    other = tmp_path / "other"
    other.write_bytes(data)
    assert all_of(Tail(str(other))) == [p.text for p in pieces]


def test_bytes_that_are_no_text_are_replaced(file: Path):
    tail = Tail(str(file))
    append(file, b"\xff\xfe\n" + b"\x80" * (2 * LONGEST) + b"\n")
    text = "".join(all_of(tail))
    assert text.startswith("one\ntwo\n\ufffd\ufffd\n\ufffd")
    assert tail.place["offset"] == file.stat().st_size


WORDS = "né 😀\n\nmarker\nlast\n"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_lines_of_any_writer_are_the_same_lines(codec: str, end: str, size: int, tmp_path: Path):
    """Whatever the encoding and the line ends, and however the bytes come."""
    mark = "\ufeff" if codec == "utf-16-be" else ""
    data = (mark + WORDS.replace("\n", end)).encode(codec)
    file, pieces = tmp_path / "log", []
    file.write_bytes(b"")
    tail = Tail(str(file))
    for at in range(0, len(data), size):
        append(file, data[at : at + size])
        pieces += all_of(tail)
        tail = Tail(str(file), tail.place)
    if end == "\r":  # half of an end, for all that is known
        assert pieces == WORDS.splitlines(keepends=True)[:-1]
    else:
        assert pieces == WORDS.splitlines(keepends=True)


def test_a_long_line_of_two_byte_units_is_cut_between_characters(tmp_path: Path):
    line = "😀é" * 3000 + "\n"
    file = tmp_path / "log"
    file.write_bytes(line.encode("utf-16"))
    pieces = all_of(Tail(str(file)))
    assert len(pieces) > 3
    assert "".join(pieces) == line


def test_it_says_once_that_bytes_are_no_text(file: Path):
    said: list[str] = []
    tail = Tail(str(file), say=said.append)
    append(file, b"caf\xe9\n\xe9\n")
    all_of(tail)
    assert len(said) == 1
    assert "see byte 11" in said[0]


@pytest.mark.parametrize("lines", [3, 40])
def test_a_file_written_anew_in_place_loses_no_line(lines: int, tmp_path: Path):
    """It outgrows its old size between two looks: nothing but its bytes tells."""
    file, said = tmp_path / "log", []
    file.write_text("".join(f"old {i}\n" for i in range(20)) + "torn")
    tail = Tail(str(file), say=said.append)
    assert len(all_of(tail)) == 20
    new = [f"new line number {i}\n" for i in range(lines)]
    file.write_text("".join(new))
    assert all_of(tail) == ["torn\n", *new]
    assert len(said) == 1
    assert "from its beginning" in said[0]


def test_one_written_anew_while_the_command_was_away(tmp_path: Path):
    """Its end may look as before: its beginning does not."""
    file, said = tmp_path / "log", []
    file.write_text("monday\n" + "beat\n" * 100)
    tail = Tail(str(file))
    all_of(tail)
    file.write_text("sunday\n" + "beat\n" * 200)
    again = Tail(str(file), tail.place, said.append)
    assert len(all_of(again)) == 201
    assert "another one by now" in said[0]


def test_an_endless_line_takes_no_memory():
    """Fifty megabytes without an end, through a pipe."""
    read, write = os.pipe()
    tail = Tail(f"/dev/fd/{read}")
    os.close(read)
    block, seen = b"x" * BLOCK, 0
    tracemalloc.start()
    try:
        for _ in range(800):
            os.write(write, block)
            while (piece := tail.next()) is not None:
                assert not piece.whole
                seen += len(piece.text)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
        os.close(write)
        tail.close()
    assert 800 * BLOCK - seen <= LONGEST


def test_a_rotated_file_is_read_to_its_end_and_then_the_new_one(file: Path):
    said: list[str] = []
    tail = Tail(str(file), say=said.append)
    all_of(tail)
    append(file, "three\nunfinished")
    file.rename(file.with_name("log.1"))
    append(file.with_name("log.1"), " line")
    assert all_of(tail) == ["three\n"]  # there is no new one yet
    file.write_text("new\n")
    append(file.with_name("log.1"), " late\n")
    pieces = [*all_of(tail), *all_of(tail)]
    assert pieces == ["unfinished line late\n", "new\n"]
    assert tail.place["offset"] == 4
    assert len(said) == 1
    assert "replaced" in said[0]


def test_what_a_rotated_file_did_not_finish_is_a_line(file: Path):
    tail = Tail(str(file))
    append(file, "last words")
    file.rename(file.with_name("log.1"))
    file.write_text("new\n")
    assert all_of(tail) == ["one\n", "two\n", "last words\n", "new\n"]


def test_what_comes_just_before_the_new_file_is_not_lost(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    """Written after the last look at the old file, before the look at its name."""
    tail, plain = Tail(str(file)), os.stat

    def stat(path: str) -> os.stat_result:
        monkeypatch.setattr(os, "stat", plain)
        file.rename(file.with_name("log.1"))
        append(file.with_name("log.1"), "late\n")
        file.write_text("new\n")
        return plain(path)

    monkeypatch.setattr(os, "stat", stat)
    assert [*all_of(tail), *all_of(tail)] == ["one\n", "two\n", "late\n", "new\n"]


def test_a_file_cut_off_is_read_from_its_beginning(file: Path):
    said: list[str] = []
    tail = Tail(str(file), say=said.append)
    all_of(tail)
    file.write_text("a\n")
    assert all_of(tail) == ["a\n"]
    assert "cut off" in said[0]
    append(file, "b\n")
    assert all_of(tail) == ["b\n"]


def test_it_goes_on_where_it_was(file: Path):
    tail = Tail(str(file))
    tail.next()
    place = tail.place
    append(file, "three\n")
    assert all_of(Tail(str(file), place)) == ["two\n", "three\n"]
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    assert all_of(Tail(str(copy), place)) == ["two\n", "three\n"]


def test_in_the_middle_of_a_long_line_too(tmp_path: Path):
    file = tmp_path / "log"
    file.write_text("y" * (LONGEST + 10) + "\nnext\n")
    tail = Tail(str(file))
    assert not tail.next().whole  # type: ignore[union-attr] # there is one
    again = Tail(str(file), tail.place)
    rest = again.next()
    assert rest == ("y" * 10 + "\n", False)
    assert again.next() == ("next\n", True)


@pytest.mark.parametrize("content", ["", "other\nwords here\n", "on"])
def test_another_file_is_read_from_its_beginning(content: str, file: Path):
    tail = Tail(str(file))
    all_of(tail)
    said: list[str] = []
    file.write_text(content)
    again = Tail(str(file), tail.place, said.append)
    assert "".join(all_of(again)) == (content if content.endswith("\n") else "")
    assert "another one by now" in said[0]
    assert len(bytes.fromhex(tail.place["mark"])) <= MARK


@pytest.mark.parametrize(("name", "words"), [("nowhere", "No such file"), (".", "a folder")])
def test_what_cannot_be_followed(name: str, words: str, tmp_path: Path):
    with pytest.raises(InputError, match=words):
        Tail(str(tmp_path / name))
