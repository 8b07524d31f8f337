"""``shapleycam demo``: photographs from scikit-image, a trained network from PyPI, and a contact sheet to look at."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from ..data.images import read_image, to_picture
from ..errors import InputError
from ..explainer import Explainer
from ..model.zoo import DEFAULT_MODEL, load_classifier, pick_device
from ..optional import need
from .explain import Row, labels, table_of

if TYPE_CHECKING:
    from PIL.Image import Image

# Inside scikit-image's wheel, and public domain or CC0, so that the sheet may be passed on.
PHOTOGRAPHS = ("chelsea.png", "coffee.png", "camera.png", "astronaut.png", "rocket.jpg")
_TILE, _GAP, _CAPTION = 224, 8, 22


@dataclass(frozen=True, slots=True)
class Tile:
    """One picture of the sheet: uint8 [H, W, 3], and what stands below it."""

    pixels: Tensor
    caption: str


def run_demo(out: Path, device_name: str, backend: str, results: Console, progress: Console) -> int:
    """Explain the photographs, write the sheet and the overlays into ``out``, and print where they are.

    Raises:
        ShapleyCamError: the extra is not installed, or the device or backend named cannot serve.
    """
    need("PIL", "demo")
    device = pick_device(device_name)
    with progress.status(f"loading {DEFAULT_MODEL}"):
        classifier = load_classifier(device=device)
        views = torch.stack([classifier.preprocess.view(read_image(path)) for path in photographs()]).to(device)
    images = classifier.preprocess.normalise(views)
    shapley = Explainer(classifier.model, backend=backend)
    first_order = Explainer(classifier.model, method="gradcam", backend=backend)
    shapley.prepare(images)
    first_order.prepare(images)

    out.mkdir(parents=True, exist_ok=True)
    rows, heatmaps, others, drawn, drawn_other = [], [], [], [], []
    for n, file in enumerate(PHOTOGRAPHS):
        one = slice(n, n + 1)
        started = time.perf_counter()
        explanation = shapley(images[one]).check()
        drawn.append(explanation.overlay(views[one])[0].cpu())
        milliseconds = (time.perf_counter() - started) * 1e3
        heatmaps.append(explanation.heatmaps()[0])
        gradcam = first_order(images[one], explanation.targets)
        others.append(gradcam.heatmaps()[0])
        drawn_other.append(gradcam.overlay(views[one])[0])
        [(label, chance, index)] = labels(classifier, explanation, 0)
        overlay = out / f"{Path(file).stem}.png"
        to_picture(drawn[n]).save(overlay)
        used = explanation.diagnostics
        rows.append(Row(Path(file), label, index, chance, used.engine, used.backend, milliseconds, overlay))

    differences = [mine - other for mine, other in zip(heatmaps, others, strict=True)]
    scale = max(float(difference.abs().max()) for difference in differences)
    sheet = out / "contact-sheet.jpg"
    tiles = [
        (
            Tile(views[n].permute(1, 2, 0), f"{row.label} ({row.probability:.2f})"),
            Tile(drawn[n], "ShapleyCAM"),
            Tile(drawn_other[n], "GradCAM"),
            Tile(signed_colours(differences[n], scale), f"difference, up to {float(differences[n].abs().max()):.3f}"),
        )
        for n, row in enumerate(rows)
    ]
    contact_sheet(tiles).save(sheet, quality=90, subsampling=0)

    results.print(table_of(rows, results.width))
    results.print(
        escape(f"{classifier.name} ({classifier.weights}), {classifier.preprocess}, {device}; {shapley!r}"),
        soft_wrap=True,
    )
    results.print(
        f"In the difference, red is where ShapleyCAM is higher and blue where it is lower; full colour is {scale:.3f}."
    )
    results.print(f"The contact sheet is {escape(str(sheet.resolve()))}", soft_wrap=True)
    return 0


def photographs() -> list[Path]:
    """The files of :data:`PHOTOGRAPHS`.

    Raises:
        InputError: scikit-image is not installed, or no longer has one of them.
    """
    folder = Path(str(need("skimage", "demo").__file__)).parent / "data"
    missing = [name for name in PHOTOGRAPHS if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"This release of scikit-image has no {', '.join(missing)} in {folder}: pip install 'shapleycam[demo]'"
        )
    return [folder / name for name in PHOTOGRAPHS]


def signed_colours(difference: Tensor, scale: float) -> Tensor:
    """Signed values [H, W] as uint8 [H, W, 3]: red above zero, white at zero, blue below; full colour at ±``scale``."""
    scaled = (difference / max(scale, 1e-6)).clamp(-1, 1)
    up, down = scaled.clamp(min=0), (-scaled).clamp(min=0)
    return ((1 - torch.stack((down, up + down, up), -1)) * 255).round().to(torch.uint8)


def contact_sheet(rows: Sequence[Sequence[Tile]]) -> Image:
    """Rows of captioned tiles on white."""
    from PIL import Image, ImageDraw, ImageFont

    width = len(rows[0]) * (_TILE + _GAP) + _GAP
    sheet = Image.new("RGB", (width, len(rows) * (_TILE + _CAPTION + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            left, top = _GAP + x * (_TILE + _GAP), _GAP + y * (_TILE + _CAPTION + _GAP)
            picture = to_picture(tile.pixels)
            sheet.paste(picture.resize((_TILE, _TILE)) if picture.size != (_TILE, _TILE) else picture, (left, top))
            draw.text((left + 2, top + _TILE + 2), tile.caption, fill="black", font=font)
    return sheet
