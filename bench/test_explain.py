"""What an explanation costs: against the plain forward pass, and against pytorch-grad-cam's ShapleyCAM.

    python -m pytest bench/test_explain.py

Every round times the rivals one after the other in an order that turns, so that a noisy neighbour meets all of them; the
figures are medians of the rounds' ratios. A case whose map disagrees with pytorch-grad-cam's is not timed. Peak memory is
that of torch's allocator above what was held before (model and input), from a run of its own. The targets are aims, printed
with the distance from them, and assert nothing. ``SHAPLEYCAM_BENCH_ROUNDS`` sets the rounds (default 15).

The results go to ``bench/results/explain-<kind>-<device>-<commit>.json``.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pytorch_grad_cam")

import pytorch_grad_cam
import torch
import torchvision
from torch import nn

import shapleycam
from shapleycam import Explainer

ROUNDS = int(os.environ.get("SHAPLEYCAM_BENCH_ROUNDS", "15"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULTS = Path(__file__).parent / "results"

#: Aims of the project on a CPU; nothing is asserted.
TARGETS = {
    "over_forward": 1.06,
    "closed_form_over_forward": 1.03,
    "grad_cam_over_ours": 2.5,
    "peak_over_forward": 1.1,
    # engine="quadrature" with four nodes, over the second order
    "quadrature_over_ours": {1: 1.03, 8: 1.01},
}

#: A pool-and-linear head has the closed form; the other engine is forced, to see what autograd costs on the same head.
MODELS = {"resnet50": "layer4.2", "efficientnet_b0": "features.8"}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def alive(name: str, layout: torch.memory_format) -> nn.Module:
    """A randomly initialised network whose maps are not constant: statistics and classifier are perturbed."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)
        # Statistics of the activations as they are, layer by layer, then logits with a deviation of 3.
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
        model(torch.randn(4, 3, 224, 224))
        model.eval()
        linear.weight *= 3 / model(torch.randn(4, 3, 224, 224)).std()
    return model.to(DEVICE).to(memory_format=layout)


class Rest:
    """The ReST utility as a target of pytorch-grad-cam."""

    def __init__(self, target: int) -> None:
        self.target = target

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        return output[self.target] + output.log_softmax(-1)[self.target]


class Case:
    """One model, layout and batch size, with the calls to compare."""

    def __init__(self, name: str, layout: str, batch: int) -> None:
        self.model = alive(name, LAYOUTS[layout])
        torch.manual_seed(1)
        self.images = torch.randn(batch, 3, 224, 224).to(DEVICE).contiguous(memory_format=LAYOUTS[layout])
        with torch.no_grad():
            self.classes = self.model(self.images).argmax(1).tolist()
        self.targets = torch.tensor(self.classes, device=DEVICE)
        self.explainers = {
            engine: Explainer(self.model, layer=MODELS[name], engine=engine) for engine in ("auto", "reverse_over_reverse")
        }
        self.explainers["quadrature"] = Explainer(self.model, layer=MODELS[name], engine="quadrature", nodes=4)
        self.rival = pytorch_grad_cam.ShapleyCAM(self.model, [self.model.get_submodule(MODELS[name])])

    def forward(self):
        with torch.inference_mode():
            return self.model(self.images)

    def ours(self):
        return self.explainers["auto"](self.images, self.targets)

    def autograd(self):
        return self.explainers["reverse_over_reverse"](self.images, self.targets)

    def quadrature(self):
        return self.explainers["quadrature"](self.images, self.targets)

    def grad_cam(self):
        return self.rival(self.images, [Rest(target) for target in self.classes])

    @property
    def calls(self):
        return {
            "forward": self.forward,
            "ours": self.ours,
            "quadrature": self.quadrature,
            "autograd": self.autograd,
            "grad_cam": self.grad_cam,
        }

    def verify(self) -> float:
        """The largest difference of the display maps from pytorch-grad-cam's; refuses to go on where it is large."""
        theirs = torch.from_numpy(self.grad_cam()).to(DEVICE)
        if not float(theirs.amax()) > 0.5:
            pytest.fail("the maps are dead: nothing to compare")
        worst = max(float((call().heatmaps() - theirs).abs().max()) for call in (self.ours, self.autograd))
        if not worst < 1e-3:
            pytest.fail(f"the maps differ from pytorch-grad-cam's by {worst}: a wrong result is not timed")
        return worst


def seconds(call) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(call) -> int:
    """The most that torch's allocator held during the call, above what it held before."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.fixture(scope="module")
def ledger(request):
    """Rows of all cases; printed and written when the module is done."""
    rows: list[dict] = []
    yield rows
    if rows:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n\n{table(rows)}\nwritten: {write(rows)}")


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_explain(benchmark, ledger, name, layout, batch):
    case = Case(name, layout, batch)
    difference = case.verify()
    samples: dict[str, list[float]] = {key: [] for key in case.calls}
    for call in case.calls.values():
        call()

    def in_turn():
        # The order turns from round to round, so that nobody always runs behind the same neighbour.
        keys = list(samples)
        turn = len(samples["forward"]) % len(keys)
        for key in keys[turn:] + keys[:turn]:
            samples[key].append(seconds(case.calls[key]))

    # pytest-benchmark's own figure is the explanation alone; the ratios come from the interleaved samples.
    benchmark.pedantic(case.ours, setup=in_turn, rounds=ROUNDS)
    peak = {key: peak_bytes(call) for key, call in case.calls.items()}
    diagnostics = case.ours().diagnostics
    row = {
        "model": name,
        "layout": layout,
        "batch": batch,
        "engine": diagnostics.engine,
        "backend": diagnostics.backend,
        "largest_map_difference_from_grad_cam": difference,
        "median_ms": {key: statistics.median(values) * 1e3 for key, values in samples.items()},
        "ours_over_forward": ratio(samples["ours"], samples["forward"]),
        "autograd_over_forward": ratio(samples["autograd"], samples["forward"]),
        "quadrature_over_ours": ratio(samples["quadrature"], samples["ours"]),
        "grad_cam_over_ours": ratio(samples["grad_cam"], samples["ours"]),
        "grad_cam_over_forward": ratio(samples["grad_cam"], samples["forward"]),
        "peak_mib": {key: value / 2**20 for key, value in peak.items()},
        "peak_over_forward": peak["ours"] / peak["forward"],
        "samples_ms": {key: [round(value * 1e3, 3) for value in values] for key, values in samples.items()},
    }
    benchmark.extra_info.update({key: value for key, value in row.items() if key != "samples_ms"})
    ledger.append(row)


def ratio(numerators: list[float], denominators: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def table(rows: list[dict]) -> str:
    lines = [
        f"{conditions()['device']}, torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS} rounds",
        f"{'model':16} {'layout':6} {'batch':>5}  {'forward ms':>10} {'ours/forward':>12} {'target':>7} {'autograd/fwd':>12} "
        f"{'target':>7} {'K=4/ours':>8} {'target':>7} {'grad-cam/ours':>13} {'target':>7} {'peak/fwd':>8} {'target':>7}",
    ]
    for row in rows:
        aim = TARGETS["closed_form_over_forward" if row["engine"] == "closed_form" else "over_forward"]
        cells = [
            (row["ours_over_forward"], aim, 12),
            (row["autograd_over_forward"], TARGETS["over_forward"], 12),
            (row["quadrature_over_ours"], TARGETS["quadrature_over_ours"][row["batch"]], 8),
            (row["grad_cam_over_ours"], TARGETS["grad_cam_over_ours"], 13),
            (row["peak_over_forward"], TARGETS["peak_over_forward"], 8),
        ]
        lines.append(
            f"{row['model']:16} {row['layout']:6} {row['batch']:>5}  {row['median_ms']['forward']:>10.1f} "
            + " ".join(f"{value:>{width}.3f} {value / target - 1:>+7.0%}" for value, target, width in cells)
        )
    lines.append("'target': the distance from the aim; negative is better, but for grad-cam/ours, where positive is better.")
    lines.append(f"Aims (for a CPU): {', '.join(f'{key} {value}' for key, value in TARGETS.items())}")
    return "\n".join(lines)


def conditions() -> dict:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    )
    model = "unknown CPU"
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    return {
        "kind": DEVICE.type,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else model,
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "grad_cam": metadata.version("grad-cam"),
        "shapleycam": shapleycam.__version__,
        "backends": {name: status.available for name, status in shapleycam.backends().items()},
        "rounds": ROUNDS,
    }


def write(rows: list[dict]) -> Path:
    facts = conditions()
    device = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-").lower()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"explain-{facts['kind']}-{device}-{facts['commit']}.json"
    file.write_text(json.dumps({"conditions": facts, "targets": TARGETS, "cases": rows}, indent=1) + "\n")
    return file
