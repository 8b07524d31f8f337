"""Large JPEGs decoded at a part of their size (``--decoder scaled``): what that saves, and what it does to the maps.

The demo's photographs are enlarged to twelve megapixels, with grain and sides that are multiples of 8 as cameras have, and
saved as JPEG. Decoders take turns, one thread; seconds are those of CPU time. Maps are those of the demo's network, with its
trained weights, for the class that it predicts from the whole pictures. Usage:

    python -m bench.large_pictures
"""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from shapleycam import Explainer
from shapleycam.cli.demo import photographs
from shapleycam.data.decoding import Decoder
from shapleycam.data.images import pixels_of, to_picture
from shapleycam.model.zoo import load_classifier

from .attribute_job import interleaved, ratio
from .ops import conditions

RESULT = Path(__file__).parent / "results" / "large-pictures-cpu.json"
MEGAPIXELS = 12e6
DECODERS = ("pillow", "torchcodec", "scaled")


def enlarged(file: Path) -> bytes:
    """A photograph of twelve megapixels, as JPEG."""
    with Image.open(file) as photograph:
        rgb = photograph.convert("RGB")
    by = (MEGAPIXELS / (rgb.width * rgb.height)) ** 0.5
    size = (round(rgb.width * by / 8) * 8, round(rgb.height * by / 8) * 8)
    large = pixels_of(rgb.resize(size, Image.Resampling.LANCZOS))
    grain = torch.randn(large.shape, generator=torch.Generator().manual_seed(0)) * 5
    buffer = io.BytesIO()
    to_picture((large + grain).round().clamp(0, 255).byte().permute(1, 2, 0)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def off(one: Tensor, other: Tensor) -> list[float]:
    """The largest difference of two displayed maps in [0, 1], per image."""
    return (one - other).abs().flatten(1).amax(1).tolist()


def main() -> None:
    contents = [(file.name, enlarged(file)) for file in photographs()]
    classifier = load_classifier()
    recipe = classifier.preprocess
    chosen = {name: Decoder(recipe, name) for name in (*DECODERS, "exact")}
    views = {name: torch.stack([decode(content, file).view for file, content in contents]) for name, decode in chosen.items()}
    explainer = Explainer(classifier.model)
    whole = explainer(recipe.normalise(views["exact"]))
    maps = {name: explainer(recipe.normalise(view), whole.targets).heatmaps() for name, view in views.items()}
    levels = {name: (view.int() - views["exact"].int()).abs().float() for name, view in views.items()}

    def job(name: str) -> Any:
        return lambda block: chosen[name](contents[block % len(contents)][1], name)

    cpu, wall = interleaved({name: job(name) for name in DECODERS}, range(4 * len(contents)))
    found = {
        name: {
            "milliseconds": 1e3 * statistics.median(cpu[name]),
            "times_torchcodec": ratio(cpu, name, "torchcodec"),
            "times_torchcodec_by_the_clock": ratio(wall, name, "torchcodec"),
            "levels_mean": float(levels[name].mean()),
            "levels_most": int(levels[name].amax()),
            "maps_off": max(off(maps[name], maps["exact"])),
            "maps_off_median": statistics.median(off(maps[name], maps["exact"])),
        }
        for name in DECODERS
    }
    result = {
        "conditions": {**conditions(torch.device("cpu")), "megabytes": statistics.mean(len(c) for _, c in contents) / 1e6},
        "decoders": found,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in found.items():
        print(name, {key: round(value, 3) for key, value in row.items()})


if __name__ == "__main__":
    main()
