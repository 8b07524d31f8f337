"""A model that is edited between two calls: the next map is the edited model's, as float64 autograd says, or NaN."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from shapleycam import Explainer, InputError, LayerError, ModelStateError, TargetError

from .helpers import Split


class GeM(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return a.clamp_min(1e-6).pow(3).mean((2, 3)).pow(1 / 3)


class SquareMean(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return a.square().mean((2, 3))


class Net(nn.Module):
    """A curved trunk, then a pool and a linear layer, as attributes that a user would replace."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU())
        self.avgpool: nn.Module = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc: nn.Module = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.flatten(self.avgpool(self.layer(x))))
        return out


def reference(model: nn.Module, layer: nn.Module, images: Tensor, targets: Tensor, method: str = "shapleycam-h") -> Tensor:
    """Σ_c w·A in float64 by plain autograd on a copy of the model, without the package."""
    double = copy.deepcopy(model).double().eval()
    place = dict(double.named_modules())[next(name for name, module in model.named_modules() if module is layer)]
    kept: list[Tensor] = []

    def leaf(module: nn.Module, args: object, output: Tensor) -> Tensor:
        kept.append(output.detach().clone().requires_grad_(True))
        return kept[-1].clone()

    handle = place.register_forward_hook(leaf)
    z = double(images.double())
    handle.remove()
    [a] = kept
    u = (z + z.log_softmax(1)).gather(1, targets[:, None]).sum()
    (g,) = torch.autograd.grad(u, a, create_graph=True)
    if method == "hirescam":
        return (g * a).sum(1).detach()
    (h,) = torch.autograd.grad((g * a.detach()).sum(), a)
    return ((g - h / 2) * a).sum(1).detach()


@pytest.fixture(name="x")
def _x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


T = torch.tensor([1, 3])


@pytest.mark.parametrize("method", ["shapleycam-h", "hirescam"])
@pytest.mark.parametrize("pool", [GeM, SquareMean, lambda: nn.AdaptiveMaxPool2d(1)], ids=["gem", "square", "max"])
def test_a_pool_that_was_replaced(pool, method: str, x: Tensor) -> None:
    model = Net().eval()
    explainer = Explainer(model, "layer", method)
    assert explainer(x, T).diagnostics.engine == "closed_form"
    before = reference(model, model.layer, x, T, method)
    model.avgpool = pool().eval()
    expected = reference(model, model.layer, x, T, method)
    assert (expected - before).norm() > 0.2 * expected.norm(), "the edit must matter"
    result = explainer(x, T)
    torch.testing.assert_close(result.raw.double(), expected, rtol=1e-4, atol=1e-5)
    assert result.diagnostics.engine == "reverse_over_reverse"
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    torch.testing.assert_close(explainer(x, T).raw.double(), before, rtol=1e-4, atol=1e-5)
    assert explainer(x, T).diagnostics.engine == "closed_form"


def test_a_pool_whose_forward_was_replaced_is_seen_in_what_the_classifier_reads(x: Tensor) -> None:
    """No module changes, so the tree says nothing."""
    model = Net().eval()
    explainer = Explainer(model, "layer", "shapleycam-h")
    explainer(x, T)
    model.avgpool.forward = SquareMean().forward  # type: ignore[method-assign]
    expected = reference(model, model.layer, x, T)
    torch.testing.assert_close(explainer(x, T).raw.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_change_that_cannot_be_waited_for_marks_the_images(x: Tensor) -> None:
    """On an accelerator nothing is waited for: what the classifier read of a known shape decides over NaN, image by image."""
    from shapleycam.model.capture import Capture
    from shapleycam.model.inputs import Inputs

    model = Net().eval()
    plan = Explainer(model, "layer").prepare(x)
    assert plan.facts.pooled is not None
    with Capture(model, plan.layers, gradients=False, linear=plan.facts.pooled.linear) as capture:
        logits = capture.run(Inputs(x))
    a = capture.layers[0].activations
    assert a is not None
    view = a.flatten(2)
    assert plan.facts.pooled.still_holds(capture, logits, view) is None
    assert plan.facts.pooled.differs(capture.linear_calls[0][0], view).tolist() == [False, False]
    changed = view.clone()
    changed[1] += 1
    assert plan.facts.pooled.differs(capture.linear_calls[0][0], changed).tolist() == [False, True]


@pytest.mark.parametrize("added", [lambda: nn.BatchNorm2d(6), lambda: nn.Dropout(0.5)], ids=["batch norm", "dropout"])
def test_a_module_added_in_training_mode_is_refused(added, x: Tensor) -> None:
    model = Net().eval()
    explainer = Explainer(model, "layer")
    explainer(x)
    model.layer.append(added())
    with pytest.raises(ModelStateError, match=r"training mode \(layer\.2\)"):
        explainer(x)
    model.eval()
    expected = reference(model, model.layer, x, T, "hirescam")
    torch.testing.assert_close(Explainer(model, "layer", "hirescam")(x, T).raw.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_replaced_by_a_larger_one_allows_its_classes(x: Tensor) -> None:
    model = Net().eval()
    explainer = Explainer(model, "layer", "shapleycam-h")
    explainer(x, 4)
    with pytest.raises(TargetError, match="the model has 5 classes"):
        explainer(x, 5)
    model.fc = nn.Linear(6, 9)
    expected = reference(model, model.layer, x, torch.tensor([8, 8]))
    torch.testing.assert_close(explainer(x, 8).raw.double(), expected, rtol=1e-4, atol=1e-5)
    model.fc.weight = nn.Parameter(torch.randn(11, 6))
    model.fc.bias = nn.Parameter(torch.randn(11))
    expected = reference(model, model.layer, x, torch.tensor([10, 10]))
    torch.testing.assert_close(explainer(x, 10).raw.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("named", ["name", "module"])
def test_a_layer_that_was_replaced_is_found_again_by_its_name(named: str, x: Tensor) -> None:
    model = Net().eval()
    explainer = Explainer(model, "layer" if named == "name" else model.layer, "shapleycam-h")
    explainer(x, T)
    model.layer = nn.Sequential(nn.Conv2d(3, 6, 5, stride=2), nn.Tanh())
    expected = reference(model, model.layer, x, T)
    torch.testing.assert_close(explainer(x, T).raw.double(), expected, rtol=1e-4, atol=1e-5)
    del model.layer
    model.trunk = nn.Conv2d(3, 6, 1)
    with pytest.raises(LayerError, match="No layer 'layer'"):
        explainer(x, T)


def test_a_window_that_no_longer_spans_the_map(x: Tensor) -> None:
    """AvgPool2d(5) of a map of 5 x 5 is its mean, of a map of 9 x 9 its corner's."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.AvgPool2d(5), nn.Flatten(), nn.Linear(6, 4))
    model = Split(nn.Sequential(nn.Conv2d(3, 6, 4), nn.SiLU()), head).eval()
    explainer = Explainer(model, "target", "hirescam")
    large = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(4))
    for images in (x, large, x):
        expected = reference(model, model.target, images, T, "hirescam")
        torch.testing.assert_close(explainer(images, T).raw.double(), expected, rtol=1e-4, atol=1e-5)
    assert (expected != 0).all() and (reference(model, model.target, large, T, "hirescam")[:, 6:] == 0).all()


def test_means_that_cancel_are_still_means() -> None:
    """Behind an instance norm every mean is rounding error; that must not look like another pool."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    model = Split(nn.Sequential(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6)), head).eval()
    x = torch.randn(2, 3, 40, 40)
    explainer = Explainer(model, "target")
    assert [explainer(x).diagnostics.engine for _ in range(2)] == ["closed_form"] * 2


def test_an_operator_that_begins_to_write_into_the_layers_output(x: Tensor) -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.Tanh())
    model = Split(nn.Conv2d(3, 6, 3), head).eval()
    for method in ("shapleycam-h", "hirescam"):
        explainer = Explainer(model, "target", method)
        model.head[0].inplace = False
        explainer(x, T)
        model.head[0].inplace = True
        model_out = copy.deepcopy(model)
        model_out.head[0].inplace = False
        expected = reference(model_out, model_out.target, x, T, method)
        torch.testing.assert_close(explainer(x, T).raw.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_stem_is_checked_in_calls_after_compare(x: Tensor) -> None:
    explainer = Explainer(Net().eval(), "layer", "gradcam")
    explainer.compare(x, methods=["shapleycam"])
    with pytest.raises(InputError, match="images must have 3 channels"):
        explainer(torch.randn(2, 4, 8, 8))
    with pytest.raises(InputError, match=r"images.to\(torch.float32\)"):
        explainer(x.double())


def test_settings_are_read_only(x: Tensor) -> None:
    explainer = Explainer(Net().eval(), "layer")
    for name in ("model", "method", "utility", "engine", "backend"):
        with pytest.raises(AttributeError):
            setattr(explainer, name, getattr(explainer, name))
