"""`Stream`: feed, generate, cancel, fork, and threads; `ShownText`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from folder import make_folder
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import mlx_sink
from mlx_sink import CacheError, InputError, SinkConfig, Stream
from mlx_sink.models.attach import make_cache
from mlx_sink.stream.text.stop_strings import ShownText, StopStrings

CONFIG = SinkConfig(num_sinks=4, window=20, epoch=32)
SAMPLER = make_sampler(0.9, top_p=0.95)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return mlx_sink.load(make_folder(tmp_path_factory.mktemp("models") / "plain"), CONFIG)


def write(stream: Stream, n: int, **options: Any) -> tuple[list[int], str]:
    options = {"sampler": SAMPLER, "ignore_eos": True, "flush": False} | options
    responses = list(stream.generate(n, **options))
    return [r.token for r in responses], "".join(r.text for r in responses)


def fed(loaded: tuple[Any, Any], seed: int = 1, text: str = "the cat went") -> Stream:
    stream = Stream(*loaded, seed=seed)
    stream.feed(text)
    return stream


def test_the_functions_are_uses_of_it(loaded: tuple[Any, Any]):
    mx.random.seed(3)
    text = mlx_sink.generate(*loaded, "the cat went", 50, sampler=SAMPLER, ignore_eos=True)
    stream = fed(loaded, seed=3)
    assert write(stream, 50, flush=True)[1] == text
    assert stream.position == len(stream.tokenizer.encode("the cat went")) + 50
    assert stream.nbytes == sum(c.nbytes for c in stream.caches) > 0
    assert stream.model is loaded[0]


def test_pieces_make_the_same_text(loaded: tuple[Any, Any]):
    """Any number of generate calls, characters and stop strings over their borders included."""
    processors = make_logits_processors(repetition_penalty=1.1)
    options: dict[str, Any] = {"logits_processors": processors, "stop": ["zzzz", "eee"]}
    expected = write(fed(loaded), 90, **options)
    stream = fed(loaded)
    pieces = [write(stream, n, **options) for n in (1, 1, 5, 30, 53)]
    assert [t for tokens, _ in pieces for t in tokens] == expected[0]
    assert "".join(text for _, text in pieces) == expected[1]


def test_breaking_off_the_loop_loses_nothing(loaded: tuple[Any, Any]):
    expected, _ = write(fed(loaded), 40)
    stream, got = fed(loaded), []
    for n in (3, 17, 20):
        responses = stream.generate(-1, sampler=SAMPLER, ignore_eos=True)
        got += [response.token for _, response in zip(range(n), responses, strict=False)]
        responses.close()  # type: ignore[attr-defined] # it is a generator
    assert got == expected


def test_text_is_fed_as_the_tokenizer_reads_it(loaded: tuple[Any, Any]):
    """The special tokens at the beginning of the stream, and nowhere else."""
    stream = Stream(*loaded)
    bos = stream.tokenizer.bos_token_id
    assert stream.encode("the cat")[0] == bos
    stream.feed("the cat")
    assert bos not in stream.encode("the cat")
    rendered = Stream(*loaded).encode("<s>the cat", special=True)
    assert rendered == Stream(*loaded).encode("the cat")
    tokens = stream.encode(" and the dog")
    assert stream.feed(mx.array(tokens)) == len(tokens)


def test_half_a_character_is_kept_or_handed_out(loaded: tuple[Any, Any]):
    """At ``max_tokens`` the text may end in the middle of a character, or of a stop string."""
    vocabulary = loaded[1].get_vocab()
    forced = [vocabulary[c] for c in ("Ã", "©")]

    def force(tokens: mx.array, logits: mx.array) -> mx.array:
        wanted = forced[1] if tokens[-1].item() == forced[0] else forced[0]
        return mx.where(mx.arange(logits.shape[-1]) == wanted, 1e9, logits)

    stream = fed(loaded)
    options: dict[str, Any] = {"logits_processors": [force]}
    assert write(stream, 1, **options)[1] == ""
    assert write(stream, 2, **options)[1] == "é"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert write(fed(loaded), 1, **options, flush=True)[1] == "\ufffd"


def test_an_old_answer_does_not_go_on(loaded: tuple[Any, Any]):
    stream = fed(loaded)
    old = stream.generate(10)
    next(old)
    stream.feed("the dog")
    with pytest.raises(InputError, match="moved on"):
        next(old)


@pytest.mark.parametrize("n", [0, -2])
def test_bad_numbers(loaded: tuple[Any, Any], n: int):
    with pytest.raises(InputError, match="max_tokens"):
        fed(loaded).generate(n)
    with pytest.raises(InputError, match="penalty_window"):
        Stream(*loaded, penalty_window=n)
    with pytest.raises(InputError, match="prefill_step_size"):
        Stream(*loaded).feed("the cat", prefill_step_size=n)


def test_nothing_to_read_or_to_go_on_from(loaded: tuple[Any, Any]):
    with pytest.raises(InputError, match="empty"):
        Stream(*loaded).feed([])
    with pytest.raises(CacheError, match="read nothing"):
        next(Stream(*loaded).generate())


def test_forks_go_their_own_ways(loaded: tuple[Any, Any]):
    """A copy goes on as the original would, and neither changes the other: caches, text, luck."""
    expected = write(fed(loaded), 80)
    stream = fed(loaded)
    begun = write(stream, 30)
    fork, other = stream.fork(), stream.fork()
    other.feed("the dog and the sea")
    write(other, 30)
    rest = write(fork, 50)
    assert (begun[0] + rest[0], begun[1] + rest[1]) == expected
    assert write(stream, 50) == rest
    assert fork.position == stream.position


def test_a_fork_in_the_middle_of_an_answer(loaded: tuple[Any, Any]):
    expected, _ = write(fed(loaded), 40)
    stream = fed(loaded)
    responses = stream.generate(40, sampler=SAMPLER, ignore_eos=True, flush=False)
    got = [next(responses).token for _ in range(15)]
    fork = stream.fork()
    assert got + write(fork, 25)[0] == expected
    assert got + [r.token for r in responses] == expected


def test_two_threads_on_one_model(loaded: tuple[Any, Any]):
    """Each stream draws and writes what it does alone, whatever runs beside it."""
    alone = {seed: write(fed(loaded, seed), 60) for seed in (1, 2, 3)}
    assert alone[1] != alone[2]
    together: dict[int, Any] = {}
    start = threading.Barrier(3)

    def run(seed: int) -> None:
        start.wait(timeout=60)
        together[seed] = write(fed(loaded, seed), 60)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert together == alone


def test_a_model_first_used_in_threads(tmp_path: Path):
    """What the first call builds and keeps may not belong to the thread that made it."""
    loaded = mlx_sink.load(make_folder(tmp_path / "fresh"), CONFIG)
    results: list[Any] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: results.append(write(fed(loaded), 40)))
        thread.start()
        thread.join(timeout=60)
    assert [*results, write(fed(loaded), 40)] == [results[0]] * 3


def test_a_stream_moves_from_thread_to_thread(loaded: tuple[Any, Any]):
    expected, _ = write(fed(loaded), 40)
    stream, got = fed(loaded), []
    for _ in range(4):
        thread = threading.Thread(target=lambda: got.extend(write(stream, 10)[0]))
        thread.start()
        thread.join(timeout=60)
    assert got == expected


@pytest.mark.parametrize("kind", ["new", "forked", "resumed"])
def test_what_one_thread_makes_another_may_use(kind: str, loaded: tuple[Any, Any], tmp_path: Path):
    """MLX computes lazily, and only in the thread in which an array came to be."""
    made: list[Stream] = []

    def make() -> None:
        stream = Stream(*loaded)
        if kind != "new":
            stream.feed("the cat")
            stream.save(tmp_path / "s")
            stream = stream.fork() if kind == "forked" else Stream.resume(tmp_path / "s", *loaded)
        made.append(stream)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join(timeout=60)
    made[0].feed("the dog")
    assert len(write(made[0], 20)[0]) == 20


def test_one_stream_is_for_one_thread_at_a_time(loaded: tuple[Any, Any]):
    """The other is told, rather than both writing into the same caches."""
    stream, told = fed(loaded), []

    def intrude(tokens: mx.array, logits: mx.array) -> mx.array:
        def feed() -> None:
            with pytest.raises(CacheError, match="another thread"):
                stream.fork()
            told.append(True)

        thread = threading.Thread(target=feed)
        thread.start()
        thread.join(timeout=60)
        return logits

    write(stream, 1, logits_processors=[intrude])
    assert told


def test_cancel_from_another_thread(loaded: tuple[Any, Any]):
    """No token more than the one that was under way; the stream goes on from there."""
    expected, _ = write(fed(loaded), 60)
    stream, got = fed(loaded), []
    for response in stream.generate(-1, sampler=SAMPLER, ignore_eos=True):
        got.append(response.token)
        assert response.finish_reason is None
        assert len(got) <= 20
        if len(got) == 20:
            canceller = threading.Thread(target=stream.cancel)
            canceller.start()
            canceller.join(timeout=60)
    assert got == expected[:20]
    assert got + write(stream, 40)[0] == expected


def test_cancel_while_reading(loaded: tuple[Any, Any]):
    stream = Stream(*loaded, seed=1)
    tokens = stream.encode("the cat and the dog " * 10)

    def progress(done: int, total: int) -> None:
        assert total == len(tokens)
        if done >= 12:
            stream.cancel()

    assert stream.feed(tokens, prefill_step_size=4, progress=progress) == 13 == stream.position
    other = Stream(*loaded, seed=1)
    other.feed(tokens[:13], prefill_step_size=4)
    assert write(stream, 10) == write(other, 10)


def test_cancel_before_anything_runs_does_nothing(loaded: tuple[Any, Any]):
    stream = fed(loaded)
    stream.cancel()
    assert len(write(stream, 5)[0]) == 5


def test_a_stream_over_given_caches(loaded: tuple[Any, Any]):
    """What `stream_generate` builds on: it stands where the caches stand."""
    caches: list[Any] = list(make_cache(loaded[0]))
    list(mlx_sink.stream_generate(*loaded, "the cat", 5, prompt_cache=caches, ignore_eos=True))
    assert Stream.over(*loaded, caches).position == caches[0].tokens


class Letters:
    """A detokenizer whose tokens are letters."""

    def feed(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return ""

    def state(self) -> list[Any]:
        return []

    def restore(self, state: list[Any]) -> None:
        pass


def test_a_text_is_saved_with_what_it_holds_back():
    text = ShownText(Letters(), ["stop it"])
    assert "".join(text.feed(ord(c)) for c in "do not sto") == "do not "
    again = ShownText.restored(Letters(), text.state())
    assert "".join(again.feed(ord(c)) for c in "p it") == ""
    assert again.stopped
    assert text.finish() == "sto"


def test_searching_for_stop_strings_keeps_no_more_than_the_longest():
    search = StopStrings(["aaab", "b" * 20])
    shown = "".join(search.feed(c) for c in "aa" * 5000)
    assert len(search.held) <= 3
    assert len(shown) == 10000 - len(search.held)
