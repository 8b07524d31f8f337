"""What the ADCC evaluation costs: batched, against the authors' way (one image and one method at a time).

    python -m pytest bench/test_metrics.py

The authors' loop, per image and method, at batch 1: explain x (forward and backward), then p of x, x·M and x·(1 - M), then
explain x·M; five forward passes. It is run here with pytorch-grad-cam, which ships the same authors' ShapleyCAM, and with this
package's own explainer, so that the gain of the batching and sharing is told apart from that of the derivatives. Rounds are
interleaved; the figures are medians of the rounds' ratios. The aim is printed and asserts nothing.
All of it, the authors' loop too, runs with the allocator that ``shapleycam evaluate`` sets up, unless the environment tunes it
(an empty ``GLIBC_TUNABLES=`` leaves it as it is). ``SHAPLEYCAM_BENCH_ROUNDS`` sets the rounds (default 5),
``SHAPLEYCAM_BENCH_BATCH`` the batch (default 16).

The results go to ``bench/results/metrics-<kind>-<device>-<commit>.json``.
"""

import json
import os
import re
import statistics

import pytest

pytest.importorskip("pytorch_grad_cam")
pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("torchmetrics")

import numpy as np
import pytorch_grad_cam
import torch

from shapleycam import Explainer
from shapleycam.cli import keep_freed_memory
from shapleycam.cli.demo import photographs
from shapleycam.data.images import read_image
from shapleycam.methods import PAPER_METHODS
from shapleycam.metrics import ADCC, measure
from shapleycam.model.zoo import load_classifier

from .test_explain import DEVICE, RESULTS, Rest, conditions, seconds

ROUNDS = int(os.environ.get("SHAPLEYCAM_BENCH_ROUNDS", "5"))
BATCH = int(os.environ.get("SHAPLEYCAM_BENCH_BATCH", "16"))
AIM = 5.0


class Case:
    """The embedded network on the demo's photographs, each several times with a little noise."""

    def __init__(self) -> None:
        classifier = load_classifier(device=DEVICE)
        self.model = classifier.model
        views = torch.stack([classifier.preprocess.view(read_image(path)) for path in photographs()])
        images = classifier.preprocess.normalise(views)
        images = images.repeat(-(-BATCH // len(images)), 1, 1, 1)[:BATCH]
        self.images = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).to(DEVICE)
        self.explainer = Explainer(self.model, layer="features")
        self.singles = {name: Explainer(self.model, layer="features", method=name) for name in PAPER_METHODS}
        self.rival = pytorch_grad_cam.ShapleyCAM(self.model, [self.model.features])

    def forward(self):
        with torch.inference_mode():
            return self.model(self.images)

    def ours(self, methods=("shapleycam",)):
        tables = {name: ADCC().to(DEVICE) for name in methods}
        for name, measured in measure(self.explainer, self.images, methods=methods).items():
            tables[name].update(*measured.tensors)
        return {name: {key: float(value) for key, value in table.compute().items()} for name, table in tables.items()}

    def eleven(self):
        return self.ours(PAPER_METHODS)

    def loop(self, explain):
        """The authors' way with ``explain(x, c) -> numpy map``."""
        rows = []
        for n in range(len(self.images)):
            x = self.images[n : n + 1]

            def chance(x, c=None):
                with torch.no_grad():
                    p = self.model(x).softmax(1)[0]
                return (int(p.argmax()), float(p.max())) if c is None else float(p[c])

            c, p = chance(x)
            m = explain(x, c)
            mask = torch.from_numpy(m).to(x)[None, None]
            kept, deleted = chance(x * mask, c), chance(x * (1 - mask), c)
            y = np.corrcoef(m.reshape(-1), explain(x * mask, c).reshape(-1))[0, 1]
            coherency = (y + 1) / 2 if np.isfinite(y) else 0.0
            rows.append((max(0, p - kept) / p, coherency, np.abs(m).mean(), kept > p, max(0, p - deleted) / p))
        ad, coh, com, ic, add = np.mean(np.array(rows, np.float64), 0)
        adcc = 3 / (1 / coh + 1 / (1 - com) + 1 / (1 - ad))
        return {"AD": ad, "Coh": coh, "Com": com, "ADCC": adcc, "IC": ic, "ADD": add}

    def authors(self):
        return self.loop(lambda x, c: self.rival(x, [Rest(c)])[0])

    def one_by_one(self, name="shapleycam"):
        return self.loop(lambda x, c: self.singles[name](x, c).heatmaps()[0].cpu().numpy())

    @property
    def calls(self):
        return {
            "forward": self.forward,
            "ours": self.ours,
            "ours_eleven": self.eleven,
            "authors": self.authors,
            "authors_loop_with_our_explainer": self.one_by_one,
        }


def test_metrics(benchmark, request):
    kept = keep_freed_memory()
    case = Case()
    ours, theirs = case.ours()["shapleycam"], case.authors()
    difference = max(abs(ours[key] - theirs[key]) for key in ours)
    if not difference < 1e-4:
        pytest.fail(f"the tables differ by {difference}: a wrong result is not timed")
    samples: dict[str, list[float]] = {key: [] for key in case.calls}
    passes = []
    hook = case.model.register_forward_hook(lambda *_: passes.append(1))
    case.eleven()
    passes.clear()
    case.eleven()
    eleven_passes = len(passes)
    hook.remove()

    def in_turn():
        keys = list(samples)
        turn = len(samples["forward"]) % len(keys)
        for key in keys[turn:] + keys[:turn]:
            samples[key].append(seconds(case.calls[key]))

    benchmark.pedantic(case.ours, setup=in_turn, rounds=ROUNDS)
    median = {key: statistics.median(values) for key, values in samples.items()}

    def ratio(a, b):
        return statistics.median(x / y for x, y in zip(samples[a], samples[b], strict=True))

    row = {
        "batch": BATCH,
        "freed_memory_is_kept": kept,
        "largest_difference_of_the_tables": difference,
        "median_seconds": median,
        "authors_over_ours": ratio("authors", "ours"),
        "loop_with_our_explainer_over_ours": ratio("authors_loop_with_our_explainer", "ours"),
        # eleven runs of the authors' loop against one of ours; the loop is timed for ShapleyCAM
        "authors_eleven_over_ours_eleven": 11 * ratio("authors", "ours_eleven"),
        "ours_over_forward": ratio("ours", "forward"),
        "ours_eleven_over_forward": ratio("ours_eleven", "forward"),
        "forward_passes_for_eleven": eleven_passes,
        "eleven_over_its_forward_passes": ratio("ours_eleven", "forward") / eleven_passes,
        "aim_authors_over_ours": AIM,
        "samples_seconds": samples,
    }
    facts = {**conditions(), "rounds": ROUNDS}
    device = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-").lower()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"metrics-{facts['kind']}-{device}-{facts['commit']}.json"
    file.write_text(json.dumps({"conditions": facts, "case": row}, indent=1) + "\n")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        shown = {key: value for key, value in row.items() if key != "samples_seconds"}
        print(f"\n{json.dumps(shown, indent=1)}\nwritten: {file}")
