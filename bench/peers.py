"""Attribution maps of the packages that people use, beside ours: what they cost, once they agree.

    python -m bench.peers                                   # or: make bench-peers
    python -m bench.peers --networks resnet18 --batches 1   # some only; the other figures are kept
    python -m bench.peers --page                            # the page alone, from the committed result

For every network, batch size and dtype: the plain forward pass, pytorch-grad-cam, torch-cam and captum, and ours by the
same method, one after the other in one process, in an order that turns from round to round. A peer's map is compared with
ours first, and one that differs is not timed. Figures are medians of the rounds' ratios. What fails has a row that says so.
Finished cases are kept in the result, so a run that was cut off goes on where it was.

Writes ``bench/results/peers-<device>.json`` and ``docs/peers.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shapleycam import Explainer
from shapleycam.cli import keep_freed_memory
from shapleycam.profiling.conditions import conditions
from shapleycam.profiling.measure import peak_bytes
from shapleycam.profiling.stages import Clock

from .peers_page import page

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "peers.md"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULT = ROOT / "bench" / "results" / f"peers-{DEVICE.type}.json"
SIZE = 224
PEERS = ("grad-cam", "torchcam", "captum")

#: name -> (how tests.helpers.build calls it, target layer)
NETWORKS = {
    "ResNet-18": ("tv:resnet18", "layer4.1"),
    "ResNet-50": ("tv:resnet50", "layer4.2"),
    "ResNet-101": ("tv:resnet101", "layer4.2"),
    "ResNet-152": ("tv:resnet152", "layer4.2"),
    "ResNeXt-50": ("tv:resnext50_32x4d", "layer4.2"),
    "VGG-16": ("tv:vgg16", "features.30"),
    "EfficientNet-B0": ("tv:efficientnet_b0", "features.8"),
    "MobileNet-V2": ("tv:mobilenet_v2", "features.18"),
    "Swin-T": ("timm:swin_tiny_patch4_window7_224", "norm"),
    "Swin-S": ("timm:swin_small_patch4_window7_224", "norm"),
    "Swin-B": ("timm:swin_base_patch4_window7_224", "norm"),
    "Swin-L": ("timm:swin_large_patch4_window7_224", "norm"),
    "ViT-B/16": ("tv:vit_b_16", "encoder.layers.encoder_layer_11.ln_1"),
    "ConvNeXt-T": ("tv:convnext_tiny", "features.7"),
    "MobileNet-V3-L": ("tv:mobilenet_v3_large", "features.16"),
}
#: our method -> the peers' classes of the same map
GRAD_CAM = {"shapleycam": "ShapleyCAM", "gradcam": "GradCAM", "hirescam": "HiResCAM", "layercam": "LayerCAM"}
TORCH_CAM = {"gradcam": "GradCAM", "layercam": "LayerCAM"}

Call = Callable[[], Tensor]


class Case:
    """One network, batch and dtype, with the calls to compare: name -> (our method beside it, the call)."""

    def __init__(self, network: str, batch: int, dtype: torch.dtype) -> None:
        from tests.helpers import build

        name, layer = NETWORKS[network]
        self.model = build(name).to(dtype).to(DEVICE)
        generator = torch.Generator().manual_seed(1)
        coarse = torch.randn(batch, 3, 14, 14, generator=generator)
        self.images = nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear").to(DEVICE, dtype)
        self.layer, self.module = layer, self.model.get_submodule(layer)
        with torch.no_grad():
            self.targets = self.model(self.images).argmax(1)
        self.listed = self.targets.tolist()
        self.grid = Explainer(self.model, layer, "gradcam", "logit").prepare(self.images).facts
        self.explainers = {
            method: Explainer(self.model, layer, method, "rest" if method == "shapleycam" else "logit") for method in GRAD_CAM
        }
        for explainer in self.explainers.values():
            explainer.prepare(self.images)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.images)

    def ours(self, method: str) -> Tensor:
        """Heatmaps [N, H, W]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.explainers[method](self.images, self.targets).heatmaps()

    def reshape(self) -> Callable[[Tensor], Tensor] | None:
        """What the peers need to be told of layers that are not [N, C, H, W]."""
        layout = self.explainers["gradcam"](self.images[:1], self.targets[:1]).diagnostics.layouts[0]
        if layout.kind == "NCHW":
            return None

        def to_map(output: Tensor) -> Tensor:
            return layout.view(output).unflatten(2, layout.grid)

        return to_map

    def grad_cam(self, method: str) -> Call:
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        class Rest:
            def __init__(self, target: int) -> None:
                self.target = target

            def __call__(self, output: Tensor) -> Tensor:
                return output[self.target] + output.log_softmax(-1)[self.target]

        kind = Rest if method == "shapleycam" else ClassifierOutputTarget
        peer, reshape = getattr(pytorch_grad_cam, GRAD_CAM[method]), self.reshape()
        targets = [kind(target) for target in self.listed]

        def call() -> Tensor:
            # As its README has it. One that is kept leaves its hooks on the layer, where they hold the activations of
            # everybody's calls, and their graph.
            with peer(self.model, [self.module], reshape_transform=reshape) as cam:
                return torch.from_numpy(cam(self.images, targets))

        return call

    def torch_cam(self, method: str) -> Call:
        from torchcam import methods

        if self.reshape() is not None:
            raise RuntimeError("torch-cam reads [N, C, H, W] only")

        def call() -> Tensor:
            with getattr(methods, TORCH_CAM[method])(self.model, target_layer=self.layer) as extract:
                scores = self.model(self.images)
                [maps] = extract(self.listed, scores)
            return nn.functional.interpolate(maps[:, None].float(), (SIZE, SIZE), mode="bilinear")[:, 0]

        return call

    def captum(self) -> Call:
        from captum.attr import LayerGradCam

        if self.reshape() is not None:
            raise RuntimeError("captum's LayerGradCam reads [N, C, H, W] only")
        cam = LayerGradCam(self.model, self.module)

        def call() -> Tensor:
            raw = cam.attribute(self.images, self.targets, relu_attributions=True).detach()
            return nn.functional.interpolate(raw.float(), (SIZE, SIZE), mode="bilinear")[:, 0]

        return call

    def rivals(self) -> dict[str, tuple[str, Callable[[], Call]]]:
        """name -> (method, what makes the call)."""
        found: dict[str, tuple[str, Callable[[], Call]]] = {}
        for method, name in GRAD_CAM.items():
            found[f"grad-cam {name}"] = method, lambda method=method: self.grad_cam(method)
        for method, name in TORCH_CAM.items():
            found[f"torchcam {name}"] = method, lambda method=method: self.torch_cam(method)
        found["captum LayerGradCam"] = "gradcam", self.captum
        return found


def difference(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference of two display maps, each scaled to [0, 1] per image."""

    def scaled(maps: Tensor) -> Tensor:
        flat = maps.detach().to("cpu", torch.float64).flatten(1)
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
        return (flat - low) / (high - low).clamp_min(1e-7)

    return float((scaled(theirs) - scaled(ours)).abs().amax())


def measure(network: str, batch: int, dtype: str, seconds: float) -> list[dict[str, Any]]:
    """The rows of one case."""
    case = Case(network, batch, getattr(torch, dtype))
    key = {"network": network, "batch": batch, "dtype": dtype}
    rows: list[dict[str, Any]] = []
    # The same function of the same map: a half-precision map differs by its own rounding.
    bound = 5e-3 if dtype == "float32" else 0.2
    calls: dict[str, Callable[[], Any]] = {"forward": case.forward}
    methods: dict[str, str] = {}
    for method in GRAD_CAM:
        calls[f"ours {method}"] = lambda method=method: case.ours(method)
    for name, (method, make) in case.rivals().items():
        try:
            call = make()
            off = difference(call(), case.ours(method))
            call()  # some of them work once
        except Exception as error:
            rows.append({**key, "rival": name, "method": method, "failed": reason(error)})
            continue
        if not off < bound:
            rows.append({**key, "rival": name, "method": method, "failed": f"its map differs from ours by {off:.2f}"})
            continue
        calls[name], methods[name] = call, method
        rows.append({**key, "rival": name, "method": method, "difference": off})
    rows += [{**key, "rival": f"ours {method}", "method": method} for method in GRAD_CAM]
    samples: dict[str, list[float]] = {name: [] for name in calls}
    clock, started, names = Clock(DEVICE), time.perf_counter(), list(calls)
    stopped: dict[str, str] = {}
    for name in set(names) - set(methods):  # the peers were called above
        calls[name]()
    while len(samples["forward"]) < 3 or (time.perf_counter() - started < seconds and len(samples["forward"]) < 25):
        turn = len(samples["forward"]) % len(names)
        for name in names[turn:] + names[:turn]:
            before = clock.read()
            try:
                calls[name]()
            except Exception as error:
                if name not in methods:  # ours, or the forward pass
                    raise
                stopped[name] = reason(error)
                continue
            samples[name].append(clock.seconds(before, clock.read()))
        names = [name for name in names if name not in stopped]
    still = peak_bytes(case.forward, DEVICE)
    for row in rows:
        if "failed" in row:
            continue
        name = row["rival"]
        if name in stopped:
            row["failed"] = f"in a later call: {stopped[name]}"
            continue
        row["rounds"] = len(samples[name])
        row["over_forward"] = ratio(samples[name], samples["forward"])
        row["over_ours"] = ratio(samples[name], samples[f"ours {row['method']}"])
        row["peak_over_forward"] = peak_bytes(calls[name], DEVICE) / max(still, 1)
        row["milliseconds"] = statistics.median(samples[name]) * 1e3
    return rows


def reason(error: BaseException) -> str:
    """What went wrong first: tidying up behind it may fail too, and hide it."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error)[:120]}"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--batches", default="1,8" if DEVICE.type == "cpu" else "1,8,64")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--seconds", type=float, default=40.0, help="a case, after three rounds")
    parser.add_argument("--again", action="store_true", help="measure finished cases again")
    parser.add_argument("--page", action="store_true")
    asked = parser.parse_args()
    # As the command line does. With glibc's default, plain inference frees the activations of a layer before it allocates those
    # of another, and has its pages cleared again; who keeps them all for a pass back is then quicker than the forward pass.
    kept = keep_freed_memory()
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    if not asked.page:
        known = {name.lower().replace("-", ""): name for name in NETWORKS}
        networks = [known[name.lower().replace("-", "")] for name in asked.networks.split(",")]
        for network in networks:
            for batch in map(int, asked.batches.split(",")):
                for dtype in asked.dtypes.split(","):
                    same = lambda row, key=(network, batch, dtype): (row["network"], row["batch"], row["dtype"]) == key
                    if any(map(same, result["rows"])) and not asked.again:
                        continue
                    started = time.perf_counter()
                    found = measure(network, batch, dtype, asked.seconds)
                    told = {
                        **conditions(DEVICE),
                        "freed_memory_is_kept": kept,
                        **{peer: metadata.version(peer) for peer in PEERS},
                    }
                    result["rows"] = [row for row in result["rows"] if not same(row)] + [
                        {**row, "conditions": told} for row in found
                    ]
                    RESULT.write_text(json.dumps(result, indent=1) + "\n")
                    print(network, batch, dtype, f"{time.perf_counter() - started:.0f} s", flush=True)
    PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
