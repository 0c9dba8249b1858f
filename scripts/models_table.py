"""Write docs/models.md: what each architecture's layers get, and what has been shown.

    python scripts/models_table.py > docs/models.md

Each architecture is attached to as a tiny random instance of the tests.
"""

from __future__ import annotations

import _checkout  # noqa: F401 (the models are the tests')
from every import no_single_layer, tiny

from mlx_sink import SinkConfig, attach
from mlx_sink.models.architectures import REFUSED, VERIFIED

HEAD = f"""# Models

Every architecture of mlx-lm 0.32.2, that is every module of `mlx_lm.models` with a `Model`, and
what each kind of its layers gets. Written by `python scripts/models_table.py`; a test checks that
it is up to date.

- **sink ring**: full attention becomes sinks and window. **window ring**, **chunk ring**: a layer
  with a sliding window, or chunks, of its own keeps them, at positions that stay small.
  **state**: what is recurrent or convolutional keeps mlx-lm's cache, which does not grow.
- *rope*, *no positions*: how the layer's keys are placed. *aligned*: the model multiplies queries
  and keys on its own, and gets keys turned to meet them at the right distances.
- `tests/test_every.py` shows for each of the {len(VERIFIED)}: equality with plain mlx-lm until
  something is evicted; results that do not depend on how the text is cut into calls, over several
  wraps and epochs; bytes that stay from 2 to 20 capacities; and mlx-lm's own `generate_step`.
  **Oracle**: also equality with the model fed only the visible tokens, on an instance with one
  layer of attention.

A model of an architecture that is not listed (a later mlx-lm, a fork) is put to the proof by
`attach` itself, on its own weights: plain mlx-lm's result until something is evicted, and the same
logits however the tokens are cut and wherever epochs begin. If that fails, it is refused.

## Supported

| architecture | layers | oracle |
|---|---|---|
"""


def layers_of(name: str) -> str:
    """Describe the kinds of layers, in the order in which they first appear."""
    kinds: list[str] = []
    for layer in attach(tiny(name), SinkConfig(3, 10)).layers:
        parts = [layer.cache]
        if layer.cache != "state":
            parts.append("rope" if layer.positions == "rope" else "no positions")
        if layer.attention == "model":
            parts.append("aligned")
        kind = ", ".join(parts)
        if kind not in kinds:
            kinds.append(kind)
    return "; ".join(kinds)


def table() -> str:
    """Return the page."""
    rows = [
        f"| {name} | {layers_of(name)} | {no_single_layer(name) or 'yes'} |"
        for name in sorted(VERIFIED, key=str.lower)
    ]
    refused = [f"| {name} | {REFUSED[name]} |" for name in sorted(REFUSED, key=str.lower)]
    total = len(VERIFIED) + len(REFUSED)
    return "\n".join(
        [
            HEAD + "\n".join(rows),
            "",
            "## Refused",
            "",
            f"{len(REFUSED)} of {total}, each with the reason that `attach` gives:",
            "",
            "| architecture | why |",
            "|---|---|",
            *refused,
            "",
        ]
    )


if __name__ == "__main__":
    print(table(), end="")
