"""The twelve networks of arXiv 2501.06261 as its evaluation uses them, and the numbers it reports.

``paper_table.csv`` holds the rows of the paper's tables on the 50,000 images of ImageNet's validation set: AD, Coh, Com,
ADCC, IC and ADD in percent, and the networks' top-1 accuracy.
"""

from __future__ import annotations

import csv
import difflib
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..data.images import Preprocess
from ..errors import InputError
from ..model.zoo import Classifier, load_classifier
from ..optional import need

COLUMNS = ("AD", "Coh", "Com", "ADCC", "IC", "ADD")

#: Resize to 256 (bilinear), centre crop 224, ImageNet mean and standard deviation: for all twelve.
PREPROCESS = Preprocess()


@dataclass(frozen=True, slots=True)
class Preset:
    """One network of the paper.

    Attributes:
        network: the name in the paper's tables.
        library, name: where the architecture comes from ("torchvision" or "timm"), and its name there.
        layer: the target layer.
        batch: pictures at a time on an accelerator with 16 GiB.
        constant: whether the weight is constant over the positions, so that GradCAM = HiResCAM = XGradCAM and
            ShapleyCAM = ShapleyCAM-H.
    """

    network: str
    library: str
    name: str
    layer: str
    batch: int
    constant: bool = True


_ROWS = (
    Preset("ResNet-18", "torchvision", "resnet18", "layer4[-1]", 128),
    Preset("ResNet-50", "torchvision", "resnet50", "layer4[-1]", 64),
    Preset("ResNet-101", "torchvision", "resnet101", "layer4[-1]", 64),
    Preset("ResNet-152", "torchvision", "resnet152", "layer4[-1]", 64),
    Preset("ResNeXt-50", "torchvision", "resnext50_32x4d", "layer4[-1]", 64),
    Preset("VGG-16", "torchvision", "vgg16", "features[-1]", 64, constant=False),
    Preset("EfficientNet-B0", "torchvision", "efficientnet_b0", "features[-1]", 64),
    Preset("MobileNet-V2", "torchvision", "mobilenet_v2", "features[-1]", 128),
    Preset("Swin-T", "timm", "swin_tiny_patch4_window7_224", "norm", 64),
    Preset("Swin-S", "timm", "swin_small_patch4_window7_224", "norm", 64),
    Preset("Swin-B", "timm", "swin_base_patch4_window7_224", "norm", 32),
    Preset("Swin-L", "timm", "swin_large_patch4_window7_224", "norm", 32),
)

#: Every network of the paper, by its name there.
PRESETS: dict[str, Preset] = {row.network: row for row in _ROWS}

# Where the weight is constant over the positions, the paper prints one row for methods with equal maps.
_SAME = {"hirescam": "gradcam", "xgradcam": "gradcam", "shapleycam-h": "shapleycam"}


def get_preset(network: str) -> Preset:
    """The preset of a network, by the paper's name or the library's (case does not matter).

    Raises:
        InputError: there is no such network; the nearest are suggested.
    """
    wanted = network.strip().lower()
    for row in _ROWS:
        if wanted in (row.network.lower(), row.name):
            return row
    near = difflib.get_close_matches(wanted, [row.network.lower() for row in _ROWS], n=2, cutoff=0.4)
    names = [row.network for row in _ROWS if row.network.lower() in near]
    hint = f"Did you mean {' or '.join(names)}? " if names else ""
    raise InputError(f"The paper has no network {network!r}. {hint}It has {', '.join(PRESETS)}.")


def paper_row(network: str, method: str) -> dict[str, float] | None:
    """The paper's {"AD", "Coh", "Com", "ADCC", "IC", "ADD"} in percent for a network and a method's name; None if it has none.

    A method that must equal another on this network (see :class:`Preset`) has that one's row.
    """
    rows = _table()
    found = rows.get((network, method))
    preset = PRESETS.get(network)
    if found is None and preset is not None and preset.constant and method in _SAME:
        found = rows.get((network, _SAME[method]))
    return None if found is None else {column: found[column] for column in COLUMNS}


def paper_accuracy(network: str) -> float:
    """Top-1 accuracy in percent that the paper states."""
    return next(row["top1"] for (name, _), row in _table().items() if name == network)


@cache
def _table() -> dict[tuple[str, str], dict[str, float]]:
    text = resources.files("shapleycam.evaluate").joinpath("paper_table.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {(row["network"], row["method"].lower()): {name: float(row[name]) for name in ("top1", *COLUMNS)} for row in rows}


def load_preset(
    preset: Preset, weights: Path | None = None, *, device: str | torch.device = "cpu", download: bool = False
) -> Classifier:
    """The network with its weights and the paper's preprocessing.

    Args:
        preset: a row of :data:`PRESETS`.
        weights: a folder with the weights, as a file under torchvision's own name ("resnet50-0676ba61.pth") or the
            network's ("resnet50.pth", .pt or .safetensors). None for the cache that torchvision downloads to.
        device: where the model goes.
        download: fetch weights that are not there (torchvision's IMAGENET1K_V1, timm's default).

    Raises:
        InputError: the weights are not there, or do not fit.
    """
    names = [f"{preset.name}{ending}" for ending in (".pth", ".pt", ".safetensors")]
    folder = weights
    if preset.library == "torchvision":
        chosen: Any = need("torchvision", "vision").models.get_model_weights(preset.name)["IMAGENET1K_V1"]
        names.insert(0, chosen.url.rsplit("/", 1)[-1])
        folder = weights or Path(torch.hub.get_dir()) / "checkpoints"
    file = None if folder is None else next((folder / name for name in names if (folder / name).is_file()), None)
    full = f"{preset.library}/{preset.name}"
    if file is not None:
        found = load_classifier(full, weights=file, device=device)
    elif download:
        found = load_classifier(full, weights="IMAGENET1K_V1" if preset.library == "torchvision" else None, device=device)
    else:
        raise InputError(
            f"{preset.network}: there is no {' or '.join(names)} in {folder or 'a folder given by --weights'}. Put one there, "
            "or pass --download."
        )
    return replace(found, preprocess=PREPROCESS)
