"""docs/performance.md: where the time of an explanation goes, what was tried, and how it grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
RESULTS = Path(__file__).parent / "results"

TEXT = """\
# Where the time goes

`shapleycam profile` answers that for your model, batch and machine ([profiling.md](profiling.md)). This page says what an
explanation is made of, what was tried to make it cheaper, and how its cost grows.

## What must be paid

| part | behind a pool-and-linear head | piecewise linear logits, if asked for | elsewhere |
| --- | --- | --- | --- |
| trunk, once, without gradients | yes | yes | yes |
| head forward | once | once | once, with a graph |
| tangent through the head | - | once | - |
| passes back through the head | none | one per class | three per class |
| activations read | once | once, with the weight | once, with gradient and Hessian-vector product |
| engine | `closed_form` | `gauss_newton` | `reverse_over_reverse` |

The physical limit is the forward pass, plus what has to be read and written at the pace of a copy. `shapleycam profile` prints
the distance from it.

## What was tried

- **No gradients before the target layer.** The trunk runs as plain inference. The peers differentiate back to the image or keep
  the graph of the whole network ([peers.md](peers.md)).
- **A closed form behind a mean and a linear layer**: one softmax and one product with the classifier's weight, however many
  classes. Helps most of all; no pass back at all.
- **Gauss-Newton behind a piecewise linear head** (`engine="gauss_newton"`): exact there, and one pass back instead of three. It
  reads off the graph, in every call, that the head is such a one, and holds forward against reverse mode; `auto` does not take
  it yet, as forward mode is one for the whole process. PyTorch's own forward mode
  made VGG-16 *slower* at first (1.70 forward passes in place of 1.22, one thread, batch 1): it copies the transposed weight of
  a linear layer, and fills tangents of weights with zeros. With linear layers and convolutions carried by their own operator it
  is 1.13. The same for ResNet-18 at `layer3`, batch 2: 2.22 by reverse over reverse, 1.95 by PyTorch's forward mode, 1.56 so.
  (CPU seconds of one thread on a busy machine, best of seven: a trial, not a benchmark.)
- **Values and tangents as one batch** would read the weights once instead of twice. Not done: a product over twice the rows
  rounds otherwise, and the logits would no longer be the model's to the bit.
- **A ViT's last block** is gone through three times on the way back, each pass with the products of its forward pass: with
  twelve blocks 1 + 3/12 = 1.25 forward passes at least, and attention is unfused where it is differentiated. ViT-B/16 at
  batch 1 was seen at 1.35, of which the products are 0.33 (`shapleycam profile --model vit_b_16 --weights random --batch 1`,
  and PyTorch's profiler; one thread). Behind the block only the class token counts, so most rows of these products are zeros;
  leaving them out needs to know the model, and was not done.
- **One kernel for the reduction, one for the display form**: see the operators' table in the README.
- **Counting instead of timing**: `make perf-guard` compares instructions, bytecodes, operators and allocations with committed
  counts, which no noise moves.

## What a call costs whatever the model

Microseconds that `explainer(images)` takes beyond the model's own call, for models that are little but a head, in one thread:
checks, hooks, targets, and the operators' calls. The closed form's aim is 150. Made by `python -m bench.overhead --write`.

| call | 5th percentile | median |
| --- | --: | --: |
{calls}

## How the cost grows

{device}, {threads} threads, torch {torch}, commit {commit}; made by `python -m bench.growth`. What an explanation with
heatmaps adds to the forward pass, at batch {batch}, {classes} class, {channels} channels, {positions} × {positions} positions
and heatmaps of {image} × {image}, with one of them varied: medians, with the quartiles in brackets. The exponent is that of the
last step; there is none where the forward pass's own noise is larger than what is added.

| engine | varied | added milliseconds | exponent |
| --- | --- | --- | --- |
{table}
"""


def page(growth: dict[str, Any], overhead: dict[str, Any]) -> str:
    """The page, of the results of bench.growth and bench.overhead."""
    lines = []
    for row in growth["rows"]:
        steps = ", ".join(
            f"{extent}: {seconds * 1e3:.2f} ({' to '.join(f'{each * 1e3:.2f}' for each in row['quartiles'][extent])})"
            for extent, seconds in row["seconds"].items()
        )
        exponent = "-" if row["exponent"] is None else f"{row['exponent']:.2f}"
        lines.append(f"| `{row['engine']}` | {row['axis']} | {steps} | {exponent} |")
    calls = [
        f"| {name} | {row['overhead us, 5th percentile']:.0f} | {row['overhead us, median']:.0f} |"
        for name, row in overhead["calls"].items()
    ]
    known = growth["conditions"]
    told = {key: known[key] for key in ("device", "threads", "torch", "commit")}
    return TEXT.format(**told, **growth["usual"], table="\n".join(lines), calls="\n".join(calls))


def write() -> None:
    """Write the page of the results as they are."""
    growth, overhead = (json.loads((RESULTS / name).read_text()) for name in ("growth-cpu.json", "overhead.json"))
    PAGE.write_text(page(growth, overhead))
