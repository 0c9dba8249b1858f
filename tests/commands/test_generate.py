"""The streaming API and the command, on a tiny folder: what a person sees."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from folder import make_folder
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import mlx_sink
from mlx_sink import SinkConfig
from mlx_sink.commands.generate.command import main
from mlx_sink.stream.text.stop_strings import StopStrings

CONFIG = SinkConfig(num_sinks=4, window=28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "chat", chat=True)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return mlx_sink.load(folder, CONFIG)


def test_same_tokens_as_mlx_lm_before_the_wrap(folder: Path, loaded: tuple[Any, Any]):
    """Sampling included: the same seed gives mlx-lm's own text while nothing is evicted."""
    plain, tokenizer = mlx_lm.load(str(folder))
    for temp in (0.0, 0.9):
        texts: list[str] = []
        for stream, model in (
            (mlx_lm.stream_generate, plain),
            (mlx_sink.stream_generate, loaded[0]),
        ):
            mx.random.seed(7)
            responses = stream(model, tokenizer, "the cat", 20, sampler=make_sampler(temp))
            texts.append("".join(r.text for r in responses))
        assert texts[0] == texts[1]


def test_a_stream_goes_on_in_its_caches(loaded: tuple[Any, Any]):
    """Two calls on the same caches stand where one call of the same tokens stands."""
    model, tokenizer = loaded
    caches = model.make_cache()
    for _ in range(3):
        list(
            mlx_sink.stream_generate(
                model, tokenizer, "the dog", 30, ignore_eos=True, prompt_cache=caches
            )
        )
    assert caches[0].tokens > 3 * 30
    assert sum(c.nbytes for c in caches) == sum(
        c.nbytes for c in caches if c.keys.shape[2] == CONFIG.capacity
    )


def test_caches_that_grow_are_refused(folder: Path, loaded: tuple[Any, Any]):
    """mlx-lm's own would serve, without bounds and without a word."""
    plain = mlx_lm.load(str(folder))[0]
    for caches in (make_prompt_cache(plain), loaded[0].make_cache()[:1]):
        with pytest.raises(mlx_sink.InputError, match=r"make_cache\(\), with .*, got \d "):
            next(mlx_sink.stream_generate(*loaded, "the cat", prompt_cache=caches))


def test_mlx_lm_uses_the_bounded_cache(loaded: tuple[Any, Any]):
    """What is built on mlx-lm gets it without knowing."""
    model, tokenizer = loaded
    caches = make_prompt_cache(model)
    mlx_lm.generate(model, tokenizer, "the cat", max_tokens=100, prompt_cache=caches)
    assert all(isinstance(c, mlx_sink.SinkCache) and c.size() <= CONFIG.capacity for c in caches)


@pytest.mark.parametrize("option", [{"max_kv_size": 8}, {"kv_bits": 4}, {"draft_model": object()}])
def test_options_of_the_cache_are_refused(option: dict[str, Any], loaded: tuple[Any, Any]):
    with pytest.raises(mlx_sink.InputError, match=next(iter(option))):
        next(iter(mlx_sink.stream_generate(*loaded, "the cat", **option)))


def test_an_unattached_model_is_refused(folder: Path):
    model, tokenizer = mlx_lm.load(str(folder))
    with pytest.raises(mlx_sink.CacheError, match="attach"):
        mlx_sink.generate(model, tokenizer, "the cat")


def test_endless_text_has_no_end_to_return(loaded: tuple[Any, Any]):
    with pytest.raises(mlx_sink.InputError, match="stream_generate"):
        mlx_sink.generate(*loaded, "the cat", max_tokens=-1)


def test_endless_stream_is_an_iterator(loaded: tuple[Any, Any]):
    responses = mlx_sink.stream_generate(*loaded, "the cat", -1, ignore_eos=True)
    for n, response in zip(range(1, 401), responses, strict=False):
        assert response.generation_tokens == n
        assert response.finish_reason is None


def test_max_tokens_ends_with_length(loaded: tuple[Any, Any]):
    last = list(mlx_sink.stream_generate(*loaded, "the cat", 5, ignore_eos=True))[-1]
    assert (last.generation_tokens, last.finish_reason) == (5, "length")


def test_eos_ends_the_text_unless_ignored(loaded: tuple[Any, Any]):
    model, tokenizer = loaded

    def force(_: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == tokenizer.eos_token_id, 1e9, logits)

    options: dict[str, Any] = {"logits_processors": [force]}
    ended = list(mlx_sink.stream_generate(model, tokenizer, "the cat", 5, **options))
    assert [r.finish_reason for r in ended] == ["stop"]
    assert ended[0].text == ""
    on = list(mlx_sink.stream_generate(model, tokenizer, "the cat", 5, ignore_eos=True, **options))
    assert on[-1].finish_reason == "length"


def test_stop_string_cuts_the_text(loaded: tuple[Any, Any]):
    whole = mlx_sink.generate(*loaded, "the cat", 40, ignore_eos=True)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = mlx_sink.generate(*loaded, "the cat", 40, ignore_eos=True, stop=[stop])
    assert cut == whole[: whole.index(stop)]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_over_segments(size: int):
    """A stop string split over segments is found; what only looked like one comes out."""
    text = "one two the cathedral the cat sat"
    stops = StopStrings(["the cat ", "", "zzz"])
    shown = ""
    for at in range(0, len(text), size):
        shown += stops.feed(text[at : at + size])
        if stops.found:
            break
    assert stops.found
    assert shown == text[: text.index("the cat ")]


def test_held_back_text_comes_out_at_the_end():
    stops = StopStrings(["ending"])
    assert stops.feed("a happy end") == "a happy "
    assert stops.finish() == "end"


def command(folder: Path, *argv: str) -> list[str]:
    return [sys.executable, "-m", "mlx_sink.generate", "--model", str(folder), *argv]


def test_text_and_statistics_go_apart(folder: Path, capsys: pytest.CaptureFixture[str]):
    prompt = ["-p", "the cat", "-m", "50", "--ignore-eos", "--window", "20"]
    assert main(["--model", str(folder), *prompt, "--json"]) == 0
    first = capsys.readouterr()
    statistics = json.loads(first.err)
    assert statistics["generation_tokens"] == 50
    assert statistics["prompt_tokens"] + 50 == statistics["position"]
    assert statistics["cache_bytes"] == statistics["cache_bytes_full"]
    assert (
        statistics["cache_bytes"] == 2 * 24 * 2 * 2 * 8 * 4
    )  # layers, slots, K V, heads, dim, f32
    assert main(["--model", str(folder), *prompt]) == 0
    second = capsys.readouterr()
    assert second.out == first.out
    assert "4 sinks + window 20" in second.err


def test_penalties(folder: Path, capsys: pytest.CaptureFixture[str]):
    """The penalties of the command are those of mlx-lm's processors."""
    base = ["--model", str(folder), "-p", "the cat", "-m", "24", "--ignore-eos", "--window", "50"]
    assert main(base) == 0
    plain = capsys.readouterr().out
    flags = ["--repetition-penalty", "1.8", "--presence-penalty", "2", "--frequency-penalty", "1"]
    assert main([*base, *flags, "--repetition-context-size", "40"]) == 0
    penalised = capsys.readouterr().out
    model, tokenizer = mlx_lm.load(str(folder))
    processors = make_logits_processors(
        repetition_penalty=1.8,
        repetition_context_size=40,
        presence_penalty=2.0,
        frequency_penalty=1.0,
    )
    text = "".join(
        response.text
        for response in mlx_lm.stream_generate(
            model, tokenizer, "the cat", 24, logits_processors=processors
        )
    )
    assert penalised == text + "\n" != plain


def test_pinned_system_prompt(chat_folder: Path, capsys: pytest.CaptureFixture[str]):
    """All that the template puts before the user's words is pinned, and only that."""
    system = ["--system-prompt", "the sea", "--pin-system-prompt", "--window", "20", "--json"]
    main(["--model", str(chat_folder), "-p", "the cat", *system])
    statistics = json.loads(capsys.readouterr().err)
    tokenizer = mlx_lm.load(str(chat_folder))[1]
    before = tokenizer.encode("<|system|>the sea\n<|user|>", add_special_tokens=False)
    assert statistics["num_sinks"] == len(before)


def test_pinned_system_prompt_without_template(folder: Path, capsys: pytest.CaptureFixture[str]):
    system = ["--system-prompt", "the sea", "--pin-system-prompt", "--window", "20", "--json"]
    main(["--model", str(folder), "-p", "the cat", *system])
    statistics = json.loads(capsys.readouterr().err)
    tokenizer = mlx_lm.load(str(folder))[1]
    assert statistics["num_sinks"] == len(tokenizer.encode("the sea\n\n"))


def test_chat_template_as_in_mlx_lm(chat_folder: Path, capsys: pytest.CaptureFixture[str]):
    """The same prompt tokens as mlx-lm's own command makes, with and without the template."""
    counts: list[int] = []
    for flag in ([], ["--ignore-chat-template"]):
        main(["--model", str(chat_folder), "-p", "the cat", "-m", "1", "--json", *flag])
        counts.append(json.loads(capsys.readouterr().err)["prompt_tokens"])
    tokenizer = mlx_lm.load(str(chat_folder))[1]
    rendered = "<|user|>the cat\n<|assistant|>"
    assert counts[0] == len(tokenizer.encode(rendered, add_special_tokens=False))
    assert counts[1] == len(tokenizer.encode("the cat"))


def test_prompt_from_a_file_and_from_stdin(folder: Path, tmp_path: Path):
    text = "the cat went to the sea\n" * 20
    file = tmp_path / "prompt.txt"
    file.write_text(text)
    options = ["-m", "10", "--prefill-step-size", "64", "--json"]
    outputs = [
        subprocess.run(
            command(folder, *source, *options), input=text, capture_output=True, text=True
        )
        for source in (["--prompt-file", str(file)], ["--prompt", "-"])
    ]
    assert outputs[0].stdout == outputs[1].stdout != ""
    for output in outputs:
        assert json.loads(output.stderr)["prompt_tokens"] > 64


def test_progress_of_a_prompt_of_several_steps(folder: Path, tmp_path: Path):
    file = tmp_path / "prompt.txt"
    file.write_text("the cat went to the sea\n" * 20)
    options = ["--prompt-file", str(file), "-m", "2", "--prefill-step-size", "64"]
    done = subprocess.run(command(folder, *options), capture_output=True, text=True)
    assert "reading" in done.stderr


def test_closed_pipe_ends_quietly(folder: Path):
    process = subprocess.Popen(
        command(folder, "-p", "the cat", "-m", "-1", "--ignore-eos"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""


def test_interrupt_ends_with_the_statistics(folder: Path):
    process = subprocess.Popen(
        command(folder, "-p", "the cat", "-m", "-1", "--ignore-eos", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert json.loads(err.splitlines()[-1])["generation_tokens"] > 0
