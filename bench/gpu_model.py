"""PREDICTIONS of how long the CUDA kernels take, from the compiled code and public figures of the chips. Nothing is measured.

python -m bench.gpu_model                       # is docs/gpu_model.md made of the code as it is? status 1 where it is not
python -m bench.gpu_model --write               # reads the code again: nvcc, nvdisasm and g++, a few minutes, no GPU
python -m bench.gpu_model --compare RESULT.json # predictions beside what bench.ops measured on a GPU, joined by case

A launch takes what an empty one takes, and then the longer of two times, with a soft knee between them:

latency    waves of blocks x one block's way: its rounds of loads (bytes of a block over bytes in flight, which is Little's law
           for one block), the instructions of its loops and of the code around them, barriers and shuffles;
bandwidth  bytes over what the memory or the L2 gives, and over 64 bytes a cycle that a multiprocessor takes in.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .cases import CLASSES, Case, cases
from .gpu_facts import Facts, Loop, collect, digest, disassembler, stored
from .gpu_launches import SIDE, Launch, launchers
from .resources import CHIPS, MOST_THREADS, REGISTERS, ROOT, release

FACTS = ROOT / "bench" / "results" / "gpu-kernels.json"
PAGE = ROOT / "docs" / "gpu_model.md"


@dataclass(frozen=True, slots=True)
class Chip:
    """A chip as its data sheet and others' micro-benchmarks describe it; rates in bytes or cycles per second.

    Multiprocessors, clock, L2 and memory: NVIDIA, "A100 80GB" (SXM, HBM2e, 2039 GB/s), "H100 Tensor Core GPU" (SXM, HBM3, 3.35
    TB/s) and "H200 Tensor Core GPU" (4.8 TB/s) data sheets and the Ampere and Hopper white papers (108 and 132 of them, 40 and
    50 MB). Idle latencies in cycles, rounded: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
    Microbenchmarking" (arXiv 2402.13499), and chipsandcheese.com, "Nvidia's H100: Funny L2, and Tons of Bandwidth" (2023),
    which also has the L2's bandwidth, rounded here.
    """

    name: str
    code: str
    multiprocessors: int
    clock: float
    memory: float
    l2: float
    memory_cycles: int
    l2_cycles: int
    empty: float

    @property
    def copy(self) -> float:
        """What ``copy_`` reaches, read and written."""
        return COPY * self.memory


A100 = Chip("A100 80GB", "sm_80", 108, 1.41e9, 2.039e12, 4.0e12, 470, 260, 2.4e-6)
H100 = Chip("H100 SXM", "sm_90", 132, 1.755e9, 3.35e12, 5.5e12, 480, 260, 2.2e-6)
H200 = Chip("H200", "sm_90", 132, 1.755e9, 4.8e12, 5.5e12, 480, 260, 2.2e-6)
CHIPS_KNOWN = (A100, H100, H200)

# Assumptions, each to be replaced by what `make gpu` measures.
COPY = 0.90  # share of the data sheet's bandwidth that a copy reaches
LOADED = 2.0  # memory latency under load over that of an idle chip
CPI = 3.0  # cycles from one instruction of a warp to its next, mostly dependent ones (4 cycles), some not
ISSUE = 0.8  # instructions that a scheduler issues per cycle with warps enough
OUTSIDE = 1 / 3  # share of the code outside the loops that a call runs: one dtype of several, one tail of an unrolled loop
BARRIER, SHUFFLE = 40, 25  # cycles
INTAKE = 64  # bytes a cycle and multiprocessor
KNEE = 3.0  # how sharply latency gives way to bandwidth
PRODUCT = 0.7  # share of the bandwidth that the library's matrix product reaches, where it is bound by that
FLOPS = {"A100 80GB": 19.5e12, "H100 SXM": 67e12, "H200": 67e12}  # float32 without tensor cores, data sheets


@dataclass(frozen=True, slots=True)
class Work:
    """What a launch moves, in bytes: one entry of ``loads`` per phase that follows the one before, and what it stores; whether
    the loads lie in memory or in the L2, and whether the stores go to memory.
    """

    loads: tuple[float, ...]
    stores: float
    in_memory: bool
    stored_in_memory: bool = False


def resident(launch: Launch, facts: Facts, chip: Chip) -> int:
    """Blocks of this launch that a multiprocessor holds at once."""
    by_registers = REGISTERS // (-(-facts.registers // 8) * 8 * launch.threads)
    return min(by_registers, CHIPS[chip.code] // (facts.shared + launch.shared + 1024), MOST_THREADS // launch.threads)


def chosen(facts: Facts, width: int, count: int) -> list[Loop]:
    """The loops that bring in the data of ``count`` phases, in the code's order: most bytes under way, of the widest loads."""
    loading = [loop for loop in facts.loops if loop.loads]
    fitting = [loop for loop in loading if loop.width in (16, width)] or loading
    widest = [loop for loop in fitting if loop.width == 16] or fitting
    best = sorted(widest, key=lambda loop: -loop.flight)[:count]
    return [loop for loop in facts.loops if any(loop is one for one in best)]


def seconds(launch: Launch, facts: Facts, work: Work, width: int, chip: Chip, outside: float = OUTSIDE) -> float:
    """PREDICTED seconds of the launch, an empty one's included. ``width``: bytes of an element of the activations; ``outside``:
    share of the code outside the loops that a call runs.
    """
    blocks, threads = launch.blocks, launch.threads
    most = resident(launch, facts, chip) * chip.multiprocessors
    together = -(-min(blocks, most) // chip.multiprocessors)
    cpi = max(CPI, threads / 32 / 4 * together / ISSUE)
    latency = LOADED * chip.memory_cycles if work.in_memory else chip.l2_cycles
    cycles = outside * facts.outside * cpi + BARRIER * facts.barriers + SHUFFLE * facts.shuffles
    loops = chosen(facts, width, len(work.loads))
    for i, moved in enumerate(work.loads):
        share = moved / blocks / threads  # of a thread
        loop = loops[min(i, len(loops) - 1)] if loops else Loop(10, width, width, width, 0, True)
        rounds = max(1, math.ceil(share / loop.flight))
        cycles += max(rounds * latency, share / loop.loads * loop.instructions * cpi)
    storing = [loop for loop in facts.loops if loop.stores and loop.inner]
    if storing:
        loop = max(storing, key=lambda loop: loop.instructions)  # the others fill, or copy what is short
        cycles += work.stores / blocks / threads * loop.instructions / loop.stores * cpi
    waves = math.ceil(blocks / most)
    moved = sum(work.loads) + work.stores
    in_memory = sum(work.loads) * work.in_memory + work.stores * work.stored_in_memory
    bandwidth = max(
        in_memory / chip.copy + (moved - in_memory) / chip.l2, moved / blocks * together * waves / (INTAKE * chip.clock)
    )
    return chip.empty + ((waves * cycles / chip.clock) ** KNEE + bandwidth**KNEE) ** (1 / KNEE)


def works(case: Case, launches: Sequence[Sequence[Launch]]) -> list[list[Work]]:
    """What every launch of the case moves."""
    n, c, s = case.shape
    cold = n > 1  # bench.ops keeps one image's tensors in the L2, as a forward pass leaves them, and larger ones out of it
    one, maps = float(n * c * s * case.dtype.itemsize), n * s * 4.0
    found = []
    for operator, group in enumerate(launches):
        row = []
        for launch in group:
            name = launch.kernel.partition("<")[0]
            pieces = launch.grid[0]
            if name == "add_kernel":
                row.append(Work((maps * group[0].grid[0],), maps, False))
            elif name in ("rows_of_utility", "rows_of_integral"):
                logits = float(n * CLASSES * case.dtype.itemsize)
                row.append(Work((logits, logits, logits), n * CLASSES * 4.0, cold))
            elif name == "rows_of_few_logits":
                # The logits, and besides them a target and the logit that it names.
                logits = float((n + 1) * CLASSES * case.dtype.itemsize)
                row.append(Work((logits, n * 8.0), n * CLASSES * 4.0, cold))
            elif name == "display_kernel":
                earlier = group[0].grid[0] if len(group) > 1 else 1
                row.append(Work((maps * launch.grid[0] * earlier,), n * SIDE * SIDE * 4.0, False, cold))
            elif case.operator != "weighted_reduce":
                row.append(Work((one,), maps * pieces, cold))
            elif name == "dense_kernel" or case.pooling in ("elementwise", "elementwise_relu", "positive_gradient"):
                row.append(Work((3 * one,), maps * pieces, cold))
            else:
                again = {"mean": (2 * one,), "activation": (3 * one,), "plusplus": (one, 2 * one)}[case.pooling]
                row.append(Work((*again, one), maps * pieces, cold))
        found.append(row)
        del operator
    return found


def product(case: Case, chip: Chip) -> float:
    """PREDICTED seconds of the library's rows @ W, about which nothing is known here but its bytes and operations."""
    n, c, _ = case.shape
    moved = (CLASSES * c * case.dtype.itemsize) + n * (CLASSES + c) * 4.0
    rate = chip.copy if n > 1 else chip.l2
    return chip.empty + moved / (PRODUCT * rate) + 2.0 * n * CLASSES * c / (PRODUCT * FLOPS[chip.name])


def predict(case: Case, launches: Sequence[Sequence[Launch]], facts: dict[str, dict[str, Facts]], chip: Chip) -> dict[str, Any]:
    """PREDICTED seconds of the case's launches, in order, and what follows: share of the copy, times as many empty launches."""
    width = case.dtype.itemsize
    times, names = [], []
    for group, moved in zip(launches, works(case, launches), strict=True):
        for launch, work in zip(group, moved, strict=True):
            times.append(seconds(launch, facts[launch.kernel][chip.code], work, width, chip))
            names.append(launch.kernel)
        if case.operator == "shapley_head" and len(names) == 1:
            times.append(product(case, chip))
            names.append("library's product")
    total = sum(times)
    return {
        "case": case.name,
        "chip": chip.name,
        "launches": names,
        "predicted_seconds": times,
        "predicted_total": total,
        "predicted_of_copy": case.bytes() / total / chip.copy,
        "predicted_over_empty": total / (len(times) * chip.empty),
    }


def load() -> tuple[dict[str, Any], dict[str, dict[str, Facts]], dict[str, list[list[Launch]]]]:
    """The committed file, its facts, and its launches by the cases' names."""
    content = json.loads(FACTS.read_text())
    facts = {kernel: {chip: Facts.of(f) for chip, f in chips.items()} for kernel, chips in content["kernels"].items()}
    launches = {
        name: [[Launch(x["kernel"], tuple(x["grid"]), x["threads"], x["shared"]) for x in group] for group in groups]
        for name, groups in content["launches"].items()
    }
    return content, facts, launches


def predictions() -> list[dict[str, Any]]:
    """Of every case on every chip, from the committed facts."""
    _, facts, launches = load()
    return [predict(case, launches[case.name], facts, chip) for case in cases("cuda") for chip in CHIPS_KNOWN]


LESSONS = """\
## What the predictions led to

Also predicted, for an H100 and (1, 2048, 7 x 7) in float32 where it is not said otherwise. The first version of this page in
git is from before any of it.

- `class_maps` was one block to an image, 77 µs: some 10 of them 4-byte loads with 24 bytes under way to a thread, some 60 the
  display form, whose 224 x 224 outputs cost that block 188 instructions each, 64-bit divisions among them. It is two launches
  now: partial maps by the kernel of `channel_weighted_sum`, in 16-byte loads, and a display kernel whose blocks all add the
  partial maps up, find the extents, and write whole rows, 18 instructions to an output, in 16-byte stores. `display_map` is the
  same kernel.
- A cluster of blocks with distributed shared memory would make that one launch on sm_90, at the price of an empty launch less,
  2.2 µs of the chain's. It is not done: it cannot be tried here, and the older chips keep the two launches in any case.
- `utility_rows` of at most 1024 logits reads them once, into registers, and asks for the class's own logit before the sums.
- In `last_kernel`, `rows_kernel` and `dense_kernel` every load stood behind the branch that guards its use, so that one or two
  of four were under way. No branch stands between them now: 48 to 128 bytes a thread are under way.
- 1.3 times as many empty launches at batch 1 is out of reach for the chain as it is: the library's product alone, which reads W
  from the L2, takes twice an empty launch. So is 80 % of the bandwidth at batch 64, where four empty launches are 9 of 19 µs.
  Both would need the product, `utility_rows` and the partial maps in one kernel.
""".splitlines()


def render(content: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The page."""
    chips = [chip.name for chip in CHIPS_KNOWN]
    by_case: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["chip"]] = row
    lines = [
        "# What the CUDA kernels should take: predictions",
        "",
        "**Predictions, not measurements: no GPU took part.** `make gpu-model-write` makes this page of the code that nvcc",
        f"{content['nvcc']} compiled (sources {content['sources']}), of the launchers' own grids, and of public figures of the",
        "chips; [bench/gpu_model.py](../bench/gpu_model.py) has the formulas, sources and assumptions. `make gpu` puts what it",
        "measures beside them. An empty launch is taken to cost 2.4 µs on an A100 and 2.2 µs on the others.",
        "",
        "## The closed form: utility_rows, the library's product with W, class_maps",
        "",
        "| case, prediction | chip | launches, µs each | µs | × as many empty launches | of the copy |",
        "| --- | --- | --- | --: | --: | --: |",
    ]
    heads = [row for row in rows if row["case"].startswith("shapley_head")]
    for row in heads:
        each = ", ".join(
            f"`{name}` {t * 1e6:.1f}" if "<" in name else f"{name} {t * 1e6:.1f}"
            for name, t in zip(row["launches"], row["predicted_seconds"], strict=True)
        )
        lines.append(
            f"| {row['case'].removeprefix('shapley_head ')} | {row['chip']} | {each} | {row['predicted_total'] * 1e6:.1f} | "
            f"{row['predicted_over_empty']:.2f} | {row['predicted_of_copy']:.0%} |"
        )
    lines += ["", *LESSONS]
    lines += ["", "## Every other case of bench/ops.py", "", "µs, and share of the copy's bandwidth; predictions.", ""]
    lines += ["| case | " + " | ".join(chips) + " |", "| --- |" + " --: |" * len(chips)]
    for name, found in by_case.items():
        if not name.startswith("shapley_head"):
            cells = [f"{found[chip]['predicted_total'] * 1e6:.1f} ({found[chip]['predicted_of_copy']:.0%})" for chip in chips]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "## What the compiled loops have under way", ""]
    lines += ["Bytes that a thread has asked for and not used yet, at most, in the loops that load activations; blocks that a"]
    lines += ["multiprocessor holds by registers and static shared memory; instructions outside the loops.", ""]
    lines += ["| kernel | chip | in flight | blocks | instructions |", "| --- | --- | --: | --: | --: |"]
    for kernel, stored_chips in content["kernels"].items():
        for code, one in stored_chips.items():
            facts = Facts.of(one)
            flying = "; ".join(str(loop.flight) for loop in facts.loops if loop.loads) or "-"
            blocks = resident(Launch(kernel, (1, 1, 1), 256, 0), facts, A100 if code == "sm_80" else H100)
            lines.append(f"| `{kernel}` | {code} | {flying} | {blocks} | {facts.outside} |")
    return "\n".join(lines) + "\n"


def write() -> int:
    """Read the code again; 2 where a tool is missing."""
    nvcc, nvdisasm = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"), disassembler()
    if nvcc is None or nvdisasm is None:
        print(f"Needs nvcc (found: {nvcc}) and nvdisasm (found: {nvdisasm}): docs/gpu_model.md was NOT made.")
        return 2
    with launchers() as found:
        launches = {case.name: found.of(case) for case in cases("cuda")}
    used = {launch.kernel for groups in launches.values() for group in groups for launch in group}
    facts = {kernel: chips for kernel, chips in collect(nvcc, nvdisasm).items() if kernel in used}
    content = {
        "what": "facts about compiled code, for predictions; nothing here was measured on a GPU",
        "nvcc": release(nvcc),
        "sources": digest(),
        "kernels": stored(facts),
        "launches": {name: [[asdict(x) for x in group] for group in groups] for name, groups in launches.items()},
    }
    FACTS.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(render(json.loads(FACTS.read_text()), predictions()))
    return 0


def check() -> int:
    """1 where the page or the facts are not those of the code."""
    content, _, launches = load()
    if missing := [case.name for case in cases("cuda") if case.name not in launches]:
        print(f"There are no launches of {missing[0]!r} in gpu-kernels.json: python -m bench.gpu_model --write")
        return 1
    if content["sources"] != digest():
        print("csrc/ has changed since bench/results/gpu-kernels.json was made: python -m bench.gpu_model --write")
        return 1
    if PAGE.read_text() != render(content, predictions()):
        print("docs/gpu_model.md is not what bench/gpu_model.py makes of the facts: python -m bench.gpu_model --write")
        return 1
    print(f"docs/gpu_model.md is made of the code as it is, by nvcc {content['nvcc']}.")
    return 0


def compare(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Predictions joined with the rows of a result of bench.ops, by case; for the chip that was measured, else an error."""
    device = measured["conditions"]["device"]
    chip = next((chip for chip in CHIPS_KNOWN if chip.name.split()[0] in device), None)
    if chip is None:
        raise SystemExit(f"There are no predictions for {device!r}: only for {', '.join(c.name for c in CHIPS_KNOWN)}.")
    predicted = {row["case"]: row for row in predictions() if row["chip"] == chip.name}
    rows = []
    for row in measured["results"]:
        if "cuda" in row["seconds"] and row["case"] in predicted:
            took, guess = row["seconds"]["cuda"], predicted[row["case"]]
            seen = {"measured_seconds": took, "measured_of_copy": row["of_copy"]["cuda"]}
            rows.append({**guess, **seen, "measured_over_predicted": took / guess["predicted_total"]})
    return rows


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] == "--write":
        return write()
    if arguments and arguments[0] == "--compare":
        source = Path(arguments[1])
        rows = compare(json.loads(source.read_text()))
        print(f"{'case':54} {'predicted µs':>12} {'measured µs':>12} {'measured / predicted':>20}")
        for row in rows:
            print(
                f"{row['case']:54} {row['predicted_total'] * 1e6:12.1f} {row['measured_seconds'] * 1e6:12.1f} "
                f"{row['measured_over_predicted']:20.2f}"
            )
        source.with_name(f"{source.stem}-predicted.json").write_text(json.dumps(rows, indent=1))
        return 0
    return check()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
