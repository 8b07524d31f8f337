"""Our maps against pytorch-grad-cam's, torch-cam's and the formulas: 12 networks, 11 methods, 4 utilities.

    python -m bench.parity          # or: make parity

The networks and layers are those of the paper's evaluation, with seeded random weights whose maps are alive. Every cell is
compared three ways:

- with the formulas of ``bench/formulas.py`` in float64 on the network's own activations, with the head as a function of its
  own and the Hessian by forward over reverse: nothing of the package is used;
- with pytorch-grad-cam's display maps, where it has the method;
- with torch-cam's signed maps, in units of the map's maximum (it resizes and rescales in other ways), where it has the method.

Where a peer differs by more than the tolerance, the cell says which change of the formula gives the peer's map, and how
closely.

Writes ``bench/results/parity.json`` and ``docs/parity.md``. ``--networks resnet18,vgg16`` runs some only and keeps the
figures of the others.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tests.helpers import wake
from torch import Tensor, nn

from shapleycam import Explainer

from .formulas import Formulas, display, relative
from .parity_page import GRAD_CAM, METHOD_ROWS, TOLERANCE, TORCH_CAM, UTILITIES, page

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "parity.json"
TABLE = ROOT / "docs" / "parity.md"


@dataclass(frozen=True, slots=True)
class Network:
    """One of the paper's networks: its library, target layer, head as a function of the target layer's output, and size."""

    library: str
    layer: str
    head: Callable[[Any, Tensor], Tensor]
    size: int = 128
    images: int = 2
    dtype: torch.dtype = torch.float64
    nhwc: bool = False


def _resnet(model: Any, a: Tensor) -> Tensor:
    return model.fc(a.mean((2, 3)))


def _classifier(model: Any, a: Tensor) -> Tensor:
    return model.classifier(a.mean((2, 3)))


def _vgg(model: Any, a: Tensor) -> Tensor:
    # The adaptive pooling to 7 by 7 of a 4 by 4 map: each output averages the inputs its window overlaps.
    side = a.shape[-1]
    rows = torch.zeros(7, side, dtype=a.dtype)
    for i in range(7):
        low, high = i * side // 7, -(-(i + 1) * side // 7)
        rows[i, low:high] = 1 / (high - low)
    return model.classifier(torch.einsum("ih,jw,nchw->ncij", rows, rows, a).flatten(1))


def _swin(model: Any, a: Tensor) -> Tensor:
    return model.head.fc(a.mean((1, 2)))


_LARGE = {"size": 224, "images": 1, "dtype": torch.float32, "nhwc": True}
NETWORKS: dict[str, Network] = {
    "resnet18": Network("torchvision", "layer4.1", _resnet),
    "resnet50": Network("torchvision", "layer4.2", _resnet, images=1),
    "resnet101": Network("torchvision", "layer4.2", _resnet, images=1),
    "resnet152": Network("torchvision", "layer4.2", _resnet, images=1),
    "resnext50_32x4d": Network("torchvision", "layer4.2", _resnet, images=1),
    "vgg16": Network("torchvision", "features.30", _vgg, images=1),
    "efficientnet_b0": Network("torchvision", "features.8", _classifier),
    "mobilenet_v2": Network("torchvision", "features.18", _classifier),
    "swin_tiny_patch4_window7_224": Network("timm", "norm", _swin, 224, 1, nhwc=True),
    "swin_small_patch4_window7_224": Network("timm", "norm", _swin, **_LARGE),
    "swin_base_patch4_window7_224": Network("timm", "norm", _swin, **_LARGE),
    "swin_large_patch4_window7_224": Network("timm", "norm", _swin, **_LARGE),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network with seeded weights, and images of low frequencies, whose maps vary from place to place."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    if network.library == "timm":
        import timm

        model = timm.create_model(name, pretrained=False)
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None)
    model = wake(model, network.size, images=2 if network.size < 224 else 1).to(network.dtype)
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(network.images, 3, 6, 6, generator=generator) * 2
    images = F.interpolate(coarse, (network.size, network.size), mode="bicubic").to(network.dtype)
    # The peers differentiate as far back as parameters ask them to; what is before the target layer does not matter to a map.
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.startswith((network.layer, "fc", "classifier", "head")))
    if name == "vgg16":  # whose target layer has no parameters, and whose classifier has very many
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in ("features.28.weight", "classifier.6.weight"))
    return model, images


class Target:
    """A utility as a target of the peers: the output of one image to a scalar."""

    def __init__(self, utility: str, category: int) -> None:
        self.utility, self.category = utility, category

    def __call__(self, output: Tensor) -> Tensor:
        z = output.reshape(1, -1)
        log_p = z.log_softmax(1)[0, self.category]
        z_c = z[0, self.category]
        return {"logit": z_c, "probability": log_p.exp(), "log_probability": log_p, "rest": z_c + log_p}[self.utility]


def activations_of(model: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """(the layer's output, the logits)."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    with torch.no_grad():
        logits = model(images)
    handle.remove()
    return kept[0], logits


def liveliest(network: Network, model: nn.Module, activations: Tensor) -> dict[str, Tensor]:
    """Classes [N] whose GradCAM and ShapleyCAM vary most, per utility: where a map is almost constant, the min-max magnifies
    everybody's rounding and a comparison says nothing about the method.

    The class is the best one for all utilities, but for those under which its maps are dead.
    """
    categories = torch.arange(0, 1000, 83 if network.head is _vgg else 25)
    spreads = torch.zeros(len(UTILITIES), len(categories), len(activations), dtype=torch.float64)
    for u, utility in enumerate(UTILITIES):
        for k, category in enumerate(categories):
            targets = category.expand(len(activations))
            formulas = Formulas(partial(network.head, model), network.nhwc, activations, utility, targets)
            both = [display(formulas(method), 14).flatten(1).std(1) for method in ("gradcam", "shapleycam")]
            spreads[u, k] = torch.minimum(*both)
    common = spreads.amin(0).argmax(0)
    chosen = {}
    for u, utility in enumerate(UTILITIES):
        alive = spreads[u].gather(0, common[None])[0] > 0.05
        chosen[utility] = categories[torch.where(alive, common, spreads[u].argmax(0))]
    return chosen


def rows_of(
    name: str, methods: tuple[str, ...] = METHOD_ROWS, utilities: tuple[str, ...] = UTILITIES
) -> Iterator[dict[str, Any]]:
    """The cells of one network."""
    network = NETWORKS[name]
    model, images = build(name)
    a, logits = activations_of(model, network.layer, images)
    wide = model.double() if network.dtype == torch.float32 else model
    with torch.no_grad():
        expected = network.head(wide, a.double())
    assert torch.allclose(expected, logits.double(), atol=1e-3), "the head written here is not the network's"
    targets = liveliest(network, wide, a)
    formulas = {
        utility: Formulas(partial(network.head, wide), network.nhwc, a, utility, targets[utility]) for utility in utilities
    }
    model = model.to(network.dtype)
    for utility in utilities:
        explanations = Explainer(model, network.layer, utility=utility).compare(images, targets[utility], methods)
        for method, explanation in explanations.items():
            row: dict[str, Any] = {
                "network": name,
                "method": method,
                "utility": utility,
                "dtype": str(network.dtype)[6:],
                "engine": explanation.diagnostics.engine,
                "deviation": float(explanation.heatmaps().std()),
            }
            if method == "randomcam":
                row["grad_cam"] = _random_difference(network, model, images)
                yield row
                continue
            formula, ours, raw = formulas[utility](method), explanation.heatmaps(), explanation.raw.flatten(1)
            row["formula"] = float((ours.double() - display(formula, network.size)).abs().max())
            row["formula_raw"] = relative(raw, formula)
            for peer, found in (("grad_cam", _grad_cam), ("torch_cam", _torch_cam)):
                theirs = found(network, model, images, targets[utility].tolist(), method, utility)
                if theirs is not None:
                    row[peer] = _compare(peer, theirs, ours, raw, formulas[utility], method, network)
            yield row


def _compare(
    peer: str, theirs: Tensor, ours: Tensor, raw: Tensor, formulas: Formulas, method: str, network: Network
) -> dict[str, Any]:
    """Differences of a peer's maps; display maps of pytorch-grad-cam, signed maps of torch-cam."""

    def distance(formula: Tensor) -> float:
        if peer == "torch_cam":
            return relative(theirs, formula)
        return float((theirs.double() - display(formula, network.size)).abs().max())

    difference = relative(theirs, raw) if peer == "torch_cam" else float((theirs - ours).abs().max())
    cell: dict[str, Any] = {"ours": difference, "formula": distance(formulas(method))}
    if not difference <= TOLERANCE[str(network.dtype)[6:]]:
        tried = [(distance(variant), words) for words, variant in formulas.variants(peer, method)]
        if tried:
            cell["variant_difference"], cell["variant"] = min(tried)
    return cell


def _reshape(network: Network) -> Callable[[Tensor], Tensor] | None:
    return (lambda t: t.movedim(-1, 1)) if network.nhwc else None


class _First(nn.Module):
    """Its input with the channels first: a target layer that needs no reshape transform."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1) * 1.0


class _Through(nn.Module):
    """A module that returns the channels last, by way of :class:`_First`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.first = module, _First()

    def forward(self, x: Tensor) -> Tensor:
        # The products with 1 are copies: the peer detaches outputs and gradients in place, which views do not allow.
        return (self.first(self.module(x)) * 1.0).movedim(1, -1)


def _grad_cam(
    network: Network, model: nn.Module, images: Tensor, classes: list[int], method: str, utility: str
) -> Tensor | None:
    import pytorch_grad_cam

    if method not in GRAD_CAM:
        return None
    kind, module = getattr(pytorch_grad_cam, GRAD_CAM[method]), model.get_submodule(network.layer)
    targets = [Target(utility, category) for category in classes]
    if network.nhwc and method == "shapleycam":
        # It fails with every reshape transform (:data:`.parity_page.FAILS`), so it gets a layer that needs none.
        through = _Through(module)
        model.set_submodule(network.layer, through)
        try:
            with kind(model, [through.first]) as cam:
                return torch.from_numpy(cam(images, targets))
        finally:
            model.set_submodule(network.layer, module)
    with kind(model, [module], _reshape(network)) as cam:
        return torch.from_numpy(cam(images, targets))


def _torch_cam(
    network: Network, model: nn.Module, images: Tensor, classes: list[int], method: str, utility: str
) -> Tensor | None:
    from torchcam import methods

    if method not in TORCH_CAM:
        return None
    kind = getattr(methods, TORCH_CAM[method])
    with kind(model, model.get_submodule(network.layer), reshape_transform=_reshape(network)) as extractor:
        scores = model(images)
        wanted: list[Callable[[Any], Tensor]] = [Target(utility, category) for category in classes]
        return extractor(scores=scores, targets=wanted, normalized=False)[0].flatten(1)


def _random_difference(network: Network, model: nn.Module, images: Tensor) -> dict[str, Any]:
    """RandomCAM has no other truth than its generator: the drop-in class, which draws as the peer does, from one seed."""
    import pytorch_grad_cam

    from shapleycam import compat

    maps = []
    for library in (pytorch_grad_cam, compat):
        np.random.seed(0)  # noqa: NPY002
        with library.RandomCAM(model, [model.get_submodule(network.layer)], _reshape(network)) as cam:
            maps.append(cam(images, None))
    return {"ours": float(np.abs(maps[0] - maps[1]).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="names, separated by commas")
    parser.add_argument("--page", action="store_true", help="only write docs/parity.md again, from the JSON")
    arguments = parser.parse_args()
    known = json.loads(RESULT.read_text())["cells"] if RESULT.exists() else []
    warnings.simplefilter("ignore")  # that logit makes ShapleyCAM equal GradCAM is part of what is shown
    for name in [] if arguments.page else arguments.networks.split(","):
        started = time.perf_counter()
        cells = list(rows_of(name))
        known = [cell for cell in known if cell["network"] != name] + cells
        known.sort(key=lambda cell: list(NETWORKS).index(cell["network"]))
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({"conditions": conditions(), "tolerance": TOLERANCE, "cells": known}, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    text = page(json.loads(RESULT.read_text()))
    TABLE.write_text(text, encoding="utf-8")
    print(f"{text}\nwritten: {RESULT.relative_to(ROOT)}, {TABLE.relative_to(ROOT)}")


def conditions() -> dict[str, Any]:
    """What the figures were made with."""
    packages = {"torchvision": "torchvision", "timm": "timm", "grad_cam": "grad-cam", "torch_cam": "torchcam"}
    return {"torch": torch.__version__} | {key: metadata.version(package) for key, package in packages.items()}


if __name__ == "__main__":
    main()
