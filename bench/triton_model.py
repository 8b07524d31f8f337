"""PREDICTIONS of how long the Triton kernels take, beside those for the CUDA kernels: see gpu_model.py. Nothing is measured.

python -m bench.triton_model            # is docs/triton_model.md made of the code as it is? status 1 where it is not
python -m bench.triton_model --write    # compiles and reads the code again: Triton's wheel, some minutes, no GPU
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .cases import CLASSES, Case, cases
from .gpu_facts import Facts
from .gpu_launches import SIDE, Launch
from .gpu_model import CHIPS_KNOWN, H100, PRODUCT, Chip, Work, predictions, product, resident, seconds
from .resources import CHIPS, ROOT
from .triton_facts import SUM, digest, elsewhere

FACTS = ROOT / "bench" / "results" / "gpu-triton-kernels.json"
PAGE = ROOT / "docs" / "triton_model.md"
ALL = 1.0  # share of the code outside the loops that a call runs: every dtype and tile is a kernel of its own


def work(case: Case, launch: Launch, looping: bool) -> Work:
    """What a launch of a Triton kernel moves; ``looping``: whether it goes over the positions tile by tile."""
    n, c, s = case.shape
    cold = n > 1  # as gpu_model.works has it
    one, maps = float(n * c * s * case.dtype.itemsize), n * s * 4.0
    name = launch.kernel.partition("<")[0]
    if name in ("utility_rows", "quadrature_rows"):
        logits = float(n * CLASSES * case.dtype.itemsize)
        return Work((logits, logits, logits), n * CLASSES * 4.0, cold)
    if name == "display_map":
        return Work((maps * launch.blocks / n,), n * SIDE * SIDE * 4.0, False, cold)
    made = maps * (launch.blocks // n)
    if name == "channel_weighted_sum":
        return Work((one,), made, cold)
    # A tile with all positions, whose kernel has no loop, and a row without weights per channel are read once.
    if not looping or case.pooling in ("elementwise", "elementwise_relu", "positive_gradient"):
        return Work((3 * one,), made, cold)
    again = {"mean": (2 * one,), "activation": (one, 3 * one), "plusplus": (one, 2 * one)}[case.pooling]
    return Work((*again, one), made, cold)


def library_sum(case: Case, pieces: int, chip: Chip) -> float:
    """PREDICTED seconds of the library's sum of partial maps, of which nothing is known here but its bytes."""
    n, _, s = case.shape
    return chip.empty + 2 * chip.l2_cycles / chip.clock + n * s * 4.0 * (pieces + 1) / (PRODUCT * chip.l2)


def read_once(facts: Facts) -> Facts:
    """Of display_map: its loops of one turn, which find the extents, are code around the one that stores."""
    extents = [loop for loop in facts.loops if not loop.stores]
    storing = [loop for loop in facts.loops if loop.stores]
    return replace(facts, outside=facts.outside + sum(loop.instructions for loop in extents), loops=storing)


def predicted(case: Case, launches: Sequence[Launch], kernels: dict[str, Any], chip: Chip) -> tuple[list[str], list[float]]:
    """Names and PREDICTED seconds of the launches of a case, the library's among them."""
    names, times = [], []
    for launch in launches:
        if launch.kernel == SUM:
            times.append(library_sum(case, launch.grid[0], chip))
        else:
            facts = Facts.of(kernels[launch.kernel]["facts"])
            facts = read_once(facts) if launch.kernel.startswith("display_map") else facts
            moved = work(case, launch, any(loop.instructions for loop in facts.loops))
            times.append(seconds(launch, facts, moved, case.dtype.itemsize, chip, ALL))
        names.append(launch.kernel)
        if case.operator == "shapley_head" and len(names) == 1:
            times.append(product(case, chip))
            names.append("library's product")
    return names, times


def rows_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every case on every chip, PREDICTED, from the committed facts."""
    rows = []
    for case in cases("cuda"):
        for chip in CHIPS_KNOWN:
            stored = content["chips"][chip.code]
            launches = [Launch(x["kernel"], tuple(x["grid"]), x["threads"], x["shared"]) for x in stored["launches"][case.name]]
            names, times = predicted(case, launches, stored["kernels"], chip)
            share = case.bytes() / sum(times) / chip.copy
            rows.append({"case": case.name, "chip": chip.name, "launches": names, "seconds": times, "of_copy": share})
    return rows


def render(content: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# What the Triton kernels take, and should take: predictions",
        "",
        "**Predictions, not measurements: no GPU took part.** `make gpu-model-write` makes this page of the code that Triton",
        f"{content['triton']} compiled (sources {content['sources']}) for the cases of bench/ops.py, by the model of",
        "[gpu_model.md](gpu_model.md): [bench/triton_model.py](../bench/triton_model.py). Where no nvcc was at installation,",
        "these kernels serve. The library's sum of partial maps and its product with W are guessed by their bytes.",
        "",
        *LESSONS,
        "",
        "## Predicted times",
        "",
        "µs, and share of the copy's bandwidth; in brackets the CUDA kernels' µs, by the same model. Predictions.",
        "",
        "| case | " + " | ".join(chip.name for chip in CHIPS_KNOWN) + " |",
        "| --- |" + " --: |" * len(CHIPS_KNOWN),
    ]
    cuda = {(row["case"], row["chip"]): row["predicted_total"] for row in predictions()}
    cells: dict[str, list[str]] = {}
    for row in rows_of(content):
        other = cuda[row["case"], row["chip"]] * 1e6
        cells.setdefault(row["case"], []).append(f"{sum(row['seconds']) * 1e6:.1f} ({row['of_copy']:.0%}) [{other:.1f}]")
    lines += [f"| {name} | {' | '.join(found)} |" for name, found in cells.items()]
    lines += ["", "## The closed form's launches on an H100", "", "µs each; predictions.", ""]
    lines += ["| case | launches |", "| --- | --- |"]
    for row in rows_of(content):
        if row["case"].startswith("shapley_head") and row["chip"] == H100.name:
            each = ", ".join(f"{name} {t * 1e6:.1f}" for name, t in zip(row["launches"], row["seconds"], strict=True))
            lines.append(f"| {row['case']} | {each} |")
    lines += ["", "## What the compiled kernels take", ""]
    lines += ["Facts of the compiled code. Per thread: registers, bytes of stack (spills), loads in the code by their width in"]
    lines += [
        "bytes, and bytes asked for and not used yet, at most, in code and loops that load. Per block: threads, bytes of shared"
    ]
    lines += ["memory. Blocks: how many a multiprocessor holds. Instructions: outside of loops; loops' own.", ""]
    lines += ["| kernel | chip | threads | registers | stack | shared | blocks | loads | in flight | instructions |"]
    lines += ["| --- | --- | --: | --: | --: | --: | --: | --- | --: | --: |"]
    everything = sorted((kernel, code) for code, stored in content["chips"].items() for kernel in stored["kernels"])
    for kernel, code in everything:
        one = content["chips"][code]["kernels"][kernel]
        facts, threads = Facts.of(one["facts"]), 32 * one["warps"]
        chip = next(chip for chip in CHIPS_KNOWN if chip.code == code)
        blocks = resident(Launch(kernel, (1, 1, 1), threads, 0), facts, chip)
        loads = ", ".join(f"{count} × {width}" for width, count in one["widths"].items())
        flying = "; ".join(str(loop.flight) for loop in facts.loops if loop.loads) or "-"
        inside = "; ".join([str(facts.outside), *(str(loop.instructions) for loop in facts.loops if loop.instructions)])
        numbers = (code, threads, facts.registers, one["stack"], facts.shared, blocks, loads, flying, inside)
        lines.append(f"| `{kernel}` | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


LESSONS = """\
## What reading the code led to

- Triton knows of a stride whether 16 divides it, and 7 x 7 and 14 x 14 positions have none such: channels first, every load of
  activations was one element, 4 bytes or 2, into up to 255 registers a thread, and two rows of `weighted_reduce` read the
  gradient or the activations twice or three times. Where the positions are few (512 at most), a tile has all of them now: it
  is read once, as one piece of memory, in 16-byte loads, and spread into channels and positions in shared memory.
- Channels last were read in 16-byte loads already; there such a tile serves the rows that need a second pass (`activation`,
  `plusplus`). A general tile with few channels has more positions, so that as many bytes are under way.
- A position of a display map cost five divisions by extents that are the same for the whole map, and three whole-number ones.
  It costs a reciprocal's product and one. Programs, each of which finds the extents first, are half as many.
- What is left: the sum of the partial maps is a launch of the library's, and the display kernel computes every output by itself
  where the CUDA kernel shares a row's part. In bfloat16 channels first, `mean` is bound by its instructions (the spreading and
  the sums of channels by shuffles), not by the memory. `utility_rows` reads the logits three times.
""".splitlines()


def write() -> int:
    """Compile and read the code again."""
    chips = {code: elsewhere(code) for code in CHIPS}
    content = {
        "what": "facts about compiled code, for predictions; nothing here was measured on a GPU",
        "triton": {chip.pop("triton") for chip in chips.values()}.pop(),
        "sources": digest(),
        "chips": chips,
    }
    FACTS.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(render(content))
    return 0


def check() -> int:
    """1 where the page or the facts are not those of the code."""
    content = json.loads(FACTS.read_text())
    stored = content["chips"].values()
    if missing := [case.name for case in cases("cuda") if any(case.name not in chip["launches"] for chip in stored)]:
        print(f"There are no launches of {missing[0]!r} in {FACTS.name}: python -m bench.triton_model --write")
        return 1
    if content["sources"] != digest():
        print(f"kernels/ has changed since {FACTS.name} was made: python -m bench.triton_model --write")
        return 1
    if PAGE.read_text() != render(content):
        print(f"{PAGE.name} is not what bench/triton_model.py makes of the facts: python -m bench.triton_model --write")
        return 1
    print(f"{PAGE.name} is made of the code as it is, by Triton {content['triton']}.")
    return 0


def main(arguments: Sequence[str]) -> int:
    return write() if list(arguments) == ["--write"] else check()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
