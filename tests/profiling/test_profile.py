"""Profiles: what is measured, that nothing stays behind, and what two of them say of each other."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from shapleycam import Explainer, InputError
from shapleycam.profiling import Case, Profile, Row, Stage, compare, load, profile, profile_cases
from shapleycam.profiling.compare import judge
from shapleycam.profiling.measure import dispatched, peak_bytes
from shapleycam.profiling.result import quantile
from shapleycam.profiling.stages import STAGES

from ..helpers import network, toy

CPU = torch.device("cpu")


@pytest.fixture(name="x")
def _x():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def state(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return hooks, [m.training for m in model.modules()], [(p.requires_grad, p.grad) for p in model.parameters()]


@pytest.mark.parametrize("build", [lambda: network(curved=False), toy], ids=["pooled", "curved"])
def test_stages_add_up_and_nothing_stays_behind(build, x):
    model = build()
    explainer = Explainer(model)
    before, raw = state(model), explainer(x).raw
    found = profile(explainer, x, rounds=4)
    assert state(model) == before and "_derive" not in vars(explainer)
    assert torch.equal(explainer(x).raw, raw)
    [row] = found.rows
    assert [stage.name for stage in row.stages] == [name for name in STAGES if name != "copy to host"]
    assert all(len(stage.seconds) == 4 and min(stage.seconds) > 0 for stage in row.stages)
    assert len(row.forward) == len(row.explanation) == 4
    for k in range(4):
        assert row.explanation[k] == pytest.approx(sum(stage.seconds[k] for stage in row.stages))
    assert (row.engine, row.backend) == (explainer(x).diagnostics.engine, explainer(x).diagnostics.backend)
    assert row.limit > 0 and row.over_forward > 0 and row.operators[0] > row.operators[1] > 0
    assert found.conditions["torch"] == torch.__version__ and found.conditions["device_type"] == "cpu"


def test_bytes_are_those_of_the_tensors(x):
    model = network(curved=False)
    explainer = Explainer(model)
    explanation = explainer(x)
    activations = 2 * 12 * explanation.raw[0].numel() * 4  # [N, C, S] in float32
    stages = {stage.name: stage for stage in profile(explainer, x, rounds=3).rows[0].stages}
    raw, heatmaps, pixels = explanation.raw.nbytes, explanation.heatmaps().nbytes, x.nbytes
    assert stages["weighted reduce"].bytes == activations + raw
    assert stages["display map"].bytes == raw + heatmaps
    assert stages["overlay"].bytes == pixels + heatmaps + 2 * 16 * 16 * 3
    assert stages["trunk"].bytes is None and stages["trunk"].bandwidth is None
    bare = profile(explainer, x, rounds=3, display=False, overlay=False).rows[0]
    assert [stage.name for stage in bare.stages] == ["trunk", "head", "derivative", "weighted reduce"]


def test_later_passes_are_the_derivatives_own(monkeypatch):
    """On a clock that the model itself moves: a second for its trunk, a millisecond for its head."""
    model, x, now = network(curved=True), torch.randn(2, 3, 20, 20), [0]
    passes = []

    def moves(nanoseconds):
        return lambda *_: now.__setitem__(0, now[0] + nanoseconds)

    model[0].register_forward_hook(moves(10**9))
    model[3].register_forward_hook(moves(10**6))
    model.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr("shapleycam.profiling.stages.time.perf_counter_ns", lambda: now[0])
    monkeypatch.setattr("shapleycam.profiling.measure.copy_bandwidth", lambda device: 1e9)
    for layers, method, options, where in (
        ("2", "shapleycam", {"engine": "quadrature", "nodes": 4, "chunk": 1}, "derivative"),
        (["1", "2"], "shapleycam-h", {"engine": "quadrature", "nodes": 2}, "derivative"),
        ("2", "scorecam", {}, "weighted reduce"),
        ("2", "shapleycam", {}, None),
    ):
        explainer = Explainer(model, layers, method, **options)
        explainer(x)
        passes.clear()
        explainer(x)
        count = len(passes)
        assert (count > 1) == (where is not None), "more than one pass, or this says nothing"
        stages = {stage.name: set(stage.seconds) for stage in profile(explainer, x, rounds=3).rows[0].stages}
        assert stages["trunk"] == {1.0} and stages["head"] == {0.001}
        for name in ("derivative", "weighted reduce"):
            [seconds] = stages[name]
            assert seconds == pytest.approx((count - 1) * 1.001 if name == where else 0.0), (method, name)


def test_bytes_of_a_method_that_masks_images_are_those_of_the_images():
    model, x = network(curved=True), torch.randn(2, 3, 20, 20)
    stages = {stage.name: stage for stage in profile(Explainer(model, "2", "scorecam"), x, rounds=3).rows[0].stages}
    assert stages["weighted reduce"].bytes == 2 * 12 * 10 * 10 * 4 + 2 * 10 * 10 * 4


def test_inputs_by_keyword_and_volumes():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = toy()

        def forward(self, *, pixel_values):
            return self.net(pixel_values)

    assert profile(Explainer(Keyword().eval(), images_as="pixel_values"), torch.randn(2, 3, 8, 8), rounds=3).rows
    torch.manual_seed(0)
    pooled = (nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(7, 3))
    volumes = nn.Sequential(nn.Conv3d(3, 7, 3), nn.ReLU(), *pooled).eval()
    stages = profile(Explainer(volumes, "1"), torch.randn(2, 3, 6, 8, 8), rounds=3).rows[0].stages
    assert "overlay" not in {stage.name for stage in stages}


def test_an_exception_leaves_no_hook(x):
    model = toy()
    explainer = Explainer(model)
    explainer(x)
    before = state(model)
    handle = model[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        profile(explainer, x, rounds=3)
    handle.remove()
    assert state(model) == before


def test_an_explainer_that_is_not_profiled_knows_nothing_of_it():
    """Overhead when off: none, as none of the code is there."""
    script = (
        "import sys, torch, shapleycam\n"
        "m = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), "
        "torch.nn.Linear(4, 3)).eval()\n"
        "shapleycam.Explainer(m)(torch.randn(2, 3, 8, 8)).overlay(torch.rand(2, 3, 8, 8))\n"
        "assert not [name for name in sys.modules if 'shapleycam.profiling' in name]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_cases_take_turns_and_other_calls_are_timed_as_a_whole(x):
    order, explainer = [], Explainer(toy())
    cases = [Case(explainer, x, names={"n": n}, call=lambda n=n: order.append(n)) for n in range(3)]
    steps = []
    found = profile_cases(cases, rounds=3, warmup=1, step=lambda: steps.append(1))
    assert order[:12] == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2] and len(steps) == 12
    assert [row.label for row in found.rows] == ["0", "1", "2"]
    assert [[stage.name for stage in row.stages] for row in found.rows] == [["call"]] * 3
    assert found.rows[0].engine is None


def test_peak_memory_and_operators_are_counted():
    held = []

    def call():
        a = torch.ones(1 << 18)  # 1 MiB
        held.append(None)
        del a
        torch.ones(1 << 17)

    assert peak_bytes(call, CPU) == 1 << 20
    assert dispatched(lambda: torch.ones(3) + torch.ones(3), CPU) == 3


def test_a_trace_names_the_stages(x, tmp_path):
    file = tmp_path / "trace.json"
    profile(Explainer(toy()), x, rounds=3, trace=file)
    names = {event.get("name") for event in json.loads(file.read_text())["traceEvents"]}
    assert names >= set(STAGES) - {"copy to host"}
    with pytest.raises(InputError, match="trace cannot be written to"):
        profile(Explainer(toy()), x, rounds=3, trace=tmp_path)
    with pytest.raises(InputError, match=r"trace cannot be written to .*missing"):
        profile(Explainer(toy()), x, rounds=3, trace=tmp_path / "missing" / "t.json")


def test_bad_input(x):
    explainer = Explainer(toy())
    with pytest.raises(InputError, match="rounds must be 3 or more, got 2"):
        profile(explainer, x, rounds=2)
    with pytest.raises(InputError, match=r"got 3\.5"):
        profile(explainer, x, rounds=3.5)
    with pytest.raises(InputError, match="images must be a torch.Tensor, got list"):
        profile(explainer, [1])
    with pytest.raises(InputError, match="nothing to profile"):
        profile_cases([])
    with pytest.raises(InputError, match="on one device, got cpu, meta"):
        profile_cases([Case(explainer, x), Case(explainer, x.to("meta"))])


def row(label="a", explanation=(2.0, 2.0, 2.0), forward=(1.0, 1.0, 1.0), **stages):
    made = tuple(Stage(name, seconds, None) for name, seconds in (stages or {"call": explanation}).items())
    return Row({"name": label}, None, None, tuple(forward), tuple(explanation), made, 1e9, (1, 1), (1, 1))


def test_it_can_be_saved_and_read(tmp_path, x):
    found = profile(Explainer(toy()), x, rounds=3)
    assert load(found.save(tmp_path / "p.json")) == found
    file = tmp_path / "other.json"
    odd = json.loads((tmp_path / "p.json").read_text())
    odd["rows"][0]["forward"].pop()
    for content, message in (
        (json.dumps(odd), "no JSON document.*not as many"),
        ("{", "no JSON document"),
        ("[]", "no JSON document"),
        (json.dumps({"kind": "shapleycam profile", "layout": 99, "rows": []}), "no profile of layout 1"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            load(file)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load(tmp_path / "absent.json")


def test_quantiles():
    samples = [float(k) for k in range(1, 101)]
    assert [quantile(samples, share) for share in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert quantile([3.0], 0.9) == 3.0
    stage = Stage("a", (4.0, 1.0, 2.0, 3.0), 8)
    assert (stage.p50, stage.p90, stage.bandwidth) == (2.5, 4.0, 8 / 2.5)


def test_verdicts():
    generator = torch.Generator().manual_seed(0)

    def noisy(middle, spread, count=30):
        return (middle * (1 + spread * torch.randn(count, generator=generator, dtype=torch.float64))).tolist()

    steady = noisy(1.0, 0.005)
    assert judge("a", steady, noisy(1.1, 0.005), 0.02).word == "SLOW"
    assert judge("a", steady, noisy(0.9, 0.005), 0.02).word == "FAST"
    assert judge("a", steady, noisy(1.002, 0.005), 0.02).word == "SAME"
    assert judge("a", noisy(1.0, 0.3), noisy(1.05, 0.3), 0.02).word == "UNCLEAR"
    outlier = judge("a", steady, [*noisy(1.0, 0.005), 50.0], 0.02)
    assert outlier.word == "SAME" and outlier.ratio == pytest.approx(1, abs=0.01)


def test_a_machine_that_became_slower_as_a_whole_changes_nothing():
    old = Profile((row(explanation=(2.0, 2.1, 2.0, 2.0), forward=(1.0, 1.05, 1.0, 1.0), call=(2.0,) * 4), row("gone")))
    new = Profile((row(explanation=(6.0, 6.3, 6.0, 6.0), forward=(3.0, 3.15, 3.0, 3.0), call=(6.0,) * 4), row("new")))
    assert [(v.label, v.word, v.ratio) for v in compare(old, new)] == [
        ("a explanation", "SAME", pytest.approx(1.0)),
        ("a call", "SAME", pytest.approx(1.0)),
    ]
    with pytest.raises(InputError, match="no case in common"):
        compare(old, Profile((row("other"),)))
    slower = replace(new.rows[0], explanation=tuple(1.2 * s for s in new.rows[0].explanation))
    assert compare(old, Profile((slower,)))[0].word == "SLOW"
