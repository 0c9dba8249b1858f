"""Format the statistics of a run as a few lines for people."""

from __future__ import annotations

from typing import Any

from mlx_sink.io.units import format_bytes
from mlx_sink.models.checkpoints.settings import SECTION_SOURCE
from mlx_sink.models.load import DEMO


def summary(s: dict[str, Any], prog: str) -> str:
    """Return the statistics of a run as a few lines."""

    def rate(tps: float | None) -> str:
        return f" at {tps:.1f} tok/s" if tps else ""

    lines = [
        f"read {s['prompt_tokens']} tokens{rate(s['prompt_tps'])}, "
        f"made {s['generation_tokens']}{rate(s['generation_tps'])}; "
        f"the stream stands at token {s['position']}",
        f"cache {format_bytes(s['cache_bytes'])} ({s['num_sinks']} sinks + window "
        f"{s['window']}; {format_bytes(s['cache_bytes_full'])} when full), "
        f"peak memory {format_bytes(s['peak_memory_bytes'])}",
    ]
    if "recall" in s:
        lines.append(_recall(s["recall"], s["num_sinks"]))
    if SECTION_SOURCE in s["sources"].values():
        origins = ", ".join(f"{name}: {source}" for name, source in s["sources"].items())
        lines.append(f"settings from {origins}")
    if "draft" in s:
        draft = s["draft"]
        lines.append(
            f"the draft model guessed {draft['guessed']} tokens, {draft['accepted']} right"
            + (f" ({draft['acceptance_rate']:.0%})" if draft["guessed"] else "")
        )
    if s["model"] == DEMO:
        lines.append(
            "this was the small demo model; for a real one: "
            f"{prog} --model mlx-community/Llama-3.2-3B-Instruct-4bit"
        )
    return "\n".join(lines)


def _recall(r: dict[str, Any], num_sinks: int) -> str:
    first, end = r["tokens"]
    what = f"tokens {first} to {end - 1} can be looked up" if end > first else "nothing yet"
    gone = f"; those from {num_sinks} to {first - 1} are forgotten" if first > num_sinks else ""
    return (
        f"archive {format_bytes(r['archive_bytes'])} ({what}{gone}; "
        f"{format_bytes(r['archive_bytes_full'])} when full)"
    )
