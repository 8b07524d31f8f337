"""Registers, spills and shared memory of every CUDA kernel, as nvcc's assembler reports them; needs nvcc and no GPU.

python -m bench.resources           # compares with docs/cuda_resources.md, exit status 1 where they differ
python -m bench.resources --write   # writes it
"""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "cuda_resources.md"
SOURCES = ("display.cu", "head.cu", "reduce.cu")
#: Static shared memory that the blocks of a multiprocessor have together, in bytes; each block takes 1 KiB more.
CHIPS = {"sm_80": 164 << 10, "sm_90": 228 << 10}
THREADS = 256  # kThreads of csrc/cuda/launch.h
REGISTERS, MOST_THREADS = 1 << 16, 2048  # of a multiprocessor, on both chips


@dataclass(frozen=True, slots=True, order=True)
class Usage:
    """What one kernel takes on one chip: registers per thread, bytes of stack and of spills per thread, of shared memory."""

    kernel: str
    chip: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor can hold; dynamic shared memory, which depends on the call, is not counted."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * THREADS)
        return min(by_registers, CHIPS[self.chip] // (self.shared + 1024), MOST_THREADS // THREADS)


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<chip>sm_\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def parse(log: str) -> list[Usage]:
    """The kernels in the output of ``nvcc -Xptxas -v``, by their mangled names."""
    found = []
    for match in _ENTRY.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        numbers = (int(match[key]) for key in ("registers", "stack", "stores", "loads"))
        found.append(Usage(match["name"], match["chip"], *numbers, int(shared[1]) if shared else 0))
    if len(found) != log.count("Compiling entry function"):
        raise ValueError("The assembler's report has a kernel that was not understood: see bench/resources.py.")
    return found


def readable(names: list[str]) -> dict[str, str]:
    """Mangled names without their arguments and what every kernel has in front: "reduce_kernel<float, true, 3>"."""
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.splitlines()
    short = {}
    for name, line in zip(names, lines, strict=True):
        line = line.replace("shapleycam::", "").replace("(anonymous namespace)::", "").removeprefix("void ")
        short[name] = line.partition("(")[0]
    return short


def compiled(nvcc: str, source: str, chip: str, cubin: Path) -> list[Usage]:
    """Compile one file of csrc/cuda for a chip into ``cubin``, as CMakeLists.txt does, and read what the assembler says."""
    command = [nvcc, "-std=c++17", "-O3", "-DNDEBUG", f"-arch={chip}", "-cubin", "-Xptxas", "-v", "-Xcompiler=-fPIC"]
    command += [f"-I{ROOT / 'csrc' / 'include'}", "-o", str(cubin), str(ROOT / "csrc" / "cuda" / source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source} does not compile for {chip}:\n{done.stderr}")
    return parse(done.stderr)


def measure(nvcc: str) -> list[Usage]:
    """What every kernel takes on every chip, sorted, by readable names."""
    with tempfile.TemporaryDirectory() as folder:
        found = [u for chip in CHIPS for source in SOURCES for u in compiled(nvcc, source, chip, Path(folder) / "out.cubin")]
    names = readable([usage.kernel for usage in found])
    return sorted(Usage(names[u.kernel], u.chip, u.registers, u.stack, u.spill_stores, u.spill_loads, u.shared) for u in found)


def release(nvcc: str) -> str:
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", version)
    if found is None:
        raise RuntimeError(f"nvcc does not say its version: {version!r}")
    return found[1]


def render(usages: list[Usage], version: str) -> str:
    lines = [
        "# What the CUDA kernels take of a multiprocessor",
        "",
        f"Made by `make resources-write` with nvcc {version}; `make resources` compares. Per thread: registers, and bytes of",
        f"stack, spill stores and spill loads. Per block of {THREADS} threads: bytes of static shared memory. Blocks: how many",
        "of a multiprocessor's 8 fit by registers and static shared memory; what a launch asks for besides is not counted. No",
        "GPU took part: these are the assembler's figures, and say nothing about time.",
        "",
        "| kernel | chip | registers | stack | spill stores | spill loads | shared | blocks |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    for u in usages:
        numbers = (u.registers, u.stack, u.spill_stores, u.spill_loads, u.shared, u.blocks)
        lines.append(f"| `{u.kernel}` | {u.chip} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


def compare(committed: str, measured: str) -> list[str]:
    """The lines that differ, "-" as committed and "+" as measured."""
    lines = difflib.unified_diff(committed.splitlines(), measured.splitlines(), lineterm="", n=0)
    return [line for line in lines if line.startswith(("-|", "+|"))]


def main(arguments: list[str]) -> int:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        print("There is no nvcc here: the CUDA kernels' resources were NOT compared.")
        return 2
    version = release(nvcc)
    if arguments == ["--write"]:
        TABLE.write_text(render(measure(nvcc), version))
        return 0
    committed = TABLE.read_text()
    made_with = re.search(r"with nvcc ([\d.]+);", committed)
    if made_with is None or made_with[1] != version:
        print(f"{TABLE.name} was made with nvcc {made_with and made_with[1]}, and this is {version}: NOT compared.")
        return 2
    usages = measure(nvcc)
    differ = compare(committed, render(usages, version))
    if differ:
        print("\n".join(differ))
        print("The CUDA kernels take other resources than docs/cuda_resources.md says. If that is meant: make resources-write.")
        return 1
    print(f"{len(usages)} kernels take what docs/cuda_resources.md says; {sum(u.spill_loads > 0 for u in usages)} spill.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
