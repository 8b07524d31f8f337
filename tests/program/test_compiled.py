"""Compiled programs: no graph breaks, the explainer's maps, and a model that nothing touches.

All but one go through dynamo and AOTAutograd with a backend that runs the graph as it is: the C++ compiler takes its time.
"""

import threading

import pytest
import torch
from torch import nn

from shapleycam import Explainer, ExportError, InputError
from shapleycam.program.graph import trace
from shapleycam.program.traced import TracedProgram

from ..helpers import Split, network, small_heads
from .test_traced import curved, images

TIGHT = {"rtol": 1e-9, "atol": 1e-12}
FAST = {"backend": "aot_eager"}


def deep(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Convolutions and batch normalisations before and behind the layer, one of which reads what others read too."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
            self.shared, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, affine=False)
            self.target = nn.Conv2d(6, 6, 1)  # its own output is explained, and so may not be normalised by
            self.after = nn.BatchNorm2d(6)
            self.last = nn.Sequential(nn.Conv2d(6, 5, 3, groups=1), nn.BatchNorm2d(5), nn.SiLU(), nn.AdaptiveAvgPool2d(1))

        def forward(self, x):
            y = self.shared(self.stem(x))
            return self.last(self.after(self.target(self.norm(y) + y))).flatten(1) * 3

    torch.manual_seed(0)
    model = Model().eval().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize(("head", "targets"), [("pool-linear", "given"), ("conv-bn-silu", "predicted"), ("attention", "given")])
def test_equal_to_the_explainer_without_breaks(head, targets):
    model, x = curved(head), images()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    explainer = Explainer(model, "target", backend="torch")
    compiled = explainer.compile(x, targets=targets, size="image", report=True, **FAST)  # fullgraph=True: a break is an error
    asked = torch.tensor([[0, 3], [1, 1], [2, 4], [4, 0], [3, 2]]) if targets == "given" else None
    expected, found = explainer(x, asked), compiled(x, asked)
    torch.testing.assert_close(found.raw, expected.raw, **TIGHT)
    torch.testing.assert_close(found.maps, expected.heatmaps(), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.targets, expected.targets)
    assert compiled.report.images == 5 and compiled.report.same_class == 1
    assert compiled.report.maps < 1e-9 and compiled.report.correlation > 1 - 1e-9
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) and tensor.stride() == strides[name]
    assert not model.target._forward_hooks and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        next(model.parameters()).mul_(-2)
    torch.testing.assert_close(compiled(x, asked).raw, found.raw, **TIGHT)  # its weights are its own


def test_folding_is_exact_and_where_it_may_be():
    model, x = deep(), images()
    graph = trace(model, "target", x, fold=True)
    # Of stem and last; not where the convolution's output is read twice, or is the target layer's own.
    assert sorted(name.removeprefix("folded_") for name in graph.constants) == ["0_bias", "0_kernel", "1_bias", "1_kernel"]
    norms = torch.ops.aten._native_batch_norm_legit_no_training.default
    assert len(graph.whole.module.graph.find_nodes(op="call_function", target=norms)) == 2
    explainer = Explainer(model, "target", backend="torch")
    expected = explainer(x)
    for fold in (True, False):
        found = explainer.compile(x, fold=fold, backend="eager")(x)
        torch.testing.assert_close(found.raw, expected.raw, **TIGHT)
        torch.testing.assert_close(found.logits, expected.logits, **TIGHT)


def test_half_precision_costs_what_the_report_says():
    model, x = deep(torch.float32), images(dtype=torch.float32)
    explainer = Explainer(model, "target")
    compiled = explainer.compile(x, dtype=torch.bfloat16, report=True, backend="eager")
    report, found = compiled.report, compiled(x)
    assert found.logits.dtype == torch.bfloat16 and found.raw.dtype == torch.float32
    assert all(t.dtype == torch.bfloat16 for t in compiled.program.trunk.buffers() if t.is_floating_point())
    expected = explainer(x)
    same = found.targets == expected.targets
    error = (found.raw - expected.raw).flatten(1).abs().amax(1) / expected.raw.flatten(1).abs().amax(1)
    assert 1e-4 < report.maps < 0.3 and report.maps == pytest.approx(float(error[same].max()), rel=1e-4)
    assert 0.9 < report.correlation < 1 and report.same_class == pytest.approx(float(same.float().mean()))
    assert next(model.parameters()).dtype == torch.float32


def test_what_it_refuses():
    model, x = network(), torch.randn(3, 3, 8, 8)
    explainer = Explainer(model, "2")
    compiled = explainer.compile(x, backend="eager")
    assert isinstance(compiled.program, TracedProgram) and "float32" in repr(compiled)
    with pytest.raises(InputError, match=r"images \[N, 3, 8, 8\]"):
        compiled(torch.randn(3, 3, 9, 9))
    with pytest.raises(InputError, match="without targets"):
        compiled(x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="dtype must be one of"):
        explainer.compile(x, dtype=torch.int8)
    with pytest.raises(ExportError, match="no_such_backend"):
        explainer.compile(x, backend="no_such_backend")


def test_a_wrong_compiler_is_noticed():
    def wrong(graph, example):
        def run(*args):
            return [part * 1.01 if part.ndim == 3 else part for part in graph(*args)]

        return run

    with pytest.raises(ExportError, match="maps are off by"):
        Explainer(network(), "2").compile(torch.randn(3, 3, 8, 8), backend=wrong)


def test_numbers_that_overflow_are_noticed():
    """The class that is predicted from NaN is another one, so that no map would be compared."""
    model, x = network(), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        model[0].weight *= 1e5
        model[0].bias *= 1e5
        model[5].weight *= 1e-5
        model[-1].bias[2] += 50  # argmax takes NaN for the largest: the class 0 is none that the explainer finds
    explainer = Explainer(model, "2")
    assert explainer(x).targets.tolist() == [2, 2, 2] and explainer(x).raw.isfinite().all()
    with pytest.raises(ExportError, match="maps are off by inf"):
        explainer.compile(x, backend="eager", dtype=torch.float16)


def test_maps_of_another_class_are_compared_with_the_maps_of_that_class():
    """In bfloat16 the two best classes change places; the maps of neither would be looked at."""
    model, x = network(), torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        model[-1].weight[1] = model[-1].weight[0]
        model[-1].bias[:2] = torch.tensor([40.01, 40.0])  # one number in bfloat16
    explainer = Explainer(model, "2")
    assert explainer(x).targets.tolist() == [0, 0, 0]

    def swapped(wrong):
        def backend(graph, example):
            def run(*args):
                found = [part.clone() for part in graph(*args)]
                logits = next(part for part in found if part.ndim == 2)
                logits[:, 1] += 0.02
                chosen = next(part for part in found if part.dtype == torch.int64)
                chosen.fill_(1)
                return [part * wrong if part.ndim == 3 else part for part in found]

            return run

        return backend

    report = explainer.compile(x, backend=swapped(1.0), dtype=torch.float16, report=True).report
    assert report.same_class == 0 and report.maps < 0.05
    with pytest.raises(ExportError, match="maps are off by"):
        explainer.compile(x, backend=swapped(-1.0), dtype=torch.float16)


def test_autocast_and_inference_mode_around_it():
    model, x = network(), torch.randn(3, 3, 8, 8)
    expected = Explainer(model, "2", backend="torch")(x)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        compiled = Explainer(model, "2", backend="torch").compile(x, backend="eager")
        within = compiled(x)
    for found in (within, compiled(x)):
        torch.testing.assert_close(found.raw, expected.raw)
        assert found.logits.dtype == torch.float32


def test_a_model_that_cannot_be_copied():
    model = network()
    model.lock = threading.Lock()
    with pytest.raises(ExportError, match="cannot be copied"):
        Explainer(model, "2").compile(torch.randn(2, 3, 8, 8), backend="eager")


def test_one_program_has_nothing_to_do_with_another():
    """torch.compile gives up after so many compilations of one function, which two programs are not to share."""
    x = torch.randn(2, 3, 8, 8)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            explainer = Explainer(network(curved=False), "2")
            torch.testing.assert_close(explainer.compile(x, backend="eager")(x).raw, explainer(x).raw)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["pool-linear", "conv-bn-silu"])
def test_inductor(head):
    model = Split(*small_heads()[head]).eval()
    x = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    explainer = Explainer(model, "target")
    compiled = explainer.compile(x, size="image", report=True)
    assert compiled.report.maps < 1e-5
    torch.testing.assert_close(compiled(x).maps, explainer(x).heatmaps(), rtol=1e-4, atol=1e-4)
