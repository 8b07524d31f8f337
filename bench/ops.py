"""Operators against the device's own copy, eager PyTorch and torch.compile, all in one run.

Every round times every contender once, in turn, so that what disturbs the machine disturbs all of them; medians are compared.
A contender whose result differs from the reference is not timed: the run fails. Usage:

    python -m bench.ops [--out DIR] [--rounds N] [--only SUBSTRING]
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
from torch import Tensor

from shapleycam import BackendError, __version__, ops
from shapleycam.ops import reference

from .cases import Case, cases
from .report import table

Timed = Callable[[], Any]


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


def contenders(case: Case, tensors: list[Tensor], compiled: bool) -> dict[str, Timed]:
    """Everything that can serve the case here, by name."""

    def through(function: Callable[..., Tensor], *extra: Any, **options: Any) -> Timed:
        return lambda: function(*tensors, *extra, **options)

    if case.operator == "weighted_reduce":
        ours, theirs, extra = ops.weighted_reduce, reference.weighted_reduce, (case.pooling,)
    else:
        ours, theirs, extra = ops.channel_weighted_sum, reference.channel_weighted_sum, ()
    found: dict[str, Timed] = {}
    for name in ("cuda", "triton", "native"):
        try:
            ops.select(case.operator, *tensors, pooling=case.pooling or None, backend=name)
        except BackendError:
            continue
        found[name] = through(ours, *extra, backend=name)
    found["eager"] = through(theirs, *extra)
    if compiled:
        found["compile"] = through(torch.compile(theirs, dynamic=False), *extra)
    return found


def verify(case: Case, calls: dict[str, Timed], tensors: list[Tensor]) -> None:
    """Raise unless every contender gives the reference's result in float64."""
    wide = [t.double() for t in tensors]
    extra = (case.pooling,) if case.operator == "weighted_reduce" else ()
    expected = getattr(reference, case.operator)(*wide, *extra)
    scale = expected.abs().amax().item()
    for name, call in calls.items():
        result = call().double()
        error = (result - expected).abs().amax().item() / scale
        if not error < 1e-3:
            raise SystemExit(f"{case.name}: {name} is wrong by {error:.1e} of the largest value; nothing was timed.")


def copy_bandwidth(device: torch.device, timed: Callable[[Timed], float]) -> Callable[[], float]:
    """A call that measures one ``copy_`` well out of cache: bytes read and written per second."""
    count = (1 << 30) if device.type == "cuda" else (1 << 27)
    source, target = torch.ones(count // 4, device=device), torch.empty(count // 4, device=device)
    return lambda: 2 * count / timed(lambda: target.copy_(source))


def measure(case: Case, device: torch.device, rounds: int, compiled: bool, timed: Callable[[Timed], float]) -> dict[str, Any]:
    """Samples of every contender on one case, interleaved, with the copy's bandwidth beside them."""
    torch.compiler.reset()
    tensors = case.tensors(device)
    calls = contenders(case, tensors, compiled)
    verify(case, calls, tensors)
    bandwidth = copy_bandwidth(device, timed)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    copies = []
    for i in range(rounds + 2):
        copied = bandwidth()
        for name, call in calls.items():
            taken = timed(call)
            if i >= 2:  # two rounds warm up
                samples[name].append(taken)
        if i >= 2:
            copies.append(copied)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    copied = statistics.median(copies)
    ours = [name for name in ("cuda", "triton", "native") if name in medians]
    return {
        "case": case.name,
        "operator": case.operator,
        "pooling": case.pooling,
        "shape": case.shape,
        "dtype": str(case.dtype)[6:],
        "layout": case.layout,
        "bytes": case.bytes(),
        "copy_bytes_per_second": copied,
        "seconds": medians,
        "samples": samples,
        "of_copy": {name: case.bytes() / medians[name] / copied for name in ours},
        "over_eager": {name: medians["eager"] / medians[name] for name in ours},
        "over_compile": {name: medians["compile"] / medians[name] for name in ours} if compiled else {},
    }


def conditions(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "device": name,
        "device_type": device.type,
        "commit": commit.stdout.strip() or "unknown",
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
    start, rows = time.perf_counter(), []
    chosen = [case for case in cases(device.type) if arguments.only in case.name]
    for case in chosen:
        if arguments.seconds and time.perf_counter() - start > arguments.seconds:
            break
        with torch.no_grad():
            rows.append(measure(case, device, arguments.rounds, not arguments.no_compile, timed))
        print(table(rows[-1:], header=len(rows) == 1), flush=True)
    if len(rows) < len(chosen):
        print(f"STOPPED after {arguments.seconds:.0f} s: {len(rows)} of {len(chosen)} cases were measured.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    slug = "-".join("".join(c if c.isalnum() else " " for c in known["device"]).lower().split()[:4])
    path = arguments.out / f"ops-{device.type}-{slug}-{known['commit']}.json"
    path.write_text(json.dumps({"conditions": known, "cases_left_out": len(chosen) - len(rows), "results": rows}, indent=1))
    path.with_suffix(".txt").write_text(table(rows) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
