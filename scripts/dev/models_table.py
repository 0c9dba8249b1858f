"""Write docs/models.md: what each architecture's layers get, and what has been shown.

    python scripts/dev/models_table.py > docs/models.md

Each architecture is attached to as a tiny random instance of the tests.
"""

from __future__ import annotations

import _checkout  # noqa: F401 (the models are the tests')
from every import no_single_layer, tiny

from mlx_sink import SinkConfig, attach
from mlx_sink.models.architectures import REFUSED, VERIFIED

HEAD = f"""# Models

{len(VERIFIED)} of the {len(VERIFIED) + len(REFUSED)} architectures in mlx-lm 0.32.2 are
supported: dense and mixture-of-experts models, Llama, Mistral, Qwen, Gemma 1 to 4, Phi, GLM,
gpt-oss with its learned sinks, latent attention (DeepSeek, Kimi, LongCat, Mistral 4), Llama 4's
chunks, the text towers of vision models, and hybrids with recurrent layers (Qwen 3.5, Jamba,
Falcon-H1, Nemotron-H, LFM2, Granite). This page lists every module of `mlx_lm.models` with a
`Model`, and what each kind of its layers gets. Written by `python scripts/dev/models_table.py >
docs/models.md`; a test checks that it is up to date.

## What a layer gets

Each layer keeps its own kind: full attention becomes sinks + window, a layer with a sliding
window keeps that window, a recurrent layer its state. The report of `attach` says which layer got
what, here for gpt-oss (`python -m mlx_sink.plan --model openai/gpt-oss-20b` prints it first):

```text
gpt_oss: 4 sinks + window 1024 = 1028 tokens, 28.41 MB when full
 layers  cache       attention positions   slots  bytes/token        bytes  which
     12  window ring mlx_sink  rope          128         2048      3145728  0, 2, ..., 22
     12  sink ring   mlx_sink  rope         1028         2048     25264128  1, 3, ..., 23
```

- **sink ring**: full attention becomes sinks and window. **window ring**, **chunk ring**: a layer
  with a sliding window, or chunks, of its own keeps them, at positions that stay small.
  **state**: what is recurrent or convolutional keeps mlx-lm's cache, which does not grow.
- *rope*, *no positions*: how the layer's keys are placed. *aligned*: the model multiplies queries
  and keys on its own, and gets keys turned to meet them at the right distances.

The capacity, `num_sinks + window`, may not exceed the context that the model was trained on, and
it need not be near it: 4 sinks and a window of a quarter to a half of that are a good start.
About 4 sinks is what the StreamingLLM paper found for Llama; some models need one, some none
([calibration](convert.md#calibration) measures it).

## What is shown

`test_every.py` shows for each of the {len(VERIFIED)}: equality with plain mlx-lm until something
is evicted; results that do not depend on how the text is cut into calls, over several wraps and
epochs; bytes that stay from 2 to 20 capacities; and mlx-lm's own `generate_step`. **Oracle**:
also equality with the model fed only the visible tokens, on an instance with one layer of
attention.

A model of an architecture that is not listed (a later mlx-lm, a fork) is checked by `attach`
itself, on its own weights, against the contract: plain mlx-lm's result until something is
evicted, and the same logits however the tokens are cut and wherever epochs begin. If that fails,
it is refused.

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
            f"{len(REFUSED)} of {total}, each by name and with the reason that `attach` gives:",
            "",
            "| architecture | why |",
            "|---|---|",
            *refused,
            "",
        ]
    )


if __name__ == "__main__":
    print(table(), end="")
