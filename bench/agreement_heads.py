"""Which recipe for which head: baselines, nodes and masks against exact Shapley values. Usage: python -m bench.agreement_heads

Writes bench/results/agreement-heads.json, and from it docs/agreement-heads.md and docs/pictures/agreement-cost.png; with
--page the page only.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from tests.helpers import Split, build, small_heads
from torch import nn

from shapleycam import Explainer
from shapleycam.shapley import Game

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "agreement-heads.md"
RESULT, PICTURE = ROOT / "bench" / "results" / "agreement-heads.json", ROOT / "docs" / "pictures" / "agreement-cost.png"
SEED, IMAGES, CELLS, ORDERS = 5, 3, (3, 3), 48
NODES = (1, 2, 3, 4, 8, 16)
MASKED = ((4, 4), (4, 16))
#: (network, layer, what is behind the layer)
HEADS = (
    ("tv:resnet18", "layer4", "mean over the positions, linear"),
    ("tv:mobilenet_v3_small", "features", "mean over the positions, two linear layers, hard swish"),
    ("tv:resnet18", "layer3", "convolutions, batch norm, ReLU"),
    ("tv:vgg11", "features", "max pooling's output flattened, three linear layers, ReLU"),
    ("timm:vit_tiny_patch16_224", "blocks.11.norm1", "attention, LayerNorm, GELU, class token"),
    ("timm:swin_tiny_patch4_window7_224", "layers.3.blocks.0", "window attention, LayerNorm, GELU, mean"),
    ("timm:convnext_atto", "stages", "mean over the positions, LayerNorm, linear"),
)


def ways() -> list[tuple[str, dict[str, Any], int]]:
    """(name, the explainer's arguments, head passes: a second order counts for three, one forward and two backward)."""
    found: list[tuple[str, dict[str, Any], int]] = [
        ("first order", {"method": "hirescam", "engine": "auto"}, 1),
        ("second order", {"method": "shapleycam-h", "engine": "auto"}, 2),
    ]
    quadrature = {"method": "shapleycam-h", "engine": "quadrature"}
    found += [(f"K={nodes}", {**quadrature, "nodes": nodes}, nodes) for nodes in NODES]
    found += [(f"K={k}, {m} masks", {**quadrature, "nodes": k, "masks": m}, k * m) for k, m in MASKED]
    return found


def measure(explainers: dict[str, Explainer], game: Game, images: torch.Tensor, how: str) -> dict[str, Any]:
    """Errors and gaps of every way against one game's values."""
    generator = torch.Generator().manual_seed(SEED)
    oracle = game.exact() if how == "exact" else game.permutations(ORDERS, generator=generator)
    found: dict[str, Any] = {"noise": (oracle.standard_errors.norm(dim=1) / oracle.values.norm(dim=1)).tolist()}
    for way, explainer in explainers.items():
        agreement = oracle.agreement(explainer(images, game.targets))
        found[way] = {
            "error": agreement.relative_error.tolist(),
            "pearson": agreement.pearson.tolist(),
            "gap": (agreement.efficiency_gap / (oracle.full - oracle.empty)).abs().tolist(),
        }
    return found


def heads() -> list[dict[str, Any]]:
    rows = []
    for network, layer, behind in HEADS:
        model = build(network)
        torch.manual_seed(SEED)
        images = torch.randn(IMAGES, 3, 224, 224)
        for baseline in ("zero", "mean"):
            started = time.perf_counter()
            explainers = {name: Explainer(model, layer, baseline=baseline, **given) for name, given, _ in ways()}
            targets = explainers["first order"](images).targets
            game = Game(explainers["first order"], images, targets, cells=CELLS, baseline=baseline)
            row = {"network": network, "layer": layer, "behind": behind, "baseline": baseline, "players": "9 cells"}
            rows.append({**row, **measure(explainers, game, images, "exact")})
            print(network, layer, baseline, f"{time.perf_counter() - started:.0f} s", flush=True)
    return rows


def large() -> list[dict[str, Any]]:
    """Single positions as players, by random orders with standard errors."""
    model = build("tv:resnet18")
    torch.manual_seed(SEED)
    images, rows = torch.randn(IMAGES, 3, 224, 224), []
    explainers = {name: Explainer(model, "layer4", **given) for name, given, _ in ways()}
    game = Game(explainers["first order"], images, explainers["first order"](images).targets)
    row = {"network": "tv:resnet18", "layer": "layer4", "baseline": "zero", "players": f"{game.count} positions"}
    rows.append({**row, **measure(explainers, game, images, "orders")})
    return rows


def elements() -> list[dict[str, Any]]:
    """Single elements as players, exactly, behind heads of every kind of curvature."""
    rows = []
    for name, (_, head) in small_heads(channels=3).items():
        torch.manual_seed(SEED)
        pick = nn.Conv2d(3, 3, 1)
        if name in ("attention", "flatten-mlp"):
            continue  # their heads are made for other positions than 2 x 2
        model = Split(pick, head).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.7)
        images = torch.randn(IMAGES, 3, 2, 2, dtype=torch.float64)
        explainers = {way: Explainer(model, "target", layout="NCHW", **given) for way, given, _ in ways()}
        targets = explainers["first order"](images).targets
        game = Game(explainers["first order"], images, targets, players="elements")
        row = {"network": name, "layer": "target", "baseline": "zero", "players": f"{game.count} elements"}
        rows.append({**row, **measure(explainers, game, images, "exact")})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    names = [name for name, _, _ in ways()]
    lines = [
        f"| head | baseline | players | {' | '.join(names)} | oracle's noise |",
        f"| {'--- | ' * (len(names) + 4)}".rstrip(),
    ]
    for row in rows:
        cells = [f"{statistics.median(row[name]['error']):.3f}" for name in names]
        noise = statistics.median(row["noise"])
        layer = "" if row["layer"] == "target" else f" `{row['layer']}`"
        head = f"{row['network'].partition(':')[2] or row['network']}{layer}"
        cells.append("exact" if noise == 0 else f"{noise:.3f}")
        lines.append(f"| {head} | {row['baseline']} | {row['players']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["heads"]
    places = list(dict.fromkeys((row["network"], row["layer"]) for row in rows))
    columns = 4
    figure, axes = pyplot.subplots(
        -(-len(places) // columns), columns, figsize=(3.4 * columns, 6.4), layout="constrained", sharey=True, squeeze=False
    )
    colours = {"zero": "#1b6ca8", "mean": "#d95f02"}
    for axis, place in zip(axes.flat, places, strict=False):
        for row in rows:
            if (row["network"], row["layer"]) != place:
                continue
            colour, middle = colours[row["baseline"]], lambda way, row=row: max(statistics.median(row[way]["error"]), 1e-4)
            axis.plot(
                NODES, [middle(f"K={k}") for k in NODES], "o-", color=colour, ms=4, label=f"nodes, baseline {row['baseline']}"
            )
            masked = [(k * m, middle(f"K={k}, {m} masks")) for k, m in MASKED]
            axis.plot(
                *zip(*masked, strict=True), "s--", color=colour, ms=4, alpha=0.6, label=f"4 nodes and masks, {row['baseline']}"
            )
            axis.plot(
                [1, 2],
                [middle("first order"), middle("second order")],
                "x",
                color=colour,
                ms=7,
                label=f"first, second order, {row['baseline']}",
            )
        axis.set(xscale="log", yscale="log", ylim=(8e-5, 5))
        axis.set_title(f"{place[0].partition(':')[2]}\n{place[1]}", fontsize=9)
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(places) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error")
    for axis in axes[-1]:
        axis.set_xlabel("head passes")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle("Relative error to the exact Shapley values of nine cells, against the cost in head passes", fontsize=11)
    figure.savefig(PICTURE, dpi=110)
    pyplot.close(figure)


TEXT = """\
# Which recipe for which head?

Relative error to the exact Shapley values of nine cells, medians of {images} images of noise on networks with random weights,
ReST, predicted classes. Every node and mask is a pass of the head; `baseline` as in `shapleycam.Explainer`.

![Relative error against cost](pictures/agreement-cost.png)

{heads}

Single positions by {orders} random orders, each with its reverse, and single elements behind the small heads of the tests,
exactly:

{large}

{elements}

torch {torch}, torchvision {torchvision}, timm {timm}, commit {commit}, seed {seed}. Made by `python -m bench.agreement_heads`.
"""


def page(result: dict[str, Any]) -> str:
    tables = {part: table(result[part]) for part in ("heads", "large", "elements")}
    return TEXT.format(**result["conditions"], **tables)


def main() -> None:
    if "--page" in sys.argv[1:]:
        PAGE.write_text(page(json.loads(RESULT.read_text())))
        return
    warnings.simplefilter("ignore")
    run = lambda *command: subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    result = {
        "conditions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "commit": run("git", "rev-parse", "--short", "HEAD"),
            "seed": SEED,
            "images": IMAGES,
            "orders": ORDERS,
        },
        "heads": heads(),
        "large": large(),
        "elements": elements(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(result))
    plot(result)
    for part in ("heads", "large", "elements"):
        print(table(result[part]))


if __name__ == "__main__":
    main()
