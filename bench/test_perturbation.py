"""What ScoreCAM and AblationCAM cost, against pytorch-grad-cam's.

    python -m pytest bench/test_perturbation.py

Every round times the two rivals one after the other, in an order that turns; the figures are medians of the rounds' ratios. A
case whose map disagrees with pytorch-grad-cam's is not timed. The aim is a factor of 2; it is printed and asserts nothing.
Both run with the allocator that the command line sets up, unless the environment tunes it (an empty ``GLIBC_TUNABLES=`` leaves
it as it is). ``SHAPLEYCAM_BENCH_ROUNDS`` sets the rounds (default 5: a ScoreCAM takes as many forward passes as the layer has
channels).

The results go to ``bench/results/perturbation-<kind>-<device>-<commit>.json``.
"""

import json
import os
import re
import statistics

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pytorch_grad_cam")

import pytorch_grad_cam
import torch
from bench.test_explain import DEVICE, LAYOUTS, RESULTS, alive, conditions, ratio, seconds
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from shapleycam import Explainer
from shapleycam.cli import keep_freed_memory
from shapleycam.methods.perturbation import ABLATION_FLOOR

ROUNDS = int(os.environ.get("SHAPLEYCAM_BENCH_ROUNDS", "5"))
AIM = 2.0

#: case -> network, layer, our method, theirs. Where activations are negative, pytorch-grad-cam's AblationCAM fills with its
#: floor (see ABLATION_FLOOR), and so does ours here, or the maps would differ.
CASES = {
    "scorecam-resnet18": ("resnet18", "layer4", "scorecam", "ScoreCAM"),
    "scorecam-efficientnet_b0": ("efficientnet_b0", "features.5", "scorecam", "ScoreCAM"),
    "ablationcam-resnet18-pool-linear": ("resnet18", "layer4", "ablationcam", "AblationCAM"),
    "ablationcam-resnet18": ("resnet18", "layer3", "ablationcam", "AblationCAM"),
    "ablationcam-efficientnet_b0": ("efficientnet_b0", "features.5", ABLATION_FLOOR, "AblationCAM"),
}


class Case:
    """One image, one network, one method, and the two calls to compare."""

    def __init__(self, network: str, layer: str, method, theirs: str) -> None:
        self.model = alive(network, LAYOUTS["NCHW"])
        torch.manual_seed(1)
        coarse = torch.randn(1, 3, 7, 7) * 2
        self.image = torch.nn.functional.interpolate(coarse, (224, 224), mode="bicubic").to(DEVICE)
        self.explainer = Explainer(self.model, layer, method, "logit")
        # A class with a map that is not zero everywhere: some are, with random weights.
        raw = Explainer(self.model, layer, "gradcam", "logit")(self.image, torch.arange(0, 1000, 25)[None].to(DEVICE)).raw
        self.target = int(raw[0].clamp_min(0).flatten(1).std(1).argmax()) * 25
        self.rival = getattr(pytorch_grad_cam, theirs)(self.model, [self.model.get_submodule(layer)])

    def ours(self) -> torch.Tensor:
        return self.explainer(self.image, self.target).heatmaps()

    def grad_cam(self) -> torch.Tensor:
        return torch.from_numpy(self.rival(self.image, [ClassifierOutputTarget(self.target)]))

    def verify(self) -> float:
        """The largest difference of the maps; refuses to go on where it is large."""
        ours, theirs = self.ours().cpu(), self.grad_cam()
        if not float(theirs.std()) > 0.05:
            pytest.fail("the maps are dead: nothing to compare")
        worst = float((ours - theirs).abs().max())
        if not worst < 1e-3:
            pytest.fail(f"the maps differ from pytorch-grad-cam's by {worst}: a wrong result is not timed")
        return worst


@pytest.fixture(scope="module")
def ledger(request):
    rows: list[dict] = []
    kept = keep_freed_memory()
    yield rows
    if rows:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n\n{table(rows)}\nwritten: {write(rows, kept)}")


@pytest.mark.parametrize("name", CASES)
def test_perturbation(benchmark, ledger, name):
    case = Case(*CASES[name])
    difference = case.verify()
    calls = {"ours": case.ours, "grad_cam": case.grad_cam}
    samples: dict[str, list[float]] = {key: [] for key in calls}

    def in_turn():
        keys = list(samples)
        if len(samples["ours"]) % 2:
            keys.reverse()
        for key in keys:
            samples[key].append(seconds(calls[key]))

    # One sample of pytest-benchmark's own is enough beside the interleaved ones.
    for _ in range(ROUNDS - 1):
        in_turn()
    benchmark.pedantic(case.ours, setup=in_turn, rounds=1)
    row = {
        "case": name,
        "network": CASES[name][0],
        "layer": CASES[name][1],
        "method": case.explainer.method.name,
        "largest_map_difference_from_grad_cam": difference,
        "median_ms": {key: statistics.median(values) * 1e3 for key, values in samples.items()},
        "grad_cam_over_ours": ratio(samples["grad_cam"], samples["ours"]),
        "samples_ms": {key: [round(value * 1e3, 3) for value in values] for key, values in samples.items()},
    }
    benchmark.extra_info.update({key: value for key, value in row.items() if key != "samples_ms"})
    ledger.append(row)


def table(rows: list[dict]) -> str:
    lines = [
        f"{conditions()['device']}, torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS} rounds",
        f"{'case':34} {'ours ms':>10} {'grad-cam ms':>12} {'grad-cam/ours':>14} {'aim':>6} {'map difference':>15}",
    ]
    lines += [
        f"{row['case']:34} {row['median_ms']['ours']:>10.1f} {row['median_ms']['grad_cam']:>12.1f} "
        f"{row['grad_cam_over_ours']:>14.2f} {row['grad_cam_over_ours'] / AIM - 1:>+6.0%} "
        f"{row['largest_map_difference_from_grad_cam']:>15.1e}"
        for row in rows
    ]
    return "\n".join(lines)


def write(rows: list[dict], kept: bool):
    facts = {**conditions(), "rounds": ROUNDS, "freed_memory_is_kept": kept}
    device = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-").lower()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"perturbation-{facts['kind']}-{device}-{facts['commit']}.json"
    file.write_text(json.dumps({"conditions": facts, "aim": AIM, "cases": rows}, indent=1) + "\n")
    return file
