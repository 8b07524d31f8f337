"""The table and the roofline plot of a result of ``bench.ops``. Usage: python -m bench.report RESULT.json [PLOT.png]"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(rows: Sequence[dict[str, Any]], *, header: bool = True) -> str:
    """One line per case and backend: microseconds, share of the copy's bandwidth, and factors over eager and compile."""
    lines = [f"{'case':54} {'backend':8} {'µs':>9} {'of copy':>8} {'× eager':>8} {'× compile':>9}"] if header else []
    for row in rows:
        for name, share in row["of_copy"].items():
            compiled = row["over_compile"].get(name)
            lines.append(
                f"{row['case']:54} {name:8} {row['seconds'][name] * 1e6:9.1f} {share:8.0%} "
                f"{row['over_eager'][name]:8.1f} {f'{compiled:9.2f}' if compiled else '-':>9}"
            )
    return "\n".join(lines)


#: What is aimed at: (column, at least or at most, how much, for which rows).
AIMS = {
    "cuda": [
        ("of_copy", ">=", 0.90, "larger than the L2"),
        ("over_eager", ">=", 3.0, "all"),
        ("over_compile", ">=", 1.0, "all"),
        ("over_empty", "<=", 1.3, "batch 1"),
    ],
    "cpu": [
        ("of_copy", ">=", 0.85, "larger than the cache"),
        ("over_eager", ">=", 15.0, "larger than the cache"),
        ("over_compile", ">=", 1.5, "larger than the cache"),
    ],
}
_CACHE = 50 << 20


def verdicts(rows: Sequence[dict[str, Any]], device: str) -> str:
    """One line per aim and backend: how many of the cases it is for reach it, and the worst."""
    lines = []
    for column, sign, aim, where in AIMS[device]:
        chosen = [
            row for row in rows if where == "all" or (row["shape"][0] == 1 if where == "batch 1" else row["bytes"] > _CACHE)
        ]
        for name in sorted({name for row in chosen for name in row[column]}):
            found = [(row[column][name], row["case"]) for row in chosen if name in row[column]]
            met = sum(value >= aim if sign == ">=" else value <= aim for value, _ in found)
            worst = min(found) if sign == ">=" else max(found)
            lines.append(
                f"aim {column} {sign} {aim:g} ({where}), {name}: {met} of {len(found)} cases; worst {worst[0]:.2f} ({worst[1]})"
            )
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bytes moved against bytes per second, one colour per backend, with the measured copy as the roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    rows = result["results"]
    for name, mark in (("cuda", "o"), ("triton", "s"), ("native", "o"), ("compile", "^"), ("eager", "x")):
        found = [(row["bytes"], row["bytes"] / row["seconds"][name] / 1e9) for row in rows if name in row["seconds"]]
        if found:
            axes.scatter(*zip(*found, strict=True), marker=mark, alpha=0.7, label=name)
    roof = sorted(row["copy_bytes_per_second"] / 1e9 for row in rows)
    axes.axhspan(roof[0], roof[-1], alpha=0.2, color="grey", label="copy_ (read and written)")
    axes.set(xscale="log", yscale="log", xlabel="bytes of the inputs and the map", ylabel="GB/s")
    known = result["conditions"]
    axes.set_title(f"{known['device']}, torch {known['torch']}, {known['threads']} threads, {known['commit']}", fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    source = Path(sys.argv[1])
    result = json.loads(source.read_text())
    print(table(result["results"]), verdicts(result["results"], result["conditions"]["device_type"]), sep="\n\n")
    target = Path(sys.argv[2]) if len(sys.argv) == 3 else source.with_suffix(".png")
    plot(result, target)
    print(target)


if __name__ == "__main__":
    main()
