"""How close attribution maps come to the Shapley values. Usage: python -m bench.agreement [--page]

Writes bench/results/agreement.json, docs/agreement.md (from the JSON) and docs/pictures/agreement.png; with --page the page
and the picture only, from the committed result.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from tests.helpers import wake
from torch import Tensor, nn

from shapleycam import UTILITIES, Explainer
from shapleycam.cli.demo import photographs
from shapleycam.data.images import read_image
from shapleycam.model.zoo import load_classifier
from shapleycam.shapley import Game

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "bench" / "results" / "agreement.json", ROOT / "docs" / "agreement.md"
PICTURE = ROOT / "docs" / "pictures" / "agreement.png"
SEED = 0
#: numbers of Gauss-Legendre nodes on the path from zero; one node is the midpoint
NODES = {"midpoint": 1, "2 nodes": 2, "3 nodes": 3, "4 nodes": 4, "8 nodes": 8, "16 nodes": 16}
#: what is compared: label -> the explainer's arguments
WAYS: dict[str, dict[str, Any]] = {
    "first order": {"method": "hirescam"},
    "second order": {"method": "shapleycam-h"},
    **{way: {"method": "shapleycam-h", "engine": "quadrature", "nodes": nodes} for way, nodes in NODES.items()},
}
#: what the sentences and the plot show of them
SHOWN = ("first order", "second order", "midpoint", "2 nodes", "4 nodes", "8 nodes")
#: The game's players, and how its values are had: cells pooled on the map and groups of neighbouring channels exactly,
#: single positions by random orders, each with its reverse.
CELLS, GROUPS, ORDERS = (3, 3), 9, 24


@dataclass(frozen=True)
class Case:
    """One network and one of its layers, with the part behind the layer for an attribution written out by hand."""

    network: str
    layer: str
    model: nn.Module
    tail: nn.Module
    images: Tensor
    targets: Tensor
    players: tuple[str, ...] = ("cells",)


def cases() -> list[Case]:
    """In float64: next to the kinks of ReLU6, float32 decides on another slope now and then."""
    classifier = load_classifier()
    model, files = classifier.model.double(), photographs()
    views = torch.stack([classifier.preprocess.view(read_image(file)) for file in files])
    images = classifier.preprocess.normalise(views).double()
    with torch.no_grad():
        targets = model(images).argmax(1)
    parts = list(model.children())
    found = []
    for depth, players in ((18, ("cells", "positions", "channels")), (17, ("cells", "channels")), (14, ("cells",))):
        tail = nn.Sequential(*list(parts[0])[depth:], *parts[1:])
        layer = "features" if depth == len(parts[0]) else f"features.{depth - 1}"
        found.append(Case(classifier.name, layer, model, tail, images, targets, players))
    torch.manual_seed(SEED)
    curved = wake(timm.create_model("efficientnet_b0"), 224).double()  # SiLU and squeeze-and-excitation behind the layer
    tail = nn.Sequential(curved.blocks[6], curved.conv_head, curved.bn2, curved.global_pool, curved.classifier)
    with torch.no_grad():
        targets = curved(images).argmax(1)
    found.append(Case("EfficientNet-B0, random weights", "blocks.5", curved, tail, images, targets, ("cells", "channels")))
    return found


def behind_a_layer_norm(images: Tensor) -> dict[str, Any]:
    """What is left of A·w, summed over the channels, where a LayerNorm over the channels follows the target layer.

    float64, so that what is left is not rounding.
    """
    torch.manual_seed(SEED)
    model = wake(timm.create_model("convnext_atto"), 224).double()
    tail, images = nn.Sequential(model.stages[3], model.norm_pre, model.head), images.double()
    with torch.no_grad():
        targets = model(images).argmax(1)
    case = Case("ConvNeXt-Atto, random weights", "stages.2", model, tail, images, targets)
    left = {}
    for way, paid in by_hand(case, "rest").items():
        left[way] = float(paid.sum(1).norm() / paid.abs().sum(1).norm())
    oracle = Game(Explainer(model, case.layer, utility="rest"), images, targets, cells=CELLS).exact()
    spread = (oracle.values.norm(dim=1) / (oracle.full - oracle.empty).abs()).tolist()
    return {"network": case.network, "layer": case.layer, "left": left, "values_over_total": spread}


def by_hand(case: Case, utility: str) -> dict[str, Tensor]:
    """A·w [N, C, h, w] of every way by plain autograd and numpy's nodes, without the package's engines."""
    kept: list[Tensor] = []
    handle = dict(case.model.named_modules())[case.layer].register_forward_hook(lambda m, i, out: kept.append(out.detach()))
    with torch.no_grad():
        case.model(case.images)
    handle.remove()
    a = kept[0]

    def gradient(at: Tensor, second: bool) -> tuple[Tensor, Tensor]:
        at = at.clone().requires_grad_(True)
        value = UTILITIES[utility].value(case.tail(at * 1), case.targets).sum()
        (g,) = torch.autograd.grad(value, at, create_graph=second)
        if not second or not g.requires_grad:
            return g.detach(), torch.zeros_like(a)
        (h,) = torch.autograd.grad((g * a).sum(), at, allow_unused=True)
        return g.detach(), torch.zeros_like(a) if h is None else h

    g, h = gradient(a, True)
    ways = {"first order": g, "second order": g - h / 2}
    for way, nodes in NODES.items():
        places, shares = np.polynomial.legendre.leggauss(nodes)
        parts = [float(w) / 2 * gradient(a * ((float(x) + 1) / 2), False)[0] for x, w in zip(places, shares, strict=True)]
        ways[way] = torch.stack(parts).sum(0)
    return {way: a * w for way, w in ways.items()}


def pearson(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))


def spearman(x: Tensor, y: Tensor) -> Tensor:
    return pearson(x.argsort(1).argsort(1).double(), y.argsort(1).argsort(1).double())


def study(found: list[Case]) -> dict[str, Any]:
    rows = []
    for case in found:
        for utility in UTILITIES:
            hand = by_hand(case, utility)
            explainer = Explainer(case.model, case.layer, "shapleycam-h", utility)
            for players in case.players:
                started = time.perf_counter()
                kind = "channels" if players == "channels" else "positions"
                cells = {"cells": CELLS, "channels": GROUPS}.get(players)
                game = Game(explainer, case.images, case.targets, players=kind, cells=cells)
                generator = torch.Generator().manual_seed(SEED)
                oracle = game.permutations(ORDERS, generator=generator) if players == "positions" else game.exact()
                total = oracle.full - oracle.empty
                for way, settings in WAYS.items():
                    if kind == "channels":
                        paid = hand[way].flatten(2).sum(2).double()
                        x = torch.zeros_like(oracle.values).index_add_(1, oracle.groups, paid)
                        r, rank = pearson(x, oracle.values), spearman(x, oracle.values)
                        error = (x - oracle.values).norm(dim=1) / oracle.values.norm(dim=1)
                        gap = x.sum(1) - total
                    else:
                        explanation = Explainer(case.model, case.layer, utility=utility, **settings)(case.images, case.targets)
                        # The package's map is the attribution written out by hand, or nothing below means anything.
                        expected = hand[way].sum(1)
                        off = (explanation.raw - expected).norm() / expected.norm()
                        assert off < 1e-6, (case.layer, utility, way, float(off))
                        agreement = explanation.agreement(oracle)
                        r, rank, error = agreement.pearson, agreement.spearman, agreement.relative_error
                        gap = agreement.efficiency_gap
                    rows.append(
                        {
                            "network": case.network,
                            "layer": case.layer,
                            "players": players,
                            "count": game.count,
                            "utility": utility,
                            "way": way,
                            "pearson": r.tolist(),
                            "spearman": rank.tolist(),
                            "error": error.tolist(),
                            "relative_gap": (gap / total).abs().tolist(),
                            "noise": (oracle.standard_errors.norm(dim=1) / oracle.values.norm(dim=1)).tolist(),
                        }
                    )
                print(case.layer, players, utility, f"{time.perf_counter() - started:.1f} s", flush=True)
    run = lambda *command: subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    return {
        "conditions": {
            "networks": {case.network: case.targets.tolist() for case in found},
            "photographs": [file.name for file in photographs()],
            "torch": torch.__version__,
            "timm": timm.__version__,
            "commit": run("git", "rev-parse", "--short", "HEAD"),
            "seed": SEED,
            "orders": ORDERS,
        },
        "layer_norm": behind_a_layer_norm(found[0].images),
        "results": rows,
    }


def median(values: list[float]) -> float:
    """The middle value; of an even number, the lower of the two in the middle."""
    return sorted(values)[(len(values) - 1) // 2]


def figure(value: float) -> str:
    """Three decimals; what float32 cannot tell from zero is written as such."""
    return "< 0.0005" if value < 5e-4 else f"{value:.3f}"


def table(result: dict[str, Any], network: str) -> str:
    lines = [
        "| layer | players | utility | way | Pearson | Spearman | relative error | relative gap | oracle's noise |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["results"]:
        if row["network"] == network:
            noise = median(row["noise"])
            lines.append(
                f"| `{row['layer']}` | {row['count']} {row['players']} | `{row['utility']}` | {row['way']} | "
                f"{median(row['pearson']):.3f} | {median(row['spearman']):.3f} | {figure(median(row['error']))} | "
                f"{figure(median(row['relative_gap']))} | {'exact' if noise == 0 else figure(noise)} |"
            )
    return "\n".join(lines)


#: (way, other)
DUELS = (
    ("second order", "first order"),
    ("midpoint", "first order"),
    ("midpoint", "second order"),
    ("4 nodes", "second order"),
    ("4 nodes", "midpoint"),
)


def wins(result: dict[str, Any], key: str = "error") -> dict[tuple[str, str, str], tuple[int, int]]:
    """(utility, way, other) -> in how many of how many (photograph, layer, players) the way is closer than the other."""
    # The trained network only: to the one with random weights all photographs are nearly the same.
    trained = next(iter(result["conditions"]["networks"]))
    rows = [row for row in result["results"] if row["network"] == trained]
    found = {(row["layer"], row["players"], row["utility"], row["way"]): row[key] for row in rows}
    out = {}
    for utility in UTILITIES:
        for way, other in DUELS:
            pairs = [
                pair
                for (*place, name, its), values in found.items()
                if name == utility and its == way
                for pair in zip(values, found[(*place, name, other)], strict=True)  # type: ignore[index]
            ]
            # Closer by more than one percent, and not where both are next to nothing.
            out[utility, way, other] = (sum(a < 0.99 * b and b - a > 5e-4 for a, b in pairs), len(pairs))
    return out


def duel(result: dict[str, Any]) -> str:
    lines = [
        "| utility | " + " | ".join(f"{way} beats {other}" for way, other in DUELS) + " |",
        "| --- " * (len(DUELS) + 1) + "|",
    ]
    found = wins(result)
    for utility in UTILITIES:
        row = [f"{won} of {of}" for (name, _, _), (won, of) in found.items() if name == utility]
        lines.append(f"| `{utility}` | {' | '.join(row)} |")
    return "\n".join(lines)


def page(result: dict[str, Any]) -> str:
    known = result["conditions"]
    tables = "\n\n".join(f"### {network}\n\n{table(result, network)}" for network in known["networks"])
    versions = f"torch {known['torch']}, timm {known['timm']}, commit {known['commit']}, seed {known['seed']}"
    return TEXT.format(
        reading=reading(result),
        photographs=", ".join(known["photographs"]),
        versions=versions,
        orders=known["orders"],
        tables=tables,
        duel=duel(result),
    )


def reading(result: dict[str, Any]) -> str:
    """What the figures say, with the figures; the test of this page holds the sentences to them."""

    def middle(layer: str, utility: str, way: str, key: str = "error", players: str = "cells") -> str:
        wanted = {"layer": layer, "utility": utility, "way": way, "players": players}
        [row] = [row for row in result["results"] if all(row[k] == v for k, v in wanted.items())]
        return figure(median(row[key])) if key == "error" else f"{median(row[key]):.2f}"

    def three(layer: str, utility: str, key: str = "error") -> str:
        return ", ".join(f"{way} {middle(layer, utility, way, key)}" for way in SHOWN)

    norm = result["layer_norm"]
    left = max(norm["left"][way] for way in ("first order", "second order", "midpoint", "2 nodes", "4 nodes"))
    return f"""\
- **At the layer of `layer="auto"`** (`features`: mean over the positions and a linear layer) and with the default utility
  the second order is closer than the first, the midpoint closer than both, and every node more closer still, until what is
  left is the difference between nine coarse players and many small ones: {three("features", "rest")}.
  What improves is the size; the order of the cells is already right: Pearson {three("features", "rest", "pearson")}.
  With `logit` all are exact.
- **With `probability` the second order is worse than the first there** ({three("features", "probability")}): where the softmax
  saturates, the expansion around A says nothing of U(0). The path sees it, and needs a few nodes for the step it goes over.
- **One block earlier, with `rest`, the second order is worse than the first** ({three("features.16", "rest")}), and with
  `probability` far worse ({three("features.16", "probability")}). With `logit` both are the same, because ReLU6 has no
  curvature: {three("features.16", "logit")}.
- **Deep inside the network no expansion is right in size** (`features.13`, `rest`: {three("features.13", "rest")}), but the
  path keeps the order of the cells, which the expansions around A lose: Pearson {three("features.13", "rest", "pearson")}.
  ReLU6 puts kinks on the path: the error falls slowly there, not geometrically.
- **Behind a smooth head** (SiLU, `blocks.5`) the second order is closer than the first with every utility, and the path is
  closer still (`rest`: {three("blocks.5", "rest")}). Its weights are
  random: the curvature is not that of a trained network, and the five photographs say nearly the same.
- **Why one node is good already:** the error of its sum is of third order as well, but with 1/24 where the second-order
  expansion has 1/6; with K nodes it is of order 2K + 1. A node costs a pass of the head, behind a pool-and-linear head a
  softmax, and no second derivative. One node is not always closer than none: not with `probability` at `features.13`
  ({three("features.13", "probability")}). What more nodes leave is the distance of the diagonal from nine coarse players:
  with `probability` at `features` nothing is gained beyond four.
- **Where a LayerNorm over the channels follows the target layer, no such attribution exists.** U does not change when a
  position is scaled, so by Euler's theorem Σ over the channels of A·w is zero, in the first and in the second order and at
  every node. Measured on {norm["network"]} at `{norm["layer"]}`, in float64: up to four nodes at most {left:.1e} of
  Σ |A·w| is left. What is comes from the norm's epsilon, which the nodes nearest to zero get close to (with sixteen
  {norm["left"]["16 nodes"]:.1e}); while the Shapley values of the cells are {min(norm["values_over_total"]):.2f} to
  {max(norm["values_over_total"]):.2f} of U(A) − U(0) in length. HiResCAM and ShapleyCAM-H draw rounding there; the norm's
  own output has no such invariance, and another baseline than zero mends it:
  [agreement-heads.md](agreement-heads.md) says which for which head."""


TEXT = """\
# How close are the maps to the Shapley values?

The weight `w = g - HA/2` gives exact Shapley values where the utility is quadratic in the activations. Real heads are not.
Here the values themselves are computed, and three kinds of attribution are measured against them:

- first order, `A·g` (HiResCAM; where the weight is constant over the positions, GradCAM);
- second order, `A·(g - HA/2)` (ShapleyCAM-H; likewise ShapleyCAM);
- the mean gradient along the path from zero, `A·Σ ω_k g(t_k A)` with K Gauss-Legendre nodes (`engine="quadrature"`,
  `nodes=K`); with one node that is the gradient at the midpoint (`engine="midpoint"`).

Players are cells of a 3×3 grid over the target layer's map (all channels together), its single positions, or nine groups of
neighbouring channels; who is absent is zero. Cells and groups are exact, by all coalitions; single positions are estimated
from {orders} random orders, each with its reverse. The column "oracle's noise" is the length of the standard errors over
that of the values: no way can be seen to be closer than that.

Photographs: {photographs}; classes: the predicted ones; {versions}. Figures are medians over the photographs. The error is
‖attribution − value‖ / ‖value‖, the gap |Σ attribution − U(A) + U(0)| / |U(A) − U(0)|.

Made by `python -m bench.agreement` from a checkout, which writes `bench/results/agreement.json`, and this page and the plot
from it. Before it compares a map it checks it against plain autograd, to a millionth. Everything is in float64.

![Relative error per layer and utility](pictures/agreement.png)

## Who is closer

Counted over photographs, layers and kinds of players of the trained network, by relative error; a lead of one percent
or less, or of less than 0.0005, is no win. Photographs and layers are few and not independent: these are counts, not a test.

{duel}

{reading}

## All figures

{tables}
"""


def plot(result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["results"] if row["players"] == "cells"]
    places = list(dict.fromkeys((row["network"], row["layer"]) for row in rows))
    figure_, axes = pyplot.subplots(
        1, len(places), figsize=(4.2 * len(places), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    colours, floor = ("#d95f02", "#1b6ca8", "#c9e3c2", "#8cc980", "#4a9c3b", "#1d5c14"), 1e-4
    top = max(max(row["error"]) for row in rows)
    for axis, place in zip(axes[0], places, strict=True):
        for k, way in enumerate(SHOWN):
            for i, name in enumerate(UTILITIES):
                [row] = [r for r in rows if ((r["network"], r["layer"]), r["utility"], r["way"]) == (place, name, way)]
                x, error = i + (k - 2.5) * 0.14, [max(e, floor) for e in row["error"]]
                axis.scatter([x] * len(error), error, s=20, color=colours[k], alpha=0.5, linewidths=0)
                label = None if i else way
                axis.hlines(max(median(error), floor), x - 0.06, x + 0.06, color=colours[k], lw=2.5, label=label)
        axis.axhline(1, color="grey", lw=0.8, ls=":")
        axis.set(yscale="log", ylim=(floor / 1.6, 1.6 * top), xticks=range(len(UTILITIES)))
        axis.set_title(f"{place[0]}\n{place[1]}", fontsize=10)
        axis.set_xticklabels([name.replace("_", "\n") for name in UTILITIES], fontsize=8)
        axis.grid(axis="y", alpha=0.25)
    axes[0][0].set_ylabel(f"relative error (at most {floor:g} is drawn at the bottom)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure_.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    figure_.suptitle("Attribution of nine cells against their exact Shapley values: five photographs and their median")
    figure_.savefig(PICTURE, dpi=110)
    pyplot.close(figure_)


def main() -> None:
    if "--page" in sys.argv[1:]:
        result = json.loads(RESULT.read_text())
    else:
        result = study(cases())
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(page(result))
    plot(result)
    print(duel(result))


if __name__ == "__main__":
    main()
