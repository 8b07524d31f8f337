"""What the benchmarks of the data-set job share: generated pictures, a network, the job with and without explaining, turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shapleycam.attribute import Settings
from shapleycam.attribute.feed import Batch
from shapleycam.attribute.job import ShardRunner
from shapleycam.attribute.part import Found
from shapleycam.data.images import Preprocess, to_picture
from shapleycam.data.manifest import write_manifest
from shapleycam.data.sources import open_source
from shapleycam.model.zoo import Classifier

BLOCK = 32  # pictures of a block, which is a shard
RECIPE = Preprocess((224, 224), 256, "bilinear")


def pictures(folder: Path, count: int, size: tuple[int, int] = (500, 375), quality: int = 88) -> Path:
    """Generated JPEGs; made once."""
    done = folder / ".done"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for n in range(count):
        smooth = torch.rand(1, 3, 8, 10, generator=generator)
        large = nn.functional.interpolate(smooth, (size[1], size[0]), mode="bicubic")[0]
        grain = torch.randn(large.shape, generator=generator) * 0.03
        pixels = (large + grain).clamp(0, 1).mul(255).byte().permute(1, 2, 0).contiguous()
        to_picture(pixels).save(folder / f"{n:06}.jpg", quality=quality)
    done.touch()
    return folder


def classifier(head: str, device: torch.device) -> Classifier:
    """ResNet-18 with random weights; "pool-linear" is its own head, "mlp" has a hidden layer, which no closed form covers."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None)
    if head == "mlp":
        model.fc = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 1000))
    return Classifier(f"resnet18 {head}", model.to(device).eval(), RECIPE, (), "random")


class Plain(ShardRunner):
    """The same job without an explanation: decode, predict, write the class and its probability."""

    def _explain(self, batch: Batch) -> Found | None:
        if batch.views is None:
            return None
        with torch.inference_mode():
            logits = self.classifier.model(self._images(batch.views))
            best = logits.softmax(1).max(1)
            value = logits.gather(1, best.indices[:, None])
            nothing = torch.full_like(value, float("nan"))
            numbers = torch.stack([best.values[:, None], value, nothing, nothing, nothing]).float()
            maps = torch.zeros(
                (len(logits), 1, *self._schema.field("map").type.shape), dtype=torch.float16, device=logits.device
            )
            finite = logits.isfinite().all(1)
            return self._to_host(maps, numbers, best.indices[:, None], finite)


def runner(kind: type[ShardRunner], model: Classifier, source: Path, place: Path, settings: Settings) -> ShardRunner:
    place.mkdir(parents=True, exist_ok=True)
    pictures = open_source(source)
    write_manifest(pictures, place / "manifest.parquet", BLOCK)
    return kind(model, pictures, place / "manifest.parquet", place, settings, {})


Seconds = dict[str, list[float]]


def interleaved(contenders: dict[str, Callable[[int], Any]], blocks: range) -> tuple[Seconds, Seconds]:
    """Seconds of every contender on every block, in an order that turns: of the process's CPU time, and of the clock."""
    names = list(contenders)
    cpu: Seconds = {name: [] for name in names}
    wall: Seconds = {name: [] for name in names}
    for block in blocks:
        for name in names[block % len(names) :] + names[: block % len(names)]:
            began = time.process_time(), time.perf_counter()
            contenders[name](block)
            cpu[name].append(time.process_time() - began[0])
            wall[name].append(time.perf_counter() - began[1])
    return cpu, wall


def ratio(seconds: Seconds, of: str, over: str) -> float:
    """Median over the blocks of how much longer ``over`` takes than ``of``: the rate of ``of`` in units of ``over``'s."""
    return statistics.median(b / a for a, b in zip(seconds[of], seconds[over], strict=True))
