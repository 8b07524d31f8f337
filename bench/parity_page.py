"""What the parity report compares, and docs/parity.md from its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shapleycam import METHODS

#: Display maps in [0, 1]. The min-max magnifies the rounding of a float32 model; peers return float32 either way.
TOLERANCE = {"float64": 1e-6, "float32": 3e-4}
UTILITIES = ("logit", "probability", "log_probability", "rest")
#: method -> class of pytorch-grad-cam, of torch-cam
GRAD_CAM = {
    "shapleycam": "ShapleyCAM",
    "gradcam": "GradCAM",
    "hirescam": "HiResCAM",
    "gradcam-e": "GradCAMElementWise",
    "xgradcam": "XGradCAM",
    "layercam": "LayerCAM",
    "gradcam++": "GradCAMPlusPlus",
    "randomcam": "RandomCAM",
}
TORCH_CAM = {"gradcam": "GradCAM", "xgradcam": "XGradCAM", "layercam": "LayerCAM", "gradcam++": "GradCAMpp"}
PAPER = ("shapleycam", "shapleycam-h", "shapleycam-e", "shapleycam-x", *GRAD_CAM)
METHOD_ROWS = tuple(name for name in METHODS if name in PAPER)

#: What is wrong with pytorch-grad-cam's ShapleyCAM besides; ``tests/compat`` shows both.
FAILS = (
    "pytorch-grad-cam's ShapleyCAM raises an error with every `reshape_transform`, hence for every Swin and ViT (it multiplies "
    "the weight by activations that it has not reshaped); above it was given a layer with the channels first, put in for the "
    "comparison. It raises an error for two target layers as well (the graph is freed after the first)."
)


def page(report: dict[str, Any]) -> str:
    """docs/parity.md, from the content of parity.json."""
    rows, facts = report["cells"], report["conditions"]
    live = sum(row["deviation"] > 0.01 for row in rows)
    lines = [
        "# Parity",
        "",
        "`make parity` makes this page and `bench/results/parity.json`, where every cell is. Networks and layers are those of",
        "the paper, the weights are random and seeded, the explained class is the one whose maps vary most. Each figure is the",
        f"largest difference over all pixels and the four utilities ({', '.join(UTILITIES)}). Display maps are in [0, 1].",
        f"{live} of the {len(rows)} maps vary by more than 0.01 (standard deviation). The others are almost constant, or zero "
        f"everywhere behind the ReLU, and show little: {_constant(rows)}.",
        "",
        f"pytorch-grad-cam {facts['grad_cam']}, torch-cam {facts['torch_cam']}, torch {facts['torch']}. The networks run in",
        "float64, but for the three large Swin: in float32 the min-max of the display form magnifies everybody's rounding.",
        "",
        "## Against the formulas",
        "",
        "Our display map against the formulas in float64, written out in `bench/formulas.py` without using the package.",
        "",
        *_grid(rows, [m for m in METHOD_ROWS if m != "randomcam"], lambda row: row.get("formula")),
        "",
        "## Against pytorch-grad-cam",
        "",
        "Display map against display map. It does not have the three other variants of ShapleyCAM.",
        "",
        *_grid(rows, [m for m in METHOD_ROWS if m in GRAD_CAM], lambda row: row.get("grad_cam", {}).get("ours")),
        "",
        "## Against torch-cam",
        "",
        "Map against map before the display form, which it does otherwise, in units of the map's maximum.",
        "",
        *_grid(rows, [m for m in METHOD_ROWS if m in TORCH_CAM], lambda row: row.get("torch_cam", {}).get("ours")),
        "",
        "## Where a peer differs",
        "",
        *_differences(rows),
        "",
        FAILS,
    ]
    return "\n".join(lines) + "\n"


def _figure(value: float) -> str:
    # In units of a maximum that is zero, any difference is endless.
    return "above 10" if value > 10 else f"{value:.0e}"


def _constant(rows: list[dict[str, Any]]) -> str:
    """Where the maps are that hardly vary."""
    flat = [(row["network"], row["utility"]) for row in rows if not row["deviation"] > 0.01]
    counted = [f"{network}, {utility} ({flat.count((network, utility))})" for network, utility in dict.fromkeys(flat)]
    return "; ".join(counted) or "none"


def _grid(rows: list[dict[str, Any]], methods: list[str], pick: Callable[[dict[str, Any]], float | None]) -> list[str]:
    lines = [f"| network | {' | '.join(methods)} |", f"| --- {'| --- ' * len(methods)}|"]
    for network in dict.fromkeys(row["network"] for row in rows):
        cells = []
        for method in methods:
            found = [pick(row) for row in rows if (row["network"], row["method"]) == (network, method)]
            values = [value for value in found if value is not None]
            cells.append(_figure(max(values)) if values else "")
        lines.append(f"| {network} | {' | '.join(cells)} |")
    return lines


def _differences(rows: list[dict[str, Any]]) -> list[str]:
    """One line per peer and method with a difference above the tolerance."""
    lines = [
        "Cells whose difference exceeds the tolerance ("
        + ", ".join(f"{bound:.0e} in {dtype}" for dtype, bound in TOLERANCE.items())
        + "), with the change of the formula that gives the peer's map instead.",
        "",
        "| peer | method | cells | peer, ours | ours, formula | what the peer computes | peer, that |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for peer, title, own in (("grad_cam", "pytorch-grad-cam", "formula"), ("torch_cam", "torch-cam", "formula_raw")):
        for method in METHOD_ROWS:
            apart = [
                row
                for row in rows
                if row["method"] == method and peer in row and not row[peer]["ours"] <= TOLERANCE[row["dtype"]]
            ]
            if not apart:
                continue
            words = sorted({row[peer].get("variant", "not explained") for row in apart})
            shown = [row[peer]["variant_difference"] for row in apart if "variant_difference" in row[peer]]
            lines.append(
                f"| {title} | {method} | {len(apart)} | {_figure(max(row[peer]['ours'] for row in apart))} | "
                f"{max(row.get(own, 0.0) for row in apart):.0e} | {'; '.join(words)} | "
                f"{f'{max(shown):.0e}' if shown else ''} |"
            )
    return lines if len(lines) > 4 else ["No cell exceeds the tolerance."]
