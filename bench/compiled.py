"""What a compiled explanation costs over the compiled plain model. ``python -m bench.compiled [--models ...] [--batches ...]``

Both go through ``torch.compile`` with the same treatment: batch normalisations folded, channels-last. Every round times one
after the other in an order that turns, and the figures are medians of the rounds' ratios, of wall time and of CPU time, which
other processes do not lengthen (one thread: OMP_NUM_THREADS=1); a program whose maps are off is not
timed (``explainer.compile`` refuses it). ``bench/results/compiled-<device>-<commit>.json`` is written after every case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from shapleycam import Explainer
from shapleycam.program.folding import bind
from shapleycam.program.graph import tensors_of, trace

RESULTS = Path(__file__).parent / "results"
#: The aim of the project, in closed form; nothing is asserted.
AIM = 1.03
MODELS = ("resnet50", "efficientnet_b0", "vit_b_16")


def alive(name: str) -> nn.Module:
    """A network with random weights whose logits have a deviation of 3."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        model.eval()
        if not last.weight.any():
            last.weight.normal_(0, 0.1)
        last.weight *= 3 / model(torch.randn(2, 3, 224, 224)).std()
    return model


def plain(model: nn.Module, layer: str, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The model alone, treated as its explanation is: folded, channels-last, compiled."""
    graph = trace(model, layer, images, fold=True)
    whole = bind(graph.whole.module, tensors_of(model, graph.constants, graph.whole.weights))
    [output] = whole.graph.find_nodes(op="output")
    output.args = (output.args[0][1],)  # the logits alone
    whole.graph.eliminate_dead_code()
    whole.recompile()
    compiled = torch.compile(whole, fullgraph=True)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return compiled(x.contiguous(memory_format=torch.channels_last))

    return run


def case(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """One network and batch size."""
    model = alive(name).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    images = torch.randn(batch, 3, 224, 224)
    explainer = Explainer(model)
    layer = explainer.prepare(images).layers[0][0]
    torch._dynamo.reset()
    start = time.perf_counter()
    explain = explainer.compile(images, report=True)
    compiled_in = time.perf_counter() - start
    predict = plain(model, layer, images)
    rivals: dict[str, Callable[[], Any]] = {
        "plain": lambda: predict(images),
        "explained": lambda: explain(images),
        "eager": lambda: _eager(model, images),
    }
    with torch.no_grad():
        off = float((rivals["plain"]() - explain(images).logits).abs().max())
    assert off < 1e-3, off
    for run in rivals.values():
        for _ in range(2):
            run()
    samples: dict[str, list[float]] = {key: [] for key in rivals}
    busy: dict[str, list[float]] = {key: [] for key in rivals}
    names = list(rivals)
    for index in range(rounds):
        for offset in range(len(names)):
            key = names[(index + offset) % len(names)]
            begin, begin_cpu = time.perf_counter(), time.process_time()
            rivals[key]()
            samples[key].append(time.perf_counter() - begin)
            busy[key].append(time.process_time() - begin_cpu)

    def over(one: str, other: str, of: dict[str, list[float]] = samples) -> float:
        return statistics.median(a / b for a, b in zip(of[one], of[other], strict=True))

    assert explain.report is not None
    return {
        "model": name,
        "layer": layer,
        "engine": explain.program.engine,
        "batch": batch,
        "explained_over_plain": over("explained", "plain"),
        "cpu_explained_over_plain": over("explained", "plain", busy),
        "plain_over_eager": over("plain", "eager"),
        "explained_over_eager": over("explained", "eager"),
        "relative_error_of_maps": explain.report.maps,
        "seconds_to_compile": compiled_in,
        "load": os.getloadavg()[0],
        "seconds": samples,
        "cpu_seconds": busy,
    }


def _eager(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


def conditions() -> dict[str, Any]:
    """What a reader must know of a measurement."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?"
    )
    return {
        "device": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit + ("-dirty" if dirty else ""),
        "aim": AIM,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--append", action="store_true", help="keep the other cases of the file")
    arguments = parser.parse_args()
    known = conditions()
    kind = "amd-epyc" if "EPYC" in known["device"] else known["device"].lower().replace(" ", "-")[:24]
    out = arguments.out or RESULTS / f"compiled-{kind}-{known['commit']}.json"
    cases: list[dict[str, Any]] = []
    if arguments.append and out.exists():
        old = json.loads(out.read_text())
        cases = [{"commit": old["conditions"]["commit"], **each} for each in old["cases"]]
    for name in arguments.models:
        for batch in arguments.batches:
            found = case(name, batch, arguments.rounds) | {"commit": known["commit"]}
            cases = [each for each in cases if (each["model"], each["batch"]) != (name, batch)] + [found]
            out.write_text(json.dumps({"conditions": known, "cases": cases}, indent=1) + "\n")
            print(
                f"{name} batch {batch} ({found['engine']}): explained over plain {found['explained_over_plain']:.3f}, by CPU "
                f"time {found['cpu_explained_over_plain']:.3f}; over eager {found['explained_over_eager']:.3f}; "
                f"load {found['load']:.1f}",
                flush=True,
            )
    print(out)


if __name__ == "__main__":
    main()
