"""What a call costs beyond the model's own forward pass: explainer(x) minus model(x), for models that are little but a head.

    python -m bench.overhead           # prints
    python -m bench.overhead --write   # writes bench/results/overhead.json and docs/performance.md

One thread; the two calls alternate, and of each the 5th percentile counts, which other processes hardly touch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shapleycam import Explainer
from shapleycam.profiling.measure import dispatched

from . import performance_page

RESULT = Path(__file__).parent / "results" / "overhead.json"


def head_only(*head: nn.Module) -> nn.Module:
    """One 1x1 convolution as the trunk, a mean over the positions, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head).eval()


def cases() -> Iterator[tuple[str, Callable[[], Any], Callable[[], Tensor]]]:
    """(name, the explanation, the forward pass)."""
    one, eight = (torch.randn(n, 3, 7, 7, generator=torch.Generator().manual_seed(1)) for n in (1, 8))
    pooled, curved = head_only(nn.Linear(8, 10)), head_only(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 10))
    second, first, general = Explainer(pooled), Explainer(pooled, method="gradcam"), Explainer(curved)
    target, several = torch.tensor([3]), torch.arange(5)[None]
    yield "closed form", lambda: second(one), lambda: pooled(one)
    yield "closed form, targets [1]", lambda: second(one, target), lambda: pooled(one)
    yield "closed form, targets [1, 5]", lambda: second(one, several), lambda: pooled(one)
    yield "closed form, 8 images", lambda: second(eight), lambda: pooled(eight)
    yield "closed form, gradcam", lambda: first(one), lambda: pooled(one)
    yield "closed form, heatmaps", lambda: second(one).heatmaps(), lambda: pooled(one)
    yield "reverse over reverse", lambda: general(one), lambda: curved(one)


def overhead(explain: Callable[[], Any], forward: Callable[[], Tensor], seconds: float) -> dict[str, float]:
    """Microseconds at the 5th percentile and the median, and the operators that both dispatch."""
    spent: tuple[list[int], list[int]] = [], []
    end = time.perf_counter() + seconds
    for _ in range(50):
        explain()
    while time.perf_counter() < end or len(spent[0]) < 200:
        start = time.perf_counter_ns()
        explain()
        spent[0].append(time.perf_counter_ns() - start)
        with torch.no_grad():
            start = time.perf_counter_ns()
            forward()
            spent[1].append(time.perf_counter_ns() - start)
    explained, alone = (sorted(each) for each in spent)
    at = {"5th percentile": len(alone) // 20, "median": len(alone) // 2}
    found = {f"overhead us, {name}": round((explained[i] - alone[i]) / 1e3, 1) for name, i in at.items()}
    operators = dispatched(explain, torch.device("cpu"))
    return {**found, "forward us": round(alone[at["5th percentile"]] / 1e3, 1), "operators": operators}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: overhead(explain, forward, asked.seconds) for name, explain, forward in cases()}
    for name, row in found.items():
        print(f"{name:30}", *(f"{what}: {value}" for what, value in row.items()), sep="  ")
    if asked.write:
        RESULT.write_text(json.dumps({"torch": torch.__version__, "threads": 1, "calls": found}, indent=1) + "\n")
        performance_page.write()


if __name__ == "__main__":
    main()
