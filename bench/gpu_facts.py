"""What the compiled CUDA kernels are: registers and shared memory as the assembler says, loads and loops read from the SASS.

Needs nvcc and nvdisasm (that of Triton's wheel serves), and no GPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .resources import CHIPS, ROOT, SOURCES, Usage, compiled, readable

#: What the CUDA kernels are compiled from.
FILES = ("csrc/*.h", "csrc/include/*.h", "csrc/cuda/*")
_WIDTHS = (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1))


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop without the loops inside it, one turn of one thread.

    Attributes:
        instructions: on the shortest way through its body.
        loads: bytes loaded from global memory.
        width: bytes of the widest of these loads.
        flight: most bytes that are under way at once: asked for, and not used yet.
        stores: bytes stored to global memory.
        inner: whether there is no loop inside it.
    """

    instructions: int
    loads: int
    width: int
    flight: int
    stores: int
    inner: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """A kernel on one chip: see :class:`Usage`; instructions outside the innermost ones of the loops listed, barriers
    and shuffles of the code, and the loops that touch global memory, in its order.
    """

    registers: int
    shared: int
    outside: int
    barriers: int
    shuffles: int
    loops: list[Loop] = field(default_factory=list)

    @staticmethod
    def of(stored: dict[str, Any]) -> Facts:
        return Facts(**{**stored, "loops": [Loop(**loop) for loop in stored["loops"]]})


def digest() -> str:
    """A hash of the sources of the CUDA kernels."""
    files = sorted({file for pattern in FILES for file in ROOT.glob(pattern)})
    content = b"".join(file.name.encode() + b"\0" + file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()[:16]


def disassembler() -> str | None:
    """nvdisasm: on the PATH, beside nvcc, or in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    inside = [] if triton is None or triton.origin is None else [Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm"]
    places = [shutil.which("nvdisasm"), *map(str, inside), "/usr/local/cuda/bin/nvdisasm"]
    return next((place for place in places if place is not None and Path(place).is_file()), None)


def operation(instruction: str) -> str:
    """What an instruction does, without the predicate in front of it."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def size_of(name: str) -> int:
    """Bytes that an operation loads or stores per thread."""
    parts = name.split(".")
    return next((size for width, size in _WIDTHS if width in parts), 4)


def _registers(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"\bR(\d+)\b", text)}


def flight(body: Sequence[str], turns: int = 2) -> int:
    """Most bytes under way at once: a load is until an instruction names a register that it fills, perhaps in the next turn."""
    under_way: dict[int, int] = {}  # first register to bytes
    most = 0
    for instruction in [*body] * turns:
        loading, named = operation(instruction), _registers(instruction)
        if loading.startswith("LDG"):
            first = re.search(r"\bR(\d+)\b", instruction)
            named -= {int(first[1])} if first else set()
        for start, size in list(under_way.items()):
            if any(start <= register < start + -(-size // 4) for register in named):
                del under_way[start]
        if loading.startswith("LDG") and first:
            under_way[int(first[1])] = size_of(loading)
            most = max(most, sum(under_way.values()))
    return most


def _shortest(body: Sequence[str], targets: dict[int, int]) -> int:
    """Instructions on the shortest way from the first to the last; ``targets`` has the forward branches within the body."""
    cost = [len(body) + 1] * len(body)
    cost[0] = 1
    for i, instruction in enumerate(body[:-1]):
        always = operation(instruction).startswith(("BRA", "EXIT", "RET")) and not instruction.startswith("@")
        following = [] if always else [i + 1]
        if i in targets:
            following.append(targets[i])
        for j in following:
            cost[j] = min(cost[j], cost[i] + 1)
    return min(cost[-1], len(body))


_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ;")


def instructions(section: str) -> list[str]:
    """The code of a kernel without its labels."""
    return [found[1] for line in section.splitlines() if (found := _INSTRUCTION.match(line))]


def read(section: str) -> tuple[int, int, int, list[Loop]]:
    """(instructions outside the innermost of the loops, barriers, shuffles, loops that touch global memory)."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in section.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(line):
            code.append(found[1])
    branches = {}
    for i, instruction in enumerate(code):
        if (to := re.search(r"BRA.*\(?(\.L_x_\d+)", instruction)) and to[1] in labels:
            branches[i] = labels[to[1]]
    spans = sorted((to, at) for at, to in branches.items() if to < at)
    loops, within = [], 0
    for a, b in spans:
        inner = [(c, d) for c, d in spans if (c, d) != (a, b) and a <= c and d <= b]
        own = [i for i in range(a, b + 1) if not any(c <= i <= d for c, d in inner)]
        place = {i: position for position, i in enumerate(own)}
        body = [code[i] for i in own]
        loads = [size_of(op) for op in map(operation, body) if op.startswith("LDG")]
        stores = [size_of(op) for op in map(operation, body) if op.startswith("STG")]
        targets = {place[i]: place[to] for i, to in branches.items() if i in place and to in place and to > i}
        if loads or stores:
            within += 0 if inner else len(body)
            instructions = len(body) if inner else _shortest(body, targets)
            loops.append(Loop(instructions, sum(loads), max(loads, default=0), flight(body), sum(stores), not inner))
    operations = [operation(instruction) for instruction in code]
    barriers = sum(op.startswith("BAR") for op in operations)
    return len(code) - within, barriers, sum(op.startswith("SHFL") for op in operations), loops


def sections(text: str) -> dict[str, str]:
    """The code of every kernel in nvdisasm's output, by mangled names."""
    parts = re.split(r"\n\t?\.section\s+\.text\.", text)[1:]
    return {part.split(",")[0].strip('"'): part for part in parts}


def collect(nvcc: str, nvdisasm: str) -> dict[str, dict[str, Facts]]:
    """The facts of every kernel by its readable name and chip; compiles csrc/cuda for all chips (a minute or two)."""
    found: dict[str, dict[str, Facts]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        for chip in CHIPS:
            for source in SOURCES:
                usages: list[Usage] = compiled(nvcc, source, chip, cubin)
                text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
                code, names = sections(text), readable([usage.kernel for usage in usages])
                for usage in usages:
                    facts = Facts(usage.registers, usage.shared, *read(code[usage.kernel]))
                    found.setdefault(names[usage.kernel], {})[chip] = facts
    return found


def stored(facts: dict[str, dict[str, Facts]]) -> dict[str, Any]:
    """For JSON."""
    return {kernel: {chip: asdict(f) for chip, f in by_chip.items()} for kernel, by_chip in sorted(facts.items())}
