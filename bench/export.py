"""Exported explanations of real networks: do they agree, and what do they cost?

    python -m bench.export                       # or: make export-networks
    python -m bench.export --networks "ResNet-18;Swin-T"   # some only; the figures of the others are kept

The paper's twelve networks, a vision transformer and a layer in front of an in-place ReLU, with seeded random weights at 224
pixels, and the demo's trained network. Each is exported as ONNX and as an ExportedProgram, which compares both with the
explainer in float64; the ONNX file is then compared in OpenVINO too. What is refused has a row that says why.

The times of one network are measured in one process, every round one rival after the other in an order that turns; figures
are medians of the rounds' ratios. All rivals have the same number of threads (``--threads``).

Writes ``bench/results/export.json`` and ``docs/export-networks.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tests.helpers import build
from torch import Tensor, nn

from shapleycam import Explainer, ExportError
from shapleycam.export import Artefact, export
from shapleycam.export.check import Reference, check, examples
from shapleycam.models import load_classifier

from .export_page import page

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "export.json"
PAGE = ROOT / "docs" / "export-networks.md"
SIZE = 224


@dataclass(frozen=True, slots=True)
class Network:
    """A network of ``tests.helpers.build`` and its target layer; ``batches`` are timed."""

    build: str
    layer: str
    batches: tuple[int, ...] = (1,)
    grad_cam: bool = False


NETWORKS = {
    "ResNet-18": Network("tv:resnet18", "layer4.1", (1, 8), True),
    "ResNet-50": Network("tv:resnet50", "layer4.2", (1, 8), True),
    "ResNet-101": Network("tv:resnet101", "layer4.2"),
    "ResNet-152": Network("tv:resnet152", "layer4.2"),
    "ResNeXt-50": Network("tv:resnext50_32x4d", "layer4.2"),
    "VGG-16": Network("tv:vgg16", "features.30"),
    "EfficientNet-B0": Network("tv:efficientnet_b0", "features.8", (1, 8), True),
    "MobileNet-V2": Network("tv:mobilenet_v2", "features.18", (1, 8), True),
    "Swin-T": Network("timm:swin_tiny_patch4_window7_224", "norm"),
    "Swin-S": Network("timm:swin_small_patch4_window7_224", "norm"),
    "Swin-B": Network("timm:swin_base_patch4_window7_224", "norm"),
    "Swin-L": Network("timm:swin_large_patch4_window7_224", "norm"),
    "EfficientNet-Lite0 (trained)": Network("lite0", "features", (1, 8)),
    "ViT-B/16": Network("tv:vit_b_16", "encoder.layers.encoder_layer_11.ln_1"),
    "VGG-16, in-place ReLU behind": Network("tv:vgg16", "features.28"),
    "ResNet-18, one stage earlier": Network("tv:resnet18", "layer3.1"),
}


def images_like(count: int) -> Tensor:
    """Images of low frequencies with some noise, seeded, normalised: [count, 3, SIZE, SIZE]."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, 14, 14, generator=generator)
    smooth = nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")
    return smooth + 0.2 * torch.randn(smooth.shape, generator=generator)


def in_openvino(path: Path, threads: int, names: Sequence[str]) -> Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]:
    """An ONNX file in OpenVINO, in float32."""
    import openvino

    # Without the hint it computes in bfloat16 where the processor has it.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads)}
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        found = compiled({name: value.numpy() for name, value in inputs.items()})
        return tuple(torch.from_numpy(found[name].copy()) for name in names)

    return run


def in_onnx_runtime(path: Path, threads: int) -> Callable[[Tensor], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"image": images.numpy()})


def agreement(
    name: str, explainer: Explainer, images: Tensor, folder: Path, threads: int
) -> tuple[dict[str, Any], Artefact | None]:
    """The figures of one network, and its ONNX file."""
    row: dict[str, Any] = {"network": name, "layer": NETWORKS[name].layer}
    made: Artefact | None = None
    for suffix in (".onnx", ".pt2"):
        started = time.perf_counter()
        try:
            artefact = export(explainer, images, folder / f"explained{suffix}", overwrite=True)
        except ExportError as error:
            row[suffix[1:]] = {"refused": str(error)}
            continue
        about = artefact.metadata
        row["engine"] = about.engine
        row[suffix[1:]] = {
            **{each: next(iter(about.checks.values()))[each] for each in ("logits", "maps", "display")},
            "seconds": time.perf_counter() - started,
            "megabytes": artefact.path.stat().st_size / 1e6,
        }
        if suffix == ".onnx":
            made = artefact
            run = in_openvino(artefact.path, threads, [port.name for port in about.outputs])
            batches = [examples(images, count, seed=count) for count in (1, 3)]
            found = check(run, about, Reference(explainer, None), batches)
            row["openvino"] = {"logits": found.logits, "maps": found.maps, "display": found.display}
    return row, made


def speed(
    network: Network, explainer: Explainer, artefact: Artefact, folder: Path, rounds: int, threads: int
) -> list[dict[str, Any]]:
    """Medians of ratios, per batch."""
    model = explainer.model
    plain = folder / "plain.onnx"
    with torch.no_grad():
        torch.onnx.export(
            model,
            (images_like(2),),
            f=plain,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["image"],
            output_names=["prediction"],
            dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
        )
    vino = {path: in_openvino(path, threads, ["prediction"]) for path in (plain, artefact.path)}
    rivals: dict[str, Callable[[Tensor], Any]] = {
        "eager": lambda images: model(images),
        "onnxruntime plain": in_onnx_runtime(plain, threads),
        "onnxruntime explained": in_onnx_runtime(artefact.path, threads),
        "openvino plain": lambda images: vino[plain]({"image": images}),
        "openvino explained": lambda images: vino[artefact.path]({"image": images}),
    }
    if network.grad_cam:
        import pytorch_grad_cam

        cam = pytorch_grad_cam.ShapleyCAM(model=model, target_layers=[model.get_submodule(network.layer)])
        rivals["pytorch-grad-cam"] = lambda images: cam(input_tensor=images, targets=[_Rest(0)] * len(images))
    # With one thread the processor's time of this process is the time it takes, whoever else is on the machine.
    clock = time.process_time if threads == 1 else time.perf_counter
    found = []
    for batch in network.batches:
        images, times = images_like(batch), {name: [] for name in rivals}
        for index in range(rounds + 2):
            order = list(rivals)
            random.Random(index).shuffle(order)
            for name in order:
                with torch.set_grad_enabled(name == "pytorch-grad-cam"):
                    started = clock()
                    rivals[name](images)
                    if index > 1:  # two rounds warm up
                        times[name].append(clock() - started)

        def ratio(a: str, b: str, times: dict[str, list[float]] = times) -> float:
            return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

        row: dict[str, Any] = {"batch": batch, "seconds": {name: statistics.median(each) for name, each in times.items()}}
        for runtime in ("onnxruntime", "openvino"):
            explained = f"{runtime} explained"
            row[runtime] = {"over_plain": ratio(explained, f"{runtime} plain"), "over_eager": ratio(explained, "eager")}
            if network.grad_cam:
                row[runtime]["grad_cam_over_it"] = ratio("pytorch-grad-cam", explained)
        found.append(row)
    return found


class _Rest:
    """The ReST utility as a target of pytorch-grad-cam."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[self.category] + logits.log_softmax(-1)[self.category]


def row_of(name: str, rounds: int, threads: int) -> dict[str, Any]:
    """All figures of one network."""
    network = NETWORKS[name]
    model = load_classifier().model if network.build == "lite0" else build(network.build)
    explainer = Explainer(model, network.layer)
    images = images_like(2)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row, artefact = agreement(name, explainer, images, Path(folder), threads)
        if artefact is not None and rounds:
            row["speed"] = speed(network, explainer, artefact, Path(folder), rounds, threads)
    return row


def conditions(threads: int) -> dict[str, Any]:
    packages = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "grad-cam")
    processor = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": processor,
        "threads": threads,
        "cores": os.cpu_count(),
        **{each: metadata.version(each) for each in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", help="names of the table with ; between them; all by default")
    parser.add_argument("--rounds", type=int, default=15, help="of timing; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = list(NETWORKS) if arguments.networks is None else arguments.networks.split(";")
    known = {row["network"]: row for row in json.loads(RESULT.read_text())["rows"]} if RESULT.is_file() else {}
    if unknown := [name for name in chosen if name not in NETWORKS]:
        parser.error(f"--networks: {', '.join(map(repr, unknown))} not among {'; '.join(NETWORKS)}")
    for name in chosen:
        row = row_of(name, arguments.rounds, arguments.threads)
        row["conditions"] = conditions(arguments.threads)
        known[name] = row
        report = {"rows": [known[each] for each in NETWORKS if each in known]}
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
        PAGE.write_text(page(report), encoding="utf-8")
        print(json.dumps({key: value for key, value in row.items() if key != "conditions"}), flush=True)


if __name__ == "__main__":
    main()
