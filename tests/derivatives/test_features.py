"""More classes than features: the features' derivatives combined must be the classes' own."""

import pytest
import torch
from torch import nn

from shapleycam import UTILITIES, Explainer
from shapleycam.derivatives import autograd, features
from shapleycam.model.inputs import Inputs

from ..helpers import Attend, Split, Tokens

CLASSES = 13


def heads(wide=CLASSES):
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    conv = nn.Conv2d(3, 6, 1)
    return {
        "attention-norm": (
            nn.Sequential(conv, Tokens()),
            nn.Sequential(nn.LayerNorm(6), Attend(6), nn.LayerNorm(6), nn.Linear(6, wide)),
        ),
        "conv-bn-silu": (
            conv,
            nn.Sequential(nn.Conv2d(6, 7, 3, padding=1), nn.BatchNorm2d(7), nn.SiLU(), *pooled, nn.Linear(7, wide)),
        ),
        "gelu-mlp": (conv, nn.Sequential(nn.Flatten(), nn.Linear(96, 9), nn.GELU(), nn.Linear(9, wide))),
        # The features are linear in A, so that all curvature is the utility's.
        "linear": (conv, nn.Sequential(nn.Conv2d(6, 4, 2), *pooled, nn.Linear(4, wide, bias=False))),
    }


def model_of(name):
    torch.manual_seed(1)
    return Split(*heads()[name]).double().eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(3)).double()


def cube(outputs, targets):
    return outputs.gather(1, targets[:, None])[:, 0] ** 3


TARGETS = torch.stack([torch.arange(CLASSES), torch.arange(CLASSES).flip(0), torch.full((CLASSES,), 2)])


def answers(model, images, targets, layer="target", **options):
    """What the engine gives by way of the features, and class by class."""
    explainer = Explainer(model, layer, **options)
    plan = explainer.prepare(images)
    request = plan.request(explainer._settings, Inputs(images), targets)
    return features.reverse_over_reverse(request), autograd.reverse_over_reverse(request)


def passes(monkeypatch):
    """How many passes are made through the head, appended as they are."""
    made, whole = [], autograd.differentiate
    monkeypatch.setattr(autograd, "differentiate", lambda *a, **k: made.append(a[0].shape) or whole(*a, **k))
    return made


@pytest.mark.parametrize("method", ["shapleycam", "gradcam"])
@pytest.mark.parametrize("utility", [*UTILITIES, cube], ids=lambda u: u if isinstance(u, str) else u.__name__)
@pytest.mark.parametrize("name", heads())
@pytest.mark.filterwarnings("ignore::shapleycam.ShapleyCamWarning")
def test_equals_one_class_after_the_other(name, utility, method, images, monkeypatch):
    model = model_of(name)
    made = passes(monkeypatch)
    explainer = Explainer(model, "target", method, utility)
    plan = explainer.prepare(images)
    request = plan.request(explainer._settings, Inputs(images), TARGETS)
    made.clear()
    found = features.reverse_over_reverse(request)
    assert len(made) == model.head[-1].in_features < CLASSES
    expected = autograd.reverse_over_reverse(request)
    assert torch.equal(found.targets, expected.targets) and torch.equal(found.logits, expected.logits)
    [term], [other] = found.terms, expected.terms
    g, h = torch.stack(term.gradients), term.hvps
    torch.testing.assert_close(g, torch.stack(other.gradients), rtol=1e-9, atol=1e-12)
    if method == "gradcam" or (name == "linear" and utility == "logit"):
        assert not any(part is not None and part.any() for part in (*h, *other.hvps))
        return
    torch.testing.assert_close(torch.stack(h), torch.stack(other.hvps), rtol=1e-9, atol=1e-12)
    assert torch.stack(h).norm() > 1e-3 * g.norm(), "a head without curvature proves nothing"


def test_of_several_layers(images):
    model = model_of("conv-bn-silu")
    found, expected = answers(model, images, TARGETS, ["target", "head.0"])
    for term, other in zip(found.terms, expected.terms, strict=True):
        torch.testing.assert_close(torch.stack(term.gradients), torch.stack(other.gradients), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.stack(term.hvps), torch.stack(other.hvps), rtol=1e-9, atol=1e-12)


def test_the_maps_of_all_classes_are_those_of_each(images, monkeypatch):
    model = model_of("attention-norm")
    explainer = Explainer(model, "target", "shapleycam-e")
    explainer.prepare(images)
    made = passes(monkeypatch)
    every = explainer(images, TARGETS, with_norms=True)
    assert len(made) == 6
    for m in range(CLASSES):
        one = explainer(images, TARGETS[:, m], with_norms=True)
        torch.testing.assert_close(every.raw[:, m], one.raw, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(every.hvp_ratio[:, m], one.hvp_ratio, rtol=1e-6, atol=1e-9)


def test_an_image_with_nan_fails_alone(images):
    model = model_of("conv-bn-silu")
    images[1, 0, 0, 0] = float("nan")
    explainer = Explainer(model, "target")
    explainer.prepare(images.nan_to_num())
    with pytest.warns(UserWarning, match=r"images \[1\] are not finite"):
        every = explainer(images, TARGETS)
    torch.testing.assert_close(every.raw[[0, 2]], explainer(images[[0, 2]], TARGETS[[0, 2]]).raw, rtol=1e-9, atol=1e-12)


class Halve(nn.Module):
    """Writes into the logits behind the classifier."""

    def forward(self, z):
        return z.mul_(0.5)


class Also(nn.Module):
    """Returns more than the logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        z = self.model(images)
        return {"logits": z, "scale": z.square().mean(1)}


def scaled(outputs, targets):
    return outputs["logits"].gather(1, targets[:, None])[:, 0] * outputs["scale"]


def cases():
    model = model_of("gelu-mlp")
    model.head.append(Halve().eval())
    yield "written", model, "target", "rest"
    model = model_of("gelu-mlp")
    model.head[-1].register_forward_hook(lambda module, args, z: z * 3)
    yield "hooked", model, "target", "rest"
    yield "more than the logits", Also(model_of("gelu-mlp")).eval(), "model.target", scaled
    model = model_of("gelu-mlp")
    model.register_module("unused", nn.Linear(2, CLASSES).double().eval())
    yield "another layer is the last", model, "target", "rest"


@pytest.mark.parametrize(("model", "layer", "utility"), [pytest.param(*case, id=name) for name, *case in cases()])
def test_goes_class_by_class_where_the_features_do_not_tell_all(model, layer, utility, images, monkeypatch):
    explainer = Explainer(model, layer, utility=utility)
    plan = explainer.prepare(images)
    request = plan.request(explainer._settings, Inputs(images), TARGETS)
    made = passes(monkeypatch)
    found = features.reverse_over_reverse(request)
    assert len(made) == CLASSES
    expected = autograd.reverse_over_reverse(request)
    torch.testing.assert_close(found.terms[0].gradients, expected.terms[0].gradients, rtol=0, atol=0)


def test_few_classes_go_class_by_class(images, monkeypatch):
    explainer = Explainer(model_of("gelu-mlp"), "target")
    explainer.prepare(images)
    made = passes(monkeypatch)
    explainer(images, TARGETS[:, :9])
    assert len(made) == 9


def test_the_model_is_left_as_found(images):
    model = model_of("attention-norm")
    hooks = lambda: [len(module._forward_hooks) for module in model.modules()]
    before = hooks()
    Explainer(model, "target")(images, TARGETS)
    assert hooks() == before and all(p.grad is None for p in model.parameters()) and torch.is_grad_enabled()
