"""What an explanation costs, counted and not timed: a guard against growth that no noise hides.

    python -m bench.guard           # or: make perf-guard; compares with the committed counts
    python -m bench.guard --write   # writes bench/results/guard.json

Counted: the instructions of each CPU kernel, under valgrind (of one compiler: with another one they are not compared); the
package's own bytecodes in one call of each engine, the operators that it dispatches, and the allocations of tensors.
The exit status is 1 where a count left its bounds, which says what moved, and 2 where nothing was compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tests.helpers import network, toy
from torch import nn

import shapleycam
from shapleycam import Explainer
from shapleycam.profiling.measure import dispatched

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "guard.json"
CPU = torch.device("cpu")
KERNELS = (
    *("mean first", "mean last", "elementwise first", "elementwise last bfloat16", "plusplus first", "plusplus last"),
    *("channel_weighted_sum", "display_map", "overlay", "utility_rows", "quadrature_rows 4"),
)
#: By how much a count may grow, or shrink before it is to be written anew.
BOUNDS = {"instructions": 0.10, "bytecodes": 0.05, "operators": 0.05, "allocations": 0.10}


def straight() -> nn.Module:
    """A head that is piecewise linear."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(392, 16), nn.ReLU(), nn.Linear(16, 7))
    return nn.Sequential(*layers).eval()


#: name -> the explainer's arguments
CALLS: dict[str, Callable[[], Explainer]] = {
    "closed_form": lambda: Explainer(network(curved=False)),
    "quadrature": lambda: Explainer(network(curved=False), engine="quadrature"),
    "gauss_newton": lambda: Explainer(straight(), "0", engine="gauss_newton"),
    "reverse_over_reverse": lambda: Explainer(toy()),
}


def bytecodes(call: Callable[[], Any]) -> int:
    """How many of the package's own bytecodes a call runs."""
    home, count = str(Path(shapleycam.__file__).parent), 0

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(home):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def allocations(call: Callable[[], Any]) -> int:
    """How many pieces of memory torch's allocator hands out in a call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as seen:
        call()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = seen.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


def calls() -> dict[str, dict[str, int]]:
    """The counts of one call of each engine, heatmaps included."""
    found = {}
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for name, make in CALLS.items():
        explainer = make()
        call = lambda explainer=explainer: explainer(images).heatmaps()
        call()
        served = explainer(images).diagnostics.engine
        assert served == name, f"{name} is measured, and {served} served"
        found[name] = {"bytecodes": bytecodes(call), "operators": dispatched(call, CPU), "allocations": allocations(call)}
    return found


def compiler() -> str:
    """The C++ compiler, as it names itself."""
    said = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=True).stdout
    return f"{said.splitlines()[0]}, {platform.machine()}"


def kernels() -> dict[str, int]:
    """Instructions of one call of each kernel, as AVX2 or the baseline runs it: valgrind knows no AVX-512."""
    build = ROOT / "build" / "guard"
    options = ("-DSHAPLEYCAM_BUILD=cpu", "-DSHAPLEYCAM_PYTHON=OFF", "-DSHAPLEYCAM_TESTS=ON")
    cmake = shutil.which("cmake", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))) or "cmake"
    for command in ([cmake, "-S", ROOT, "-B", build, *options], [cmake, "--build", build, "--target", "instructions", "-j2"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {name: counted(build / "instructions", name, 3) - counted(build / "instructions", name, 2) for name in KERNELS}


def counted(program: Path, name: str, times: int) -> int:
    """Instructions of a whole run of the program."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", str(program), name, str(times)]
        environment = os.environ | {"SHAPLEYCAM_CPU_VARIANT": "avx2"}
        said = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = re.search(r"Collected : (\d+)", said.stderr)
    if said.returncode or found is None:
        raise SystemExit(f"valgrind could not count {name}: {said.stderr[-500:]}")
    return int(found[1])


def moved(committed: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """In words, every count that left its bounds."""
    out = []
    for name, row in found["calls"].items():
        for what, count in row.items():
            out += _left(f"{name}: {what}", committed["calls"].get(name, {}).get(what), count, BOUNDS[what])
    for name, count in found.get("kernels", {}).items():
        out += _left(f"{name}: instructions", committed["kernels"].get(name), count, BOUNDS["instructions"])
    return out


def _left(label: str, before: int | None, now: int, bound: float) -> list[str]:
    if before is None:
        return [f"{label}: {now}, and no count is committed"]
    change = now / before - 1
    if abs(change) <= bound or abs(now - before) <= 2:
        return []
    word = "grew" if change > 0 else "fell (write the counts anew)"
    return [f"{label} {word} from {before} to {now}, by {change:+.0%}; the bound is {bound:.0%}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    told = {"python": ".".join(platform.python_version_tuple()[:2]), "torch": torch.__version__, "compiler": compiler()}
    found: dict[str, Any] = {"conditions": told, "calls": calls()}
    if shutil.which("valgrind"):
        found["kernels"] = kernels()
    else:
        print("valgrind was not found: the kernels' instructions were NOT counted.")
    if asked.write:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written: {RESULT.relative_to(ROOT)}")
        return 0
    committed = json.loads(RESULT.read_text())
    known = committed["conditions"]
    if told["compiler"] != known["compiler"]:
        print(f"The kernels' counts are of {known['compiler']}, here is {told['compiler']}: they were NOT compared.")
        found.pop("kernels", None)
    if told["python"] != known["python"]:
        print(f"The bytecodes are of Python {known['python']}, here is {told['python']}: they were NOT compared.")
        for row in found["calls"].values():
            del row["bytecodes"]
    if told["torch"] != known["torch"]:
        print(f"Operators and allocations are of torch {known['torch']}, here is {told['torch']}: they were NOT compared.")
        for row in found["calls"].values():
            del row["operators"], row["allocations"]
    wrong = moved(committed, found)
    for line in wrong:
        print(line)
    compared = sum(map(len, found["calls"].values())) + len(found.get("kernels", {}))
    print(f"{compared} counts compared, {len(wrong)} out of bounds")
    return 1 if wrong else 0 if compared else 2


if __name__ == "__main__":
    sys.exit(main())
