"""Operators against the device's own copy, eager PyTorch and torch.compile, all in one run.

Every round times every contender once, in turn, so that what disturbs the machine disturbs all of them; medians are compared.
A contender whose result differs from the reference is not timed, and the exit status says so. What has been measured is on disk
after every case. Usage:

    python -m bench.ops [--out DIR] [--rounds N] [--only SUBSTRING]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shapleycam import BackendError, __version__, ops

from .cases import Case, cases
from .report import table, verdicts

Timed = Callable[[], Any]
BACKENDS = ("cuda", "triton", "native")

#: Bytes that a burst of calls walks through, so that no cache holds them: several times an L2 of 50 MiB.
COLD = 256 << 20


def timer(device: torch.device) -> Callable[[Timed], float]:
    """Seconds of one call: wall time on a CPU, events around a short burst on a GPU."""

    def on_cpu(call: Timed) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def on_gpu(call: Timed) -> float:
        burst = 10
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The sleep lets the host queue the whole burst, so that the device and not the launches are timed.
        torch.cuda._sleep(2_000_000)
        start.record()
        for _ in range(burst):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / burst

    return on_gpu if device.type == "cuda" else on_cpu


def rotating(function: Callable[..., Any], sets: list[list[Tensor]]) -> Timed:
    """A call of ``function`` that takes the next set of arguments every time."""
    turn = itertools.cycle(sets)
    return lambda: function(*next(turn))


def argument_sets(case: Case, device: torch.device) -> list[list[Tensor]]:
    """Arguments for the case, in as many copies as keep them out of cache; one image stays there, as behind a forward pass."""
    first = case.tensors(device)
    copies = 1 if case.shape[0] == 1 else min(8, -(-COLD // case.bytes()))
    # Clones keep the strides; prefix tokens are left behind, which changes nothing that is timed.
    return [first, *([t.clone() for t in first] for _ in range(copies - 1))]


def contenders(case: Case, compiled: bool, first: list[Tensor]) -> dict[str, Callable[..., Any]]:
    """Everything that can serve the case here, by name."""
    found: dict[str, Callable[..., Any]] = {}
    part = "class_maps" if case.operator == "shapley_head" else case.operator
    for name in BACKENDS:
        try:
            ops.select(part, first[0], pooling=case.pooling or None, backend=name)
        except BackendError:
            continue
        found[name] = case.ours(name)
    found["eager"] = case.eager()
    if compiled:
        found["compile"] = torch.compile(case.eager(), dynamic=False)
    return found


def wrong(case: Case, calls: dict[str, Callable[..., Any]], tensors: list[Tensor]) -> dict[str, float]:
    """The contenders that do not give the reference's result in float64, with their error relative to its largest value."""
    expected = case.eager()(*(t.double() if t.is_floating_point() else t for t in tensors))
    scale = expected.abs().amax().item()
    errors = {name: (call(*tensors).double() - expected).abs().amax().item() / scale for name, call in calls.items()}
    # Eager PyTorch and the compiler are measured as they are, in float32; a wrong one of ours is not measured.
    return {name: error for name, error in errors.items() if not error < 1e-3}


def copy_bandwidth(device: torch.device, timed: Callable[[Timed], float]) -> Callable[[], float]:
    """A call that measures one ``copy_`` well out of cache: bytes read and written per second."""
    count = (1 << 30) if device.type == "cuda" else (1 << 27)
    source, target = torch.ones(count // 4, device=device), torch.empty(count // 4, device=device)
    return lambda: 2 * count / timed(lambda: target.copy_(source))


def measure(case: Case, device: torch.device, rounds: int, compiled: bool, timed: Callable[[Timed], float]) -> dict[str, Any]:
    """Samples of every contender on one case, interleaved, with the copy's bandwidth beside them."""
    torch.compiler.reset()
    sets = argument_sets(case, device)
    functions = contenders(case, compiled, sets[0])
    mistaken = wrong(case, functions, sets[0])
    calls = {name: rotating(function, sets) for name, function in functions.items() if name not in mistaken}
    if device.type == "cuda":
        calls["empty launch"] = lambda: torch.cuda._sleep(0)
    bandwidth = copy_bandwidth(device, timed)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    copies = []
    for i in range(rounds + 2):
        copied = bandwidth()
        for name, call in calls.items():
            if len(sets) == 1:
                call()  # brings the arguments back into the cache, where a forward pass would have left them
            taken = timed(call)
            if i >= 2:  # two rounds warm up
                samples[name].append(taken)
        if i >= 2:
            copies.append(copied)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    copied = statistics.median(copies)
    ours = [name for name in BACKENDS if name in medians]

    def over(other: str) -> dict[str, float]:
        return {name: medians[other] / medians[name] for name in ours} if other in medians else {}

    return {
        "case": case.name,
        "operator": case.operator,
        "pooling": case.pooling,
        "shape": case.shape,
        "dtype": str(case.dtype)[6:],
        "layout": case.layout,
        "bytes": case.bytes(),
        "copies_of_the_arguments": len(sets),
        "copy_bytes_per_second": copied,
        "seconds": medians,
        "samples": samples,
        "wrong": mistaken,
        "of_copy": {name: case.bytes() / medians[name] / copied for name in ours},
        "over_eager": over("eager"),
        "over_compile": over("compile"),
        "over_empty": {name: 1 / ratio for name, ratio in over("empty launch").items()},
    }


def commit() -> str:
    """The short hash of the commit that is measured, with "-dirty" where the tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if git("status", "--porcelain", "-uno") else "")


def conditions(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "device": name,
        "device_type": device.type,
        "commit": commit(),
        "shapleycam": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "backends": {name: status.reason for name, status in ops.backends().items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=0, help="start no case after this many seconds (0: no limit)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timed = timer(device)
    known = conditions(device)
    slug = "-".join("".join(c if c.isalnum() else " " for c in known["device"]).lower().split()[:4])
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"ops-{device.type}-{slug}-{known['commit']}.json"
    start, rows = time.perf_counter(), []
    chosen = [case for case in cases(device.type) if arguments.only in case.name]
    for case in chosen:
        if arguments.seconds and time.perf_counter() - start > arguments.seconds:
            print(f"STOPPED after {arguments.seconds:.0f} s: {len(rows)} of {len(chosen)} cases were measured.")
            break
        with torch.no_grad():
            rows.append(measure(case, device, arguments.rounds, not arguments.no_compile, timed))
        print(table(rows[-1:], header=len(rows) == 1), flush=True)
        found = {"conditions": known, "cases_left_out": len(chosen) - len(rows), "results": rows}
        path.write_text(json.dumps(found, indent=1))
    report = f"{table(rows)}\n\n{verdicts(rows, device.type)}\n"
    path.with_suffix(".txt").write_text(report)
    print(f"\n{verdicts(rows, device.type)}\n\n{path}")
    if mistaken := [(row["case"], row["wrong"]) for row in rows if row["wrong"]]:
        sys.exit(f"WRONG RESULTS, which were not timed: {mistaken}")


if __name__ == "__main__":
    main()
