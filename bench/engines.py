"""Is a map that is closer to the Shapley values better by the paper's own metrics? Usage:

    python -m bench.engines [--folder DIR]
    python -m bench.engines --page

Measures the embedded network's maps by every engine on the photographs of scikit-image (those of the demo) and scikit-learn,
which are free to use, and on those in DIR (a part of ImageNet, say), and writes bench/results/engines-adcc.json and
docs/engines.md; with --page the page only, from the committed result. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shapleycam import Explainer
from shapleycam.cli.demo import photographs
from shapleycam.data.images import read_image
from shapleycam.metrics.functional import adcc, coherency, complexity, drop, increase, measure
from shapleycam.model.zoo import Classifier, load_classifier

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "bench" / "results" / "engines-adcc.json", ROOT / "docs" / "engines.md"
SEED, RESAMPLES, BATCH = 0, 2000, 8
UTILITIES, LAYERS = ("rest", "probability"), ("auto", "features.16")
NODES = (1, 2, 4, 8)
PARTS = ("AD", "Coh", "Com", "IC", "ADD")
#: what the packages say of their photographs' licences
LICENCES = {
    "scikit-image": "public domain or CC0",
    "scikit-learn": "CC BY 2.0 (danielbuechele; vultilion)",
    "folder": "not known",
}
#: the methods whose second order is an engine's weight -> their first order
FIRST = {"shapleycam": "gradcam", "shapleycam-h": "hirescam"}


def pictures(folder: Path | None, classifier: Classifier) -> tuple[Tensor, list[dict[str, str]]]:
    """The views uint8 [N, 3, H, W], and where each is from; a picture that is there twice is taken once."""
    import sklearn.datasets

    found: list[tuple[str, str, str, Any]] = [
        ("scikit-image", metadata.version("scikit-image"), file.name, file) for file in photographs()
    ]
    bundled = Path(sklearn.datasets.__file__).parent / "images"
    found += [("scikit-learn", metadata.version("scikit-learn"), file.name, file) for file in sorted(bundled.glob("*.jpg"))]
    if folder is not None:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
        found += [("folder", "", str(file.relative_to(folder)), file) for file in files]
    views, sources, seen = [], [], set()
    for package, version, name, source in found:
        view = classifier.preprocess.view(read_image(source))
        digest = hashlib.sha256(view.numpy().tobytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            views.append(view)
            sources.append({"package": package, "version": version, "name": name, "view": digest[:16]})
    return torch.stack(views), sources


def rows_of(layer: str) -> dict[str, tuple[str, ...]]:
    """The methods of every engine. Behind a pool and a linear layer the weight is constant: -H is the same map there."""
    methods = ("shapleycam",) if layer == "auto" else ("shapleycam", "shapleycam-h")
    expansion = (*(FIRST[name] for name in methods), *methods)
    return {"expansion": expansion, **{f"quadrature {nodes}": methods for nodes in NODES}}


def study(folder: Path | None) -> dict[str, Any]:
    classifier = load_classifier()
    views, sources = pictures(folder, classifier)
    images = classifier.preprocess.normalise(views)
    with torch.no_grad():
        logits = torch.cat([classifier.model(batch) for batch in images.split(BATCH)])
    targets = logits.argmax(1)
    results = []
    for layer in LAYERS:
        for utility in UTILITIES:
            measured: dict[tuple[str, str], list[list[float]]] = {}
            maps: dict[tuple[str, str], list[Tensor]] = {}
            for engine, methods in rows_of(layer).items():
                settings: dict[str, Any] = (
                    {} if engine == "expansion" else {"engine": "quadrature", "nodes": int(engine.split()[1])}
                )
                explainer = Explainer(classifier.model, layer, utility=utility, **settings)
                for batch, classes in zip(images.split(BATCH), targets.split(BATCH), strict=True):
                    with torch.no_grad():
                        found = measure(explainer, batch, classes, methods)
                    for method, m in found.items():
                        p, kept, deleted, shown, again = m.tensors
                        columns = (
                            drop(p, kept),
                            coherency(shown, again),
                            complexity(shown),
                            increase(p, kept),
                            drop(p, deleted),
                        )
                        measured.setdefault((engine, method), []).extend(torch.stack(columns, 1).tolist())
                        maps.setdefault((engine, method), []).append(shown)
            joined = {key: torch.cat(parts) for key, parts in maps.items()}
            for (engine, method), parts in measured.items():
                family = method if method in FIRST else next(name for name, first in FIRST.items() if first == method)
                moved = (joined[engine, method] - joined["expansion", family]).abs().flatten(1).mean(1)
                row: dict[str, Any] = {"layer": layer, "utility": utility, "engine": engine, "method": method, "family": family}
                results.append({**row, "parts": parts, "moved": moved.tolist()})
            print(layer, utility, flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=True)
    conditions = {
        "commit": commit.stdout.strip(),
        "network": classifier.name,
        "weights": classifier.weights,
        "versions": {name: metadata.version(name) for name in ("torch", "numpy", "pillow")},
        "seed": SEED,
        "resamples": RESAMPLES,
        "classes": [classifier.class_name(index) for index in targets.tolist()],
        "photographs": sources,
        "licences": LICENCES,
    }
    for row in results:
        row["parts"] = [[float(f"{value:.9g}") for value in image] for image in row["parts"]]
        row["moved"] = [float(f"{value:.4g}") for value in row["moved"]]
    content = {"conditions": conditions, "results": results}
    content["comparisons"] = comparisons(results)
    return content


def scores(parts: np.ndarray) -> np.ndarray:
    """ADCC of the parts [..., images, 5], averaged over the images first."""
    means = torch.from_numpy(parts.mean(-2))
    return adcc(means[..., 0], means[..., 1], means[..., 2]).numpy()


def comparisons(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ADCC of every row less that of its family's second and first order, with the paired bootstrap's 95 % interval."""
    count = len(results[0]["parts"])
    drawn = np.random.default_rng(SEED).integers(0, count, (RESAMPLES, count))  # the same for all: paired
    out = []
    for row in results:
        mine = np.array(row["parts"])
        for against in ("second order", "first order"):
            method = row["family"] if against == "second order" else FIRST[row["family"]]
            if (row["engine"], row["method"]) == ("expansion", method):
                continue
            wanted = {"layer": row["layer"], "utility": row["utility"], "engine": "expansion", "method": method}
            [other] = [r for r in results if all(r[key] == value for key, value in wanted.items())]
            theirs = np.array(other["parts"])
            low, high = np.percentile(scores(mine[drawn]) - scores(theirs[drawn]), (2.5, 97.5))
            place = {key: row[key] for key in ("layer", "utility", "engine", "method")}
            difference = float(scores(mine) - scores(theirs))
            out.append({**place, "against": against, "difference": difference, "low": float(low), "high": float(high)})
    return out


def verdict(comparison: dict[str, Any]) -> str:
    """ "higher", "lower", or "not distinguishable" where the interval holds zero."""
    if comparison["low"] > 0:
        return "higher"
    return "lower" if comparison["high"] < 0 else "not distinguishable"


def of_path(result: dict[str, Any], against: str, **where: str) -> list[dict[str, Any]]:
    """The comparisons of quadrature with ``against``."""
    return [
        c
        for c in result["comparisons"]
        if c["engine"] != "expansion" and c["against"] == against and all(c[key] == value for key, value in where.items())
    ]


def counted(found: list[dict[str, Any]]) -> str:
    said = [verdict(c) for c in found]
    return (
        f"higher in {said.count('higher')}, lower in {said.count('lower')}, not distinguishable in "
        f"{said.count('not distinguishable')} of {len(said)}"
    )


def shown(comparison: dict[str, Any]) -> str:
    return f"{100 * comparison['difference']:+.2f} [{100 * comparison['low']:+.2f}, {100 * comparison['high']:+.2f}]"


def reading(result: dict[str, Any]) -> str:
    second, first = of_path(result, "second order"), of_path(result, "first order")
    both = [{verdict(c) for c in found} for found in (second, first)]
    if all("higher" in said and "lower" not in said for said in both):
        answer = "**Yes, where it can be told.** The quadrature's ADCC against the second order"
    else:
        answer = "**There is no general yes.** The quadrature's ADCC against the second order"
    lines = [
        f"{answer}: {counted(second)} comparisons; against the first order: {counted(first)}. The intervals are not corrected "
        "for their number, and rows of one layer and utility are not independent.",
        "",
    ]
    for layer in LAYERS:
        for utility in UTILITIES:
            place = {"layer": layer, "utility": utility}
            for method in rows_of(layer)["quadrature 8"]:
                [one] = of_path(result, "second order", **place, engine="quadrature 8", method=method)
                [two] = of_path(result, "first order", **place, engine="quadrature 8", method=method)
                wanted = {**place, "engine": "quadrature 8", "method": method}
                [row] = [r for r in result["results"] if all(r[key] == value for key, value in wanted.items())]
                lines.append(
                    f"- `{layer}`, `{utility}`, `{method}`, eight nodes: {shown(one)} points against the second order "
                    f"({verdict(one)}), {shown(two)} against the first ({verdict(two)}); the map differs from the second "
                    f"order's by {np.mean(row['moved']):.4f} on average."
                )
    return "\n".join(lines)


def table(result: dict[str, Any], layer: str, utility: str) -> str:
    lines = [
        "| method | engine | AD | Coh | Com | ADCC | IC | ADD | − second order | − first order |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["results"]:
        if (row["layer"], row["utility"]) != (layer, utility):
            continue
        parts = np.array(row["parts"])
        ad, coh, com, ic, add = (f"{100 * value:.2f}" for value in parts.mean(0))
        name = f"quadrature, K = {row['engine'].split()[1]}" if row["engine"] != "expansion" else "expansion at A"
        cells = []
        for against in ("second order", "first order"):
            wanted = {**{k: row[k] for k in ("layer", "utility", "engine", "method")}, "against": against}
            hits = [c for c in result["comparisons"] if all(c[key] == value for key, value in wanted.items())]
            cells.append(shown(hits[0]) if hits else "")
        score = 100 * float(scores(parts))
        lines.append(
            f"| `{row['method']}` | {name} | {ad} | {coh} | {com} | {score:.2f} | {ic} | {add} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def page(result: dict[str, Any]) -> str:
    known = result["conditions"]
    places = [(layer, utility) for layer in LAYERS for utility in UTILITIES]
    tables = "\n\n".join(f"### `{layer}`, `{utility}`\n\n{table(result, layer, utility)}" for layer, utility in places)
    packages: dict[tuple[str, str], int] = {}
    for picture in known["photographs"]:
        key = picture["package"], picture["version"]
        packages[key] = packages.get(key, 0) + 1
    return TEXT.format(
        reading=reading(result),
        count=len(known["photographs"]),
        network=known["network"],
        packages="\n".join(f"- {name} {version}: {n} ({known['licences'][name]})" for (name, version), n in packages.items()),
        versions=", ".join(f"{name} {version}" for name, version in known["versions"].items()),
        tables=tables,
        **{key: known[key] for key in ("commit", "seed", "resamples")},
    )


TEXT = """\
# Does being closer to the Shapley values give a better map?

The quadrature comes closer to the Shapley values than the expansions do (see [agreement.md](agreement.md)). Here its maps are
measured by the paper's own metrics beside those of the first order (GradCAM, HiResCAM) and the second (ShapleyCAM,
ShapleyCAM-H), at the layer of `layer="auto"` (`features`) and one block earlier (`features.16`), from the baseline zero.

{reading}

## How it was measured

{network} with its ImageNet weights explains its predicted class on {count} photographs:

{packages}

AD, Coh, Com, IC and ADD are means over the photographs, in percent; ADCC is made of the means, as in the paper. The last two
columns are differences of ADCC in points with 95 % intervals: the same {resamples} resamples of the photographs for all rows
(seed {seed}), ADCC being made anew from the means of each. With so few photographs, which nobody drew at random, an interval
says what another choice of such photographs might change, and nothing about ImageNet as a whole. Where the second order lies
far below the first, as with `probability`, a gain over the second order alone says that the path repairs that loss, and not
that its maps are better than GradCAM's: read both columns.

{versions}, commit {commit}. Made by `python -m bench.engines` from a checkout, which writes
`bench/results/engines-adcc.json`, and this page from it.

{tables}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--folder", type=Path, metavar="DIR", help="more photographs")
    what.add_argument("--page", action="store_true", help="write the page from the committed result")
    arguments = parser.parse_args()
    if arguments.page:
        result = json.loads(RESULT.read_text())
    else:
        result = study(arguments.folder)
        RESULT.write_text(json.dumps(result, ensure_ascii=False) + "\n")
    PAGE.write_text(page(result))
    print(reading(result))


if __name__ == "__main__":
    main()
