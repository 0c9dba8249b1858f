"""Render a comparison as one HTML page that needs no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from mlx_sink.commands import plots
from mlx_sink.commands.compare.panels import STYLES, Panel, Spread, draw, panels, span_of, wilson
from mlx_sink.measure.comparison.methods import NAMES
from mlx_sink.measure.comparison.results import Results

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
.runs { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
figure { margin: 0; }
svg { display: block; width: 100%; height: auto; max-width: 44rem; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .15rem .5rem;
  text-align: right; white-space: nowrap; }
th:first-child { text-align: left; }
.key span { margin-right: 1.2rem; white-space: nowrap; }
.key i { display: inline-block; width: 1.1rem; height: .3rem;
  vertical-align: middle; margin-right: .35rem; }
code { overflow-wrap: anywhere; }
.warn { border-left: .3rem solid #d55e00; padding-left: .8rem; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(results: Sequence[Results]) -> str:
    """Return the page of one run or more, as HTML; without matplotlib it has tables alone."""
    of_runs = [panels(run) for run in results]
    parts = ["<h1>Ways to keep a stream's context</h1>", _key(results), _runs(results)]
    for title in _titles(of_runs):
        parts.append(_section(results, [_titled(title, of_run) for of_run in of_runs]))
    parts.append(_beside(results))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>mlx_sink compare</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def notes(run: Results) -> list[str]:
    """Return what a reader must know of a run, in sentences."""
    config, context = run.config, run.model.context
    sentences = [
        "The stream is endless, the context is not: bounded methods see "
        f"{config.num_sinks} first tokens and the newest {config.window}. "
        "What lies between is lost, and no method but full attention can answer from it.",
    ]
    if not run.finished:
        sentences.append("This run has not come to its end yet.")
    for name, method in run.methods.items():
        if method.stopped:
            place = f"{NAMES[name]} stopped at {method.tokens:,} tokens"
            sentences.append(f"{place}: {method.stopped}.")
    sentences += _guessing(run)
    if context and run.lengths[-1] > context:
        sentences.append(
            f"The model was trained on {context:,} tokens: beyond them full attention and "
            "RotatingKVCache use positions that it has never seen."
        )
    return sentences


def _guessing(run: Results) -> list[str]:
    """Say so if a method answers no better than a guess where it still sees the fact."""
    in_view = [s for s in run.scores if s.method == "full" or s.distance < run.config.capacity]
    if not in_view:
        return []
    measured = {score.method for score in in_view}
    method = next(name for name in ("ours", *NAMES) if name in measured)
    scores = [score for score in in_view if score.method == method]
    right, trials = sum(score.right for score in scores), sum(score.trials for score in scores)
    low, _ = wilson(right, trials)
    if low > 1 / run.choices:
        return []
    return [
        f"Where the fact is in view, {NAMES[method]} answers {right} of {trials} questions right, "
        f"no better than a guess (1 in {run.choices}): this model is too small to copy what it "
        "reads. Its answers say nothing about the caches."
    ]


def picture(results: Sequence[Results]) -> Any:
    """Draw all panels of all runs in one matplotlib figure."""
    of_runs = [panels(run) for run in results]
    titles = _titles(of_runs)
    across = 2 if len(results) == 1 else len(results)
    cells = [(i, title) for title in titles for i in range(len(results))]
    rows = max(1, -(-len(cells) // across))
    figure = plots.new_figure(5.2 * across, 3.1 * rows)
    grid = figure.subplots(rows, across, squeeze=False).flatten()
    for axes, (i, title) in zip(grid, cells, strict=False):
        same = [_titled(title, of_run) for of_run in of_runs]
        panel = same[i]
        if panel:
            draw(axes, panel, span_of([other for other in same if other]))
        label = "" if len(results) == 1 else f" ({_label(results[i])})"
        axes.set_title(title + label, fontsize=9, loc="left", parse_math=False)
    for axes in grid[len(cells) :]:
        axes.set_visible(False)
    if cells:
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _titles(of_runs: Sequence[Sequence[Panel]]) -> list[str]:
    """Return the titles of all panels, each once."""
    return list(dict.fromkeys(panel.title for of_run in of_runs for panel in of_run))


def _titled(title: str, of_run: Sequence[Panel]) -> Panel | None:
    return next((panel for panel in of_run if panel.title == title), None)


def _label(run: Results) -> str:
    return f"{run.model.name}, {run.machine.processor}"


def _key(results: Sequence[Results]) -> str:
    present = [name for name in NAMES if any(name in run.methods for run in results)]
    cells = (
        f'<span><i style="background:{STYLES[name]["color"].replace(plots.INK, "currentColor")}">'
        f"</i>{escape(NAMES[name])}</span>"
        for name in present
    )
    return f'<p class="key">{"".join(cells)}</p>'


def _runs(results: Sequence[Results]) -> str:
    parts: list[str] = []
    for run in results:
        m, c = run.machine, run.config
        facts = {
            "command": f"<code>{escape(run.command)}</code>",
            "date": escape(run.date),
            "machine": escape(f"{m.processor}, {m.cores} cores, {m.platform}"),
            "versions": escape(
                f"mlx_sink {m.mlx_sink}, mlx {m.mlx} on the {m.device}, "
                f"mlx-lm {m.mlx_lm}, Python {m.python}"
            ),
            "model": escape(run.model.name),
            "text": escape(f"{run.text.name}, {run.text.tokens:,} tokens"),
            "keeps": f"{c.num_sinks} sinks + window {c.window} = {c.capacity} tokens",
        }
        rows = "".join(f"<li><b>{name}</b>: {value}</li>" for name, value in facts.items())
        warnings = "".join(f'<p class="warn">{escape(note)}</p>' for note in notes(run))
        parts.append(f"<div><ul>{rows}</ul>{warnings}</div>")
    return f'<div class="runs">{"".join(parts)}</div>'


def _section(results: Sequence[Results], same: Sequence[Panel | None]) -> str:
    present = [panel for panel in same if panel]
    span, figures = span_of(present), list[str]()
    for i, (run, panel) in enumerate(zip(results, same, strict=True)):
        if panel is None:
            continue
        label = escape(_label(run)) if len(results) > 1 else ""
        picture = _plot(panel, span, f"{panel.title}{i}") if plots.is_available() else ""
        figures.append(
            f"<figure><figcaption>{label}</figcaption>{picture}"
            f'<div class="scroll">{_table(panel)}</div></figure>'
        )
    title, about = escape(present[0].title), escape(present[0].about)
    return f'<h2>{title}</h2><p>{about}</p><div class="runs">{"".join(figures)}</div>'


def _plot(panel: Panel, span: tuple[float, float] | None, salt: str) -> str:
    """Draw a panel as SVG."""
    figure = plots.new_figure(5.4, 3.2)
    axes = figure.add_subplot()
    draw(axes, panel, span)
    _ink(axes)
    return plots.svg(figure, salt)


def _ink(axes: Any) -> None:
    """Draw what is not data in the colour of the page's text."""
    axes.tick_params(which="both", colors=plots.INK, labelsize=8)
    for spine in axes.spines.values():
        spine.set_edgecolor(plots.INK)


def _table(panel: Panel) -> str:
    names = list(panel.values)
    head = "".join(f"<th>{escape(NAMES[name])}</th>" for name in names)
    rows: list[str] = []
    for i, row in enumerate(panel.rows):
        cells = "".join(f"<td>{_cell(panel, panel.values[name][i])}</td>" for name in names)
        rows.append(f"<tr><th>{escape(row)}</th>{cells}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _cell(panel: Panel, value: Spread | None) -> str:
    if value is None:
        return "-"
    middle, low, high = value
    spread = "" if low == high else f" ({panel.write(low)} - {panel.write(high)})"
    return escape(panel.write(middle) + spread)


def _beside(results: Sequence[Results]) -> str:
    rows: list[str] = []
    for run in results:
        for name, b in run.beside_recompute.items():
            label = f"{_label(run)}: " if len(results) > 1 else ""
            rows.append(
                f"<tr><th>{escape(label + NAMES[name])}</th><td>{b.count}</td>"
                f"<td>{b.perplexity:.4g}</td><td>{b.recompute:.4g}</td>"
                f"<td>{b.difference:+.4f} ({b.low:+.4f} - {b.high:+.4f})</td></tr>"
            )
    if not rows:
        return ""
    titles = ("", "tokens", "perplexity", "recomputed", "loss, difference")
    head = "<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"
    return (
        "<h2>Beside recomputing, on the same tokens</h2><p>Tokens past the first eviction. "
        "Recomputing feeds the plain model what a token may see, from position 0.</p>"
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
    )
