"""How the cost of an explanation grows: with the batch, the classes, the channels, the positions and the image's size.

    python -m bench.growth          # writes bench/results/growth-<device>.json and docs/performance.md
    python -m bench.growth --page   # the page alone, from the committed results

A network whose trunk is one pointwise convolution, so that what is behind it can be seen; one extent varies, and the exponent
is the slope of log(time) over log(extent) at its last step, where it is least hidden behind what every call costs. The time is
the explanation's with heatmaps, less the plain forward pass of the same round: medians of rounds that take turns, with the
quartiles of these differences. Where the lower quartile is not above nothing there is no exponent. Freed memory is kept by the
process, as the command line has it: else the system's clearing of pages is what is timed.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shapleycam import Explainer
from shapleycam.cli import keep_freed_memory
from shapleycam.profiling.conditions import conditions
from shapleycam.profiling.stages import Clock

from . import performance_page

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULT = ROOT / "bench" / "results" / f"growth-{DEVICE.type}.json"
ROUNDS = 41
USUAL = {"batch": 4, "classes": 1, "channels": 512, "positions": 14, "image": 224}
#: What each extent runs through; positions and image are sides of squares.
AXES = {
    "batch": (1, 4, 16, 64),
    "classes": (1, 10, 100, 1000),
    "channels": (128, 512, 2048),
    "positions": (7, 14, 28, 56),
    "image": (112, 224, 448, 896),
}
ENGINES = ("closed_form", "gauss_newton", "reverse_over_reverse")


class Network(nn.Module):
    """Images of few pixels through a trunk that costs nothing, and a head of the kind that an engine is for."""

    def __init__(self, engine: str, channels: int) -> None:
        super().__init__()
        self.target = nn.Conv2d(3, channels, 1)
        between: dict[str, list[nn.Module]] = {
            "closed_form": [],
            "gauss_newton": [nn.Conv2d(channels, channels, 1), nn.ReLU()],
            "reverse_over_reverse": [nn.Conv2d(channels, channels, 1), nn.GELU()],
        }
        self.head = nn.Sequential(*between[engine], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.target(images))


def once(engine: str, extents: dict[str, int]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the forward pass, the explanation with heatmaps) at these extents."""
    torch.manual_seed(0)
    model = Network(engine, extents["channels"]).eval().to(DEVICE)
    images = torch.randn(extents["batch"], 3, extents["positions"], extents["positions"]).to(DEVICE)
    targets = torch.arange(extents["classes"], device=DEVICE).expand(extents["batch"], -1).contiguous()
    explainer = Explainer(model, "target", "shapleycam", engine=engine)
    served = explainer(images, targets).diagnostics.engine
    assert served == engine, f"{engine} is measured, and {served} served"

    def forward() -> None:
        with torch.no_grad():
            model(images)

    return forward, lambda: explainer(images, targets).heatmaps(extents["image"])


def measure(engine: str, axis: str) -> dict[str, Any]:
    """Seconds at every extent of one axis, and the exponent."""
    # A thousand classes are as many passes for engines without the closed form: there fewer tell as much.
    extents = [e for e in AXES[axis] if not (axis == "classes" and engine != "closed_form" and e > 100)]
    calls = {extent: once(engine, USUAL | {axis: extent}) for extent in extents}
    samples: dict[int, list[float]] = {extent: [] for extent in extents}
    clock = Clock(DEVICE)
    for number in range(ROUNDS + 1):
        for extent in extents:
            times = [0.0, 0.0]
            for i in (0, 1) if number % 2 else (1, 0):  # each is the first in half of the rounds
                before = clock.read()
                calls[extent][i]()
                times[i] = clock.seconds(before, clock.read())
            if number:
                samples[extent].append(times[1] - times[0])
    seconds = {extent: statistics.median(values) for extent, values in samples.items()}
    quartiles = {extent: statistics.quantiles(values, n=4)[::2] for extent, values in samples.items()}
    low, high = extents[-2], extents[-1]
    sure = quartiles[low][0] > 0 and quartiles[high][0] > 0
    exponent = math.log(seconds[high] / seconds[low]) / math.log(high / low) if sure else None
    return {"engine": engine, "axis": axis, "seconds": seconds, "quartiles": quartiles, "exponent": exponent}


def main() -> None:
    if "--page" not in sys.argv[1:]:
        kept = keep_freed_memory()
        rows = [measure(engine, axis) for engine in ENGINES for axis in AXES]
        found = {"conditions": conditions(DEVICE), "freed_memory_is_kept": kept, "usual": USUAL, "rows": rows}
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    performance_page.write()


if __name__ == "__main__":
    main()
