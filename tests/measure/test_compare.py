"""Methods side by side: measurements, a run that is interrupted, questions, and the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from folder import make_folder
from tiny import VOCABULARY, build

from mlx_sink.commands.compare import command as compare
from mlx_sink.commands.compare.command import lengths_of, main
from mlx_sink.commands.compare.page import notes
from mlx_sink.commands.compare.panels import panels, wilson
from mlx_sink.config import SinkConfig
from mlx_sink.errors import InputError
from mlx_sink.measure import losses
from mlx_sink.measure.comparison import needles
from mlx_sink.measure.comparison.methods import SAMPLED, USUAL
from mlx_sink.measure.comparison.results import LINES, Results, Score
from mlx_sink.measure.comparison.run import Comparison, ComparisonSettings

TEXT = "the cat and the dog went to the sea and the cat sat down. " * 40
SIZES = ["--num-sinks", "2", "--window", "22", "--prefill-step-size", "16", "--samples", "4"]
LENGTHS = [48, 100, 160]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "tiny", head_dim=64)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def arguments(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    where = ["--model", str(model), "--text", str(text), "--output", str(output)]
    lengths = ["--lengths", *map(str, LENGTHS)]
    return [*where, *lengths, *SIZES, "--trials", "2", *more]


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of a run that was left alone, and where they are."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main(arguments(model, text, output)) == 0
    return json.loads(output.with_name("run.json").read_text()) | {"output": output}


def measured(found: dict[str, Any]) -> Any:
    """Return what does not depend on the clock or on other programs."""
    keys = ("length", "from", "count", "loss", "perplexity", "low", "high", "cache_bytes")
    return {
        "arms": {
            name: (run["tokens"], run["stopped"], [[m[k] for k in keys] for m in run["at"]])
            for name, run in found["arms"].items()
        },
        **{key: found[key] for key in ("beside_recompute", "recall", "lengths", "config")},
    }


def test_measures_every_method_at_every_length(whole: dict[str, Any]):
    assert whole["finished"]
    assert whole["arms"].keys() == set(USUAL)
    for name, run in whole["arms"].items():
        assert run["stopped"] is None, name
        assert [m["length"] for m in run["at"]] == LENGTHS
        for m in run["at"]:
            assert m["low"] <= m["loss"] <= m["high"]
            assert 0 < m["ms_low"] <= m["ms"] <= m["ms_high"]
            assert m["peak_bytes"] > whole["model"]["weights"]
        counts = [m["count"] for m in run["at"]]
        assert counts == ([4] * 3 if name == SAMPLED else [48, 52, 60])
    held = {name: [m["cache_bytes"] for m in run["at"]] for name, run in whole["arms"].items()}
    assert held["ours"] == held["window"] == held["rotating"] == [2 * 2 * 24 * 2 * 64 * 4] * 3
    assert max(held["bits8"]) < held["ours"][0]
    assert held["full"] == [2 * 2 * 256 * 2 * 64 * 4] * 3  # mlx-lm takes 256 slots at once.


def test_losses_are_those_of_the_script(
    model: Path, text: Path, whole: dict[str, Any], tmp_path: Path
):
    import eval_stream

    figures = tmp_path / "out.json"
    sizes = ["--tokens", "160", "--num-sinks", "2", "--window", "22", "--edges", "48", "100"]
    where = ["--model", str(model), "--text", str(text), "--json", str(figures)]
    assert eval_stream.main([*where, *sizes, "--every", "7"]) == 0
    theirs = json.loads(figures.read_text())["arms"]
    for name in ("full", "rotating", "window", "ours"):
        ours = [m["loss"] for m in whole["arms"][name]["at"]]
        assert ours == pytest.approx([b["loss"] for b in theirs[name]["buckets"]], abs=1e-5)


def test_beside_recomputing(whole: dict[str, Any]):
    """Both are of the sampled tokens past the first eviction: 10 of 12."""
    found = whole["beside_recompute"]
    assert found.keys() == set(USUAL) - {SAMPLED}
    for beside in found.values():
        assert beside["count"] == 10
        ratio = math.log(beside["perplexity"] / beside["recompute"])
        assert beside["difference"] == pytest.approx(ratio, abs=1e-5)


def test_samples_count_for_their_own_length_only():
    """Where there are fewer tokens than samples, those of the length before are not taken in."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 81)
    inputs, targets = losses.cut(tokens.tolist(), None)
    settings = ComparisonSettings(SinkConfig(2, 6), (SAMPLED,), lengths=(40, 80), samples=64)
    comparison = Comparison(build("llama", layers=1), inputs, targets, settings)
    for _ in comparison.steps():
        pass
    first, second = comparison.runs[SAMPLED].at
    assert (first.count, second.count) == (40, 40)
    both = comparison.runs[SAMPLED].all_losses()
    assert second.loss == pytest.approx(both[40:].mean(), abs=1e-5)


@pytest.mark.parametrize("after", [9, 60])
def test_an_interrupted_run_is_resumed(
    after: int,
    model: Path,
    text: Path,
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The same page comes out: between any two steps everything is on disk."""
    monkeypatch.setattr(compare, "EVERY", 0.0)
    output, keep, kept = tmp_path / "run", compare._Run.keep, []

    def killed(run: Any, final: bool = False) -> None:
        keep(run, final)
        kept.append(final)
        if len(kept) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare, "write", lambda output, results: None)
    monkeypatch.setattr(compare._Run, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(model, text, output))
    monkeypatch.undo()
    assert output.with_name("run.state").exists()
    assert main(arguments(model, text, output)) == 0
    assert "resuming from" in capsys.readouterr().err
    assert measured(json.loads(output.with_name("run.json").read_text())) == measured(whole)
    assert not output.with_name("run.state").exists()


def test_a_method_stops_when_its_time_is_out(model: Path, text: Path, tmp_path: Path):
    output = tmp_path / "run"
    assert main(arguments(model, text, output, "--arm-minutes", "1e-9", "--trials", "0")) == 0
    found = json.loads(output.with_name("run.json").read_text())
    assert {run["stopped"] for name, run in found["arms"].items() if name != SAMPLED} == {
        "its time is out before the next length"
    }
    assert "stopped at 48 tokens: its time is out" in output.with_name("run.html").read_text()


def test_a_method_that_a_model_cannot_have_says_why(text: Path, tmp_path: Path):
    model = make_folder(tmp_path / "narrow")
    output = tmp_path / "run"
    assert main(arguments(model, text, output, "--trials", "0", "--arms", "bits8", "ours")) == 0
    found = json.loads(output.with_name("run.json").read_text())
    assert "kv_group_size 64 does not divide" in found["arms"]["bits8"]["stopped"]
    assert found["arms"]["ours"]["at"]


def test_lengths():
    assert lengths_of(["1K", "500"], 2000) == (500, 1024)
    assert lengths_of(["1K..1M"], 5000) == (1024, 2048, 4096, 5000)
    assert lengths_of(["1K..4K"], 5000) == (1024, 2048, 4096)
    for words in (["4K"], ["1K", "3000"], ["4K..1M"]):
        with pytest.raises(InputError, match="the text has 2000 tokens, fewer than"):
            lengths_of(words, 2000)


def test_intervals():
    """Of a thousand tokens of variance 1 the mean lies within 2 / sqrt(1000); blocks widen it."""
    noise = np.random.default_rng(1).standard_normal(1024).astype(np.float32)
    low, high = losses.interval(noise, 1)
    assert high - low == pytest.approx(2 * 1.96 / 32, rel=0.15)
    low, high = losses.interval(np.repeat(noise[:16], 64), 64)
    assert high - low > 0.5
    assert wilson(0, 8)[0] == 0
    assert wilson(8, 8)[1] == 1
    assert wilson(4, 8) == pytest.approx((0.2152, 0.7848), abs=1e-3)


LIKE = 10


class Copier:
    """A model that goes on as it did after the same few tokens, if it still has them."""

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        rows: list[np.ndarray] = []
        for token in np.array(tokens)[0]:
            seen = cache[0].state = [*cache[0].state, int(token)][-cache[0].keep :]
            logits = np.zeros(256, np.float32)
            end = bytes(seen[-LIKE:])
            at = bytes(seen).find(end)
            if 0 <= at < len(seen) - LIKE:
                logits[seen[at + LIKE]] = 9
            rows.append(logits)
        return mx.array(np.stack(rows))[None]


class Kept:
    """What `Copier` remembers."""

    def __init__(self, keep: int):
        self.keep, self.state = keep, list[int]()


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("kind", ["needle", "lines"])
def test_questions_can_be_answered_by_who_still_has_the_line(kind: str):
    hay = [i % 7 for i in range(2000)]
    capacity = 300
    for distance in (100, 250, 400, 900):
        for seed in range(6):
            asked = (
                needles.needle(encode, hay[:1200], distance, str(seed))
                if kind == "needle"
                else needles.lines(encode, 1200, distance, str(seed))
            )
            assert len({tuple(choice) for choice in asked.choices}) == needles.CHOICES
            assert needles.ask(Copier(), [Kept(10_000)], asked, 64)
            within = needles.ask(Copier(), [Kept(capacity)], asked, 64)
            assert within == (distance <= 250)


def test_needles_lie_where_they_should():
    hay = [0] * 1000
    for name, distance in needles.places(300, 1000).items():
        asked = needles.needle(encode, hay, distance, "a")
        assert len(asked.context) == 1000, name
        end = bytes(asked.context).index(b".\n") + 2
        first = bytes(asked.context).index(b"The number")
        assert first == 0 if name == "the start" else len(asked.context) - end == distance


def test_the_page_is_honest(whole: dict[str, Any]):
    page = whole["output"].with_name("run.html").read_text()
    assert "no better than a guess" in page
    assert "What lies between is lost" in page
    assert "trained on 64 tokens" in page
    assert whole["command"].split(" --output")[0] in page.replace("&#x27;", "'")
    assert page.count("<svg") == len(panels(Results.from_dict(whole))) == 7
    assert "http-equiv" in page
    assert not [word for word in ("<script", "<img", "<link", "@import") if word in page]


def test_without_matplotlib_the_figures_are_there(
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """The page has its tables and says what is missing; only the picture is left out."""
    monkeypatch.setattr(compare.plots, "is_available", lambda: False)
    source = whole["output"].with_name("run.json")
    assert compare.main(["--from", str(source), "--output", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<svg" not in page
    assert page.count("<table") == whole["output"].with_name("run.html").read_text().count(
        "<table"
    )
    assert not (tmp_path / "page.png").exists()
    assert "pip install 'mlx-sink[plot]'" in capsys.readouterr().err


def test_says_whether_the_model_can_copy(whole: dict[str, Any]):
    for right, honest in ((0, True), (5, True), (14, False)):
        near = Score(LINES, "near", distance=5, method="ours", right=right, trials=20)
        far = replace(near, place="far", distance=99, right=0)
        run = replace(Results.from_dict(whole), scores=(near, far))
        text = " ".join(notes(run))
        assert ("no better than a guess" in text) == honest
        assert (f"{right} of 20" in text) == honest


def test_two_runs_on_one_page(whole: dict[str, Any], tmp_path: Path):
    results = str(whole["output"].with_name("run.json"))
    output = tmp_path / "both"
    assert main(["--from", results, results, "--output", str(output)]) == 0
    assert output.with_name("both.html").read_text().count("<svg") == 14
    assert output.with_name("both.png").read_bytes().startswith(b"\x89PNG")
    assert not output.with_name("both.json").exists()
