"""What the Triton kernels become for a GPU that is not here: launches, registers, spills, widths of loads, bytes under way.

    python -m bench.triton_facts sm_80 | sm_90 [PATTERN]   # one line of JSON; PATTERN: only cases whose name it matches

The launchers of kernels/ run on meta tensors with a stand-in driver (tests/kernels/compile_offline.py), as a case of bench.ops
would call them; what they compile is disassembled. Needs Triton, whose wheel has the tools, and no GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from tests.kernels.compile_offline import TARGETS, Driver
from torch import Tensor
from triton.runtime.jit import JITFunction

from .cases import CLASSES, NODES, Case, cases
from .gpu_facts import Facts, Loop, disassembler, flight, instructions, operation, read, sections, size_of
from .gpu_launches import POOLINGS, SIDE, Launch
from .resources import ROOT

#: A launch that is the library's: it adds partial maps up.
SUM = "torch.sum"


def digest() -> str:
    """A hash of the sources of the Triton kernels."""
    files = sorted((ROOT / "kernels").glob("*.py"))
    return hashlib.sha256(b"".join(file.name.encode() + b"\0" + file.read_bytes() for file in files)).hexdigest()[:16]


def call(case: Case) -> None:
    """Call the launchers as the package would for the case, on tensors without contents."""
    from shapleycam import kernels

    n, c, s = case.shape
    wide = torch.float32

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def activations() -> Tensor:
        if case.layout == "first":
            return empty(n, c, s)
        skipped = 1 if case.layout == "tokens" else 0
        return empty(n, s + skipped, c)[:, skipped:].transpose(1, 2)

    if case.operator == "weighted_reduce":
        kernels.weighted_reduce(activations(), activations(), activations(), case.pooling, empty(n, s, dtype=wide))
    elif case.operator == "channel_weighted_sum":
        kernels.channel_weighted_sum(activations(), empty(n, 1, c, dtype=wide), empty(n, 1, s, dtype=wide))
    else:
        logits, targets, rows = empty(n, CLASSES), empty(n, 1, dtype=torch.int64), empty(n, 1, CLASSES, dtype=wide)
        bias, rest = empty(CLASSES), 3
        if case.pooling:
            kernels.quadrature_rows(logits, targets, bias.expand(n, CLASSES), rest, 1 / s, *NODES, rows)
        else:
            kernels.utility_rows(logits, targets, bias, rest, 2, 1 / s, rows)
        grid = (int(s**0.5), int(s**0.5))
        maps = empty(n, 1, SIDE, SIDE, dtype=wide)
        kernels.class_maps(activations(), empty(n, 1, c, dtype=wide), grid, True, empty(n, 1, s, dtype=wide), maps)


def named(function: str, dtype: torch.dtype, constants: dict[str, Any]) -> str:
    """ "weighted_reduce<mean, float32, has_h, flat, 64, 64>"."""
    parts = [str(dtype)[6:]]
    for name, value in constants.items():
        if name == "POOLING":
            parts.insert(0, POOLINGS[value])
        elif isinstance(value, bool):
            parts += [name.lower()] * value
        elif name not in ("ACC", "num_warps"):
            parts.append(str(value))
    return f"{function}<{', '.join(parts)}>"


def facts_of(cubin: bytes, shared: int) -> tuple[Facts, int, dict[str, int]]:
    """(facts, bytes of stack per thread, which spills take, loads of global memory by their width in bytes)."""
    nvdisasm = disassembler()
    if nvdisasm is None:
        raise RuntimeError("There is no nvdisasm here, neither on the PATH nor in Triton's wheel.")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run([*tool, file.name], capture_output=True, text=True, check=True).stdout
            for tool in ((nvdisasm, "-c"), (str(Path(nvdisasm).with_name("cuobjdump")), "-res-usage"))
        )
    [section] = sections(text).values()
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not say what the kernel takes: {usage!r}")
    outside, barriers, shuffles, loops = read(section)
    code = instructions(section)
    widths = Counter(size_of(op) for op in map(operation, code) if op.startswith("LDG"))
    loaded = sum(width * count for width, count in widths.items())
    # A tile that is read once stands outside of loops: it is taken as a loop of one turn, its instructions are in ``outside``.
    if loaded > 2 * sum(loop.loads for loop in loops):
        loops = [Loop(0, loaded, max(widths), flight(code, turns=1), 0, True), *loops]
    facts = Facts(int(found[1]), shared, outside, barriers, shuffles, loops)
    return facts, int(found[2]), {str(width): widths[width] for width in sorted(widths)}


def collect(target: str, pattern: str = "") -> dict[str, Any]:
    """{"kernels": {name: {facts, stack, widths, warps}}, "launches": {case: [launch]}}, for the cases that match."""
    triton.runtime.driver.set_active(Driver(TARGETS[target]))
    kernels: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    log: list[Launch] = []
    run, library = JITFunction.run, torch.sum

    def compile_only(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **constants)
        if kernel.hash not in names:
            name = named(self.fn.__module__.rpartition(".")[2], args[0].dtype, constants)
            while name in kernels:  # of other strides
                name = f"{name}'"
            facts, stack, widths = facts_of(kernel.asm["cubin"], kernel.metadata.shared)
            warps = kernel.metadata.num_warps
            kernels[name] = {"facts": asdict(facts), "stack": stack, "widths": widths, "warps": warps}
            names[kernel.hash] = name
        log.append(Launch(names[kernel.hash], (*grid, 1, 1), 32 * kernel.metadata.num_warps, 0))
        return kernel

    def add_up(parts: Tensor, dim: int, out: Tensor) -> Tensor:
        log.append(Launch(SUM, (parts.shape[dim], 1, 1), 0, 0))
        return library(parts, dim, out=out)

    JITFunction.run, torch.sum = compile_only, add_up
    launches = {}
    try:
        for case in cases("cuda"):
            if re.search(pattern, case.name):
                log.clear()
                call(case)
                launches[case.name] = [asdict(launch) for launch in log]
    finally:
        JITFunction.run, torch.sum = run, library
    return {"triton": triton.__version__, "kernels": kernels, "launches": launches}


def elsewhere(target: str, pattern: str = "", cache: Path | None = None) -> dict[str, Any]:
    """:func:`collect` in a process of its own: one is for one target, and not for Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {} if cache is None else {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "bench.triton_facts", target, pattern]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The Triton kernels do not compile for {target}:\n{done.stderr}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(collect(*sys.argv[1:])))
