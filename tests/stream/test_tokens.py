"""Tokens from outside: what is no token of the model is refused wherever it comes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from folder import make_folder
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from tiny import VOCABULARY, build

import mlx_sink
from mlx_sink import InputError, SessionError, SinkConfig, Stream, attach, stream_generate
from mlx_sink.commands.generate.command import main
from mlx_sink.io import tensors
from mlx_sink.measure.calibrate import calibrate
from mlx_sink.stream.text.tokens import token_ids

CONFIG = SinkConfig(num_sinks=2, window=20)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return mlx_sink.load(make_folder(tmp_path_factory.mktemp("models") / "plain"), CONFIG)


def rows(loaded: tuple[Any, Any]) -> int:
    return loaded[0].model.embed_tokens.weight.shape[0]


GOOD = {
    "list": [1, 2, 3],
    "tuple": (1, 2, 3),
    "range": range(1, 4),
    "generator": (n for n in (1, 2, 3)),
    "numpy": np.array([1, 2, 3]),
    "numpy, uint8": np.array([1, 2, 3], np.uint8),
    "mlx": mx.array([1, 2, 3]),
    "mlx, uint32": mx.array([1, 2, 3], mx.uint32),
    "numpy integers": [np.int64(1), 2, np.int32(3)],
    "mlx integers": [mx.array(1), 2, 3],
}


@pytest.mark.parametrize("name", GOOD)
def test_tokens_of_every_kind(name: str):
    ids = token_ids(GOOD[name], 4)
    assert ids == [1, 2, 3]
    assert all(type(i) is int for i in ids)


BAD: dict[str, tuple[Any, str]] = {
    "far beyond": ([1, 99_999_999], "token 99999999 at place 1"),
    "just beyond": ([279], "token 279 at place 0"),
    "huge": ([2**70], f"token {2**70} "),
    "negative": ([3, 2, -1], "token -1 at place 2"),
    "array beyond": (mx.array([5, 4000]), "token 4000 at place 1"),
    "numpy beyond": (np.array([5, 4000]), "token 4000 at place 1"),
    "bools": ([True, False], "got True (bool) at place 0"),
    "bools of numpy": (np.array([True]), "got True (bool) at place 0"),
    "bool of numpy": ([1, np.bool_(True)], "at place 1"),
    "floats": ([1.0], "got 1.0 (float) at place 0"),
    "floats of mlx": (mx.array([1.5]), "got 1.5 (float) at place 0"),
    "floats of numpy": (np.array([1.5]), "got 1.5 (float) at place 0"),
    "float of mlx": ([mx.array(1.5)], "at place 0"),
    "nested": ([[1, 2]], "got [1, 2] (list) at place 0"),
    "nested array": (mx.array([[1, 2]]), "got [1, 2] (list) at place 0"),
    "nested numpy": (np.array([[1, 2]]), "got [1, 2] (list) at place 0"),
    "words": (["the", "cat"], "got 'the' (str) at place 0"),
    "nothing": ([None], "got None (NoneType) at place 0"),
    "bytes": (b"the", "(bytes)"),
    "a number": (7, "got 7 (int)"),
    "no array": (mx.array(7), "got 7 (int)"),
    "none": (None, "(NoneType)"),
    "a set": ({1, 2}, "(set)"),
    "a mapping": ({1: 2}, "(dict)"),
    "a tokenizer's result": ({"input_ids": [1]}, "pass its input_ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_stream_takes_none_of_it(name: str, loaded: tuple[Any, Any]):
    tokens, message = BAD[name]
    stream = Stream(*loaded)
    stream.feed([1, 2])
    with pytest.raises(InputError) as caught:
        stream.feed(tokens)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert stream.position == 2
    stream.feed([3])


@pytest.mark.parametrize("name", ["far beyond", "negative", "array beyond", "bools", "nested"])
def test_neither_do_the_functions(name: str, loaded: tuple[Any, Any]):
    tokens, message = BAD[name]
    for run in (mlx_sink.generate, lambda *a: list(stream_generate(*a))):
        with pytest.raises(InputError) as caught:
            run(*loaded, tokens, 3)
        assert message in str(caught.value)


def test_the_last_row_is_read(loaded: tuple[Any, Any]):
    Stream(*loaded).feed([rows(loaded) - 1, 0])


@pytest.fixture
def too_many_words(tmp_path: Path) -> Path:
    """A model whose tokenizer has words that the embedding has no row for."""
    folder = make_folder(tmp_path / "more")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    word = tokenizer["added_tokens"][0] | {"id": 279, "content": "whale", "special": False}
    tokenizer["added_tokens"].append(word)
    file.write_text(json.dumps(tokenizer))
    return folder


def test_words_that_the_model_does_not_have(too_many_words: Path, tmp_path: Path):
    model, tokenizer = mlx_sink.load(too_many_words, CONFIG)
    assert tokenizer.encode("whale", add_special_tokens=False) == [279]
    with pytest.raises(InputError, match=r"token 279 \('whale'\)"):
        Stream(model, tokenizer).feed("the cat and the whale")
    with pytest.raises(InputError, match=r"token 279 \('whale'\)"):
        mlx_sink.generate(model, tokenizer, "the whale", 3)
    with pytest.raises(InputError, match=r"token 279 \('whale'\)"):
        calibrate(model, tokenizer, "the whale and the sea " * 100)
    log = tmp_path / "log"
    log.write_text("the sea\nthe whale\nASK\n")
    argv = ["--model", str(too_many_words), "-m", "2"]
    for more in (["-p", "a whale"], ["--follow", str(log), "--marker", "ASK"]):
        with pytest.raises(InputError, match=r"token 279 \('whale'\)"):
            main([*argv, *more])


@pytest.mark.parametrize("word", ["99999999", "279", "-1", "nonsense", "the cat"])
def test_an_extra_end_that_is_no_token(word: str, tmp_path: Path):
    """With XTC it would be looked up, and written, beyond the logits."""
    folder = make_folder(tmp_path / "plain")
    argv = ["--model", str(folder), "-p", "the", "-m", "2", "--extra-eos-token=" + word]
    with pytest.raises(InputError, match="--extra-eos-token"):
        main([*argv, "--temp", "1", "--xtc-probability", "1"])


def test_ends_of_a_tokenizer_that_the_model_does_not_have(
    loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    folder = make_folder(tmp_path / "plain", eos_token_id=[1, 99_999_999])
    sampling = ["--temp", "1", "--xtc-probability", "1", "--top-k", "5", "--seed", "3"]
    texts: list[str] = []
    for model in (folder, make_folder(tmp_path / "other")):
        assert main(["--model", str(model), "-p", "the", "-m", "20", *sampling]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


# What a model makes itself.


class Uneven(nn.Module):
    """A model with a head of another width than its embedding."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        inner = build("llama", vocab_size=rows, tie_word_embeddings=True)
        self.inner, self.layers = inner.model, inner.layers
        self.args = inner.args
        self.head = nn.Linear(32, width, bias=False)
        self.head.weight = 3 * mx.random.normal((width, 32), key=mx.random.key(5))

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return self.head(self.inner(tokens, cache=cache))


def uneven(rows: int, width: int, rollback: int = 0) -> nn.Module:
    model = Uneven(rows, width)
    attach(model, SinkConfig(2, 16, rollback=rollback))
    return model


def test_a_wider_head_never_writes_what_cannot_be_read(loaded: tuple[Any, Any]):
    """Padded heads have columns that were never trained, and no rows to go with them."""
    stream = Stream(uneven(40, 400), loaded[1], seed=1)
    stream.feed([1, 2, 3])
    options = {"sampler": make_sampler(1.0), "ignore_eos": True}
    responses = list(stream.generate(60, **options))
    assert max(response.token for response in responses) < 40
    assert all(response.logprobs.shape == (40,) for response in responses)
    np.testing.assert_allclose([mx.exp(r.logprobs).sum() for r in responses], 1, rtol=1e-5)


def test_a_wider_head_is_saved_and_resumed(loaded: tuple[Any, Any], tmp_path: Path):
    model = uneven(40, 400)
    options = {"sampler": make_sampler(1.0), "ignore_eos": True}

    def take(stream: Stream, n: int) -> list[int]:
        return [response.token for response in stream.generate(n, **options)]

    whole = Stream(model, loaded[1], seed=1)
    whole.feed([1, 2, 3])
    stream = Stream(model, loaded[1], seed=1)
    stream.feed([1, 2, 3])
    begun = take(stream, 10)
    stream.save(tmp_path / "s")
    again = Stream.resume(tmp_path / "s", model, loaded[1])
    assert begun + take(again, 20) == take(whole, 30)


def test_tokens_without_a_logit_are_not_penalised(loaded: tuple[Any, Any]):
    """Rows of pictures, say: a processor that looks their logits up would read past the end."""
    tokens: list[list[int]] = []
    processors = make_logits_processors(repetition_penalty=1.5, repetition_context_size=20)
    for prompt in ([1, 2, 399, 398, 3], [1, 2, 399, 398, 3]):
        seen: list[list[int]] = []

        def spy(history: mx.array, logits: mx.array, seen: list[list[int]] = seen) -> mx.array:
            seen.append(history.tolist())
            return logits

        stream = Stream(uneven(400, 40), loaded[1], seed=1)
        stream.feed(prompt)
        options = {"ignore_eos": True, "logits_processors": [spy, *processors]}
        tokens.append([response.token for response in stream.generate(10, **options)])
        assert seen[0] == [1, 2, 3]
    assert tokens[0] == tokens[1]


def test_a_draft_of_other_sizes_changes_nothing(loaded: tuple[Any, Any]):
    """Its embedding smaller, its head wider or narrower than the model's."""
    processors = make_logits_processors(repetition_penalty=1.3, repetition_context_size=20)
    options: dict[str, Any] = {"sampler": make_sampler(0.9), "logits_processors": processors}

    def take(draft: nn.Module | None) -> list[int]:
        model = uneven(64, 64, rollback=3)
        stream = Stream(model, loaded[1], seed=1, draft_model=draft)
        stream.feed([1, 63, 50, 2])
        return [r.token for r in stream.generate(40, ignore_eos=True, **options)]

    alone = take(None)
    assert max(alone) > 50
    for rows, width in ((40, 40), (40, 400), (64, 20), (400, 64)):
        assert take(uneven(rows, width, rollback=3)) == alone


def test_a_draft_reads_only_what_it_has_rows_for(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    draft, read = uneven(40, 400, rollback=3), list[int]()
    forward = Uneven.__call__

    def noted(self: Uneven, tokens: mx.array, cache: Any = None) -> mx.array:
        if self is draft:
            read.append(tokens.max().item())
        return forward(self, tokens, cache=cache)

    monkeypatch.setattr(Uneven, "__call__", noted)
    stream = Stream(uneven(64, 64, rollback=3), loaded[1], seed=1, draft_model=draft)
    stream.feed([1, 63, 50, 2])
    made = stream.generate(40, sampler=make_sampler(1.0), ignore_eos=True)
    assert max(response.token for response in made) > 50
    assert max(read) == 39


def test_a_session_with_tokens_of_another_vocabulary(loaded: tuple[Any, Any], tmp_path: Path):
    model = uneven(64, 400)
    stream = Stream(model, loaded[1], seed=1)
    stream.feed([1, 2, 3])
    stream.save(tmp_path / "s")
    note, arrays = tensors.read(tmp_path / "s")
    for token, fits in ((63, True), (64, False), (399, False), (-1, False), (True, False)):
        tensors.write(tmp_path / "t", note | {"recent": [1, 2, token]}, arrays)
        if fits:
            Stream.resume(tmp_path / "t", model, loaded[1])
        else:
            with pytest.raises(SessionError, match=r"does not fit the model|that no stream has"):
                Stream.resume(tmp_path / "t", model, loaded[1])


def test_quantised_embeddings_are_checked_too(loaded: tuple[Any, Any]):
    model = build("llama", hidden_size=64, intermediate_size=64, layers=2)
    nn.quantize(model, group_size=32, bits=4)
    attach(model, CONFIG)
    stream = Stream(model, loaded[1])
    stream.feed([VOCABULARY - 1])
    with pytest.raises(InputError, match=f"token {VOCABULARY} "):
        stream.feed([VOCABULARY])
