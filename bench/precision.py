"""What smaller numbers cost: an ONNX artefact in float16 and in int8, against itself in float32.

    python -m bench.precision        # or: make export-precision

The demo's trained network, its five photographs, and four overlapping parts of each. float16: the weights are rounded, the
arithmetic stays float32. int8: ONNX Runtime's static quantisation of weights and activations (QDQ, per channel), calibrated on
the same photographs upside down: of the convolutions alone, and of the products and sums of the explanation besides.

Writes ``bench/results/precision.json``; docs/export.md has its figures.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from shapleycam import Explainer
from shapleycam.cli.demo import photographs
from shapleycam.data.images import read_image
from shapleycam.export import export
from shapleycam.models import load_classifier

RESULT = Path(__file__).parent / "results" / "precision.json"


class Calibration(quantization.CalibrationDataReader):
    """One image after another."""

    def __init__(self, images: Tensor) -> None:
        self._rows: Iterator[dict[str, Any]] = iter([{"image": row[None].numpy(), "target": np.array([-1])} for row in images])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._rows, None)


def half_weights(source: Path, target: Path) -> None:
    """Round all float32 weights to float16, and keep the arithmetic."""
    model = onnx.load(source)
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and int(np.prod(weight.dims)) > 1:
            name = weight.name
            values = onnx.numpy_helper.to_array(weight).astype(np.float16)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, f"{name}_half"))
            model.graph.node.insert(0, onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT))
    onnx.save(model, target)


def int8(source: Path, target: Path, images: Tensor, kinds: list[str]) -> None:
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared, target, Calibration(images), op_types_to_quantize=kinds, per_channel=True, reduce_range=True
    )


def ranks(values: Tensor) -> Tensor:
    return values.argsort(1).argsort(1).double()


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, row by row."""
    a, b = (each.double() - each.double().mean(1, keepdim=True) for each in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-30)


def loss(path: Path, plain: Path, images: Tensor) -> dict[str, Any]:
    """Of the maps of the classes that the float32 file predicts."""
    found = []
    targets: Any = np.full(len(images), -1)
    for file in (plain, path):
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        logits, raw = session.run(["prediction", "saliency_map"], {"image": images.numpy(), "target": targets})
        targets = logits.argmax(1) if file == plain else targets
        found.append((torch.from_numpy(logits), torch.from_numpy(raw).flatten(1)))
    (z, a), (y, b) = found
    rank = correlation(ranks(a), ranks(b))
    return {
        "megabytes": path.stat().st_size / 1e6,
        "same_class": float((z.argmax(1) == y.argmax(1)).double().mean()),
        "rank_correlation": {"median": float(rank.median()), "least": float(rank.min())},
        "correlation": {"median": float(correlation(a, b).median()), "least": float(correlation(a, b).min())},
        "largest_difference": float(((a - b).abs().amax(1) / a.abs().amax(1)).max()),
    }


def main() -> None:
    classifier = load_classifier()
    pictures = []
    for file in photographs():
        whole = read_image(file)
        w, h = whole.size
        corners = [(x, y, x + 2 * w // 3, y + 2 * h // 3) for x in (0, w // 3) for y in (0, h // 3)]
        pictures += [whole, *(whole.crop(box) for box in corners)]
    views = torch.stack([classifier.preprocess.view(picture) for picture in pictures])
    images = classifier.preprocess.normalise(views)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        plain = folder / "plain.onnx"
        export(Explainer(classifier.model), images[:2], plain, targets="given", maps="raw")
        half_weights(plain, folder / "half.onnx")
        others = images.flip(2)
        int8(plain, folder / "network.onnx", others, ["Conv"])
        int8(plain, folder / "whole.onnx", others, ["Conv", "MatMul", "Add", "Mul"])
        rows = {
            "float32": loss(plain, plain, images),
            "float16 weights": loss(folder / "half.onnx", plain, images),
            "int8 convolutions": loss(folder / "network.onnx", plain, images),
            "int8 everything": loss(folder / "whole.onnx", plain, images),
        }
    facts = {each: metadata.version(each) for each in ("torch", "onnx", "onnxruntime")}
    report = {"network": classifier.name, "pictures": len(images), "conditions": facts, "rows": rows}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
