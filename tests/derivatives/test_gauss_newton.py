"""Engine gauss_newton: heads that are piecewise linear, against explicit float64 Hessians; and heads that are not."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shapleycam import UTILITIES, DerivativeError, Explainer

from ..helpers import Split, small_heads
from .test_engines import cube, derive, explicit

pytestmark = pytest.mark.filterwarnings("ignore::shapleycam.ShapleyCamWarning")

POOLED = (nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Residual(nn.Module):
    """A block that adds into its own output in place, as torchvision's do."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += x
        return F.relu_(out)


class Rearranged(nn.Module):
    """Convolutions of one and three dimensions, and by a name of padding."""

    def __init__(self):
        super().__init__()
        self.line, self.cube = nn.Conv1d(6, 4, 3, padding="same"), nn.Conv3d(1, 2, (2, 3, 3), padding=(0, 1, 1))

    def forward(self, a):
        line = self.line(a.flatten(2)).relu().mean(2)
        return torch.cat((line, self.cube(a[:, None]).relu().mean((2, 3, 4))), 1)


def heads():
    c = 6
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(c, 8))
    return {
        "relu-pool-linear": nn.Sequential(nn.ReLU(inplace=True), *POOLED, nn.Linear(c, 5)),
        "vgg": nn.Sequential(
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * c, 8),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(8, 5, bias=False),
        ),
        "residual": nn.Sequential(Residual(c), nn.Conv2d(c, 8, 3, stride=2, dilation=1), nn.ReLU6(), *POOLED, nn.Linear(8, 5)),
        "rearranged": nn.Sequential(Rearranged(), nn.Linear(6, 5)),
        "computed weight": nn.Sequential(*POOLED, normed, nn.LeakyReLU(), nn.Linear(8, 5)),
    }


def model_of(name, dtype=torch.float64):
    torch.manual_seed(1)
    head = heads()[name]
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model = Split(nn.Conv2d(3, 6, 1), head)
    for parameter in head[-1].parameters():
        parameter.data *= 4
    return model.to(dtype).eval()


@pytest.mark.parametrize("utility", [*UTILITIES, cube], ids=lambda u: u if isinstance(u, str) else u.__name__)
@pytest.mark.parametrize("name", heads())
def test_it_equals_the_explicit_hessian(name, utility, images):
    model, images = model_of(name), images.double()
    targets = torch.tensor([[0, 4], [1, 1], [3, 2]])
    _, g, h, layout = derive(model, images, targets, utility=utility, engine="gauss_newton")
    expected_g, expected_h = explicit(model, images, targets, utility, layout)
    torch.testing.assert_close(g, expected_g, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(h, expected_h, rtol=1e-9, atol=1e-12)
    if utility != "logit":
        assert h.norm() > 1e-2 * g.norm(), "a head without curvature proves nothing"


@pytest.mark.parametrize("method", ["shapleycam", "shapleycam-h", "shapleycam-x", "layercam", "gradcam"])
@pytest.mark.parametrize("name", heads())
def test_maps_norms_and_gaps_are_those_of_reverse_over_reverse(name, method, images):
    model, images = model_of(name), images.double()
    for targets in (None, torch.tensor([[0, 4, 2], [1, 1, 3], [3, 2, 0]])):
        for options in ({}, {"baseline": "mean"} if method in ("shapleycam", "shapleycam-h") else {}):
            one, other = (
                Explainer(model, "target", method, engine=engine, **options)(images, targets, with_gap=True)
                for engine in ("gauss_newton", "reverse_over_reverse")
            )
            torch.testing.assert_close(one.raw, other.raw, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(one.gap, other.gap, rtol=1e-9, atol=1e-11)
            assert one.raw.abs().max() > 1e-4
        one, other = (
            Explainer(model, "target", method, engine=engine)(images, targets, with_norms=True)
            for engine in ("gauss_newton", "reverse_over_reverse")
        )
        torch.testing.assert_close(one.hvp_ratio, other.hvp_ratio, rtol=1e-6, atol=1e-9)


def test_the_logits_are_those_of_the_model_to_the_bit(images):
    for name in heads():
        model = model_of(name, torch.float32)
        explanation = Explainer(model, "target", engine="gauss_newton")(images)
        assert explanation.diagnostics.engine == "gauss_newton"
        assert torch.equal(explanation.logits, model(images)) and not explanation.logits.requires_grad


def test_one_reverse_pass_and_one_forward_pass(images, monkeypatch):
    model = model_of("vgg")
    explainer = Explainer(model, "target", engine="gauss_newton")
    explainer(images.double())
    passes, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(k) or grad(*a, **k))
    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    explainer(images.double())
    handle.remove()
    assert len(passes) == 1 and not passes[0].get("create_graph") and runs == [1]


CURVED = {
    "conv-bn-silu": "SiluBackward",
    "pool-norm-linear": "NativeLayerNormBackward",
    "flatten-mlp": "GeluBackward",
    "attention": "BmmBackward|SoftmaxBackward|ScaledDotProduct",
}


@pytest.mark.parametrize("name", CURVED)
def test_curved_heads_are_refused_and_never_chosen(name, images):
    torch.manual_seed(1)
    target, head = small_heads()[name]
    model = Split(target, head).eval()
    assert Explainer(model, "target").prepare(images).engine == "reverse_over_reverse"
    with pytest.raises(DerivativeError, match=f"piecewise linear.*({CURVED[name]}).*engine='auto'"):
        Explainer(model, "target", engine="gauss_newton")(images)


class Head(nn.Module):
    """A function of the activations, then ReLU, mean and a linear layer."""

    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(6, 5)

    def forward(self, a):
        return 4 * self.linear(self.function(a).relu().mean((2, 3)))


def scaled(a):
    with torch.no_grad():
        size = a.abs().amax((1, 2, 3), keepdim=True)
    return a / size


def straight_through(a):
    with torch.no_grad():
        rest = (4 * a).round() / 4 - a
    return a + rest


def erased(a):
    a = a * 1
    with torch.no_grad():
        a[:, 0] = 0
    return a


@pytest.mark.parametrize("function", [scaled, straight_through, erased, torch.abs, lambda a: a.detach().mean() * a])
def test_what_is_constant_to_the_reverse_pass_is_so_to_the_forward_pass(function, images):
    torch.manual_seed(1)
    model, images = Split(nn.Conv2d(3, 6, 1), Head(function)).double().eval(), images.double()
    other = Explainer(model, "target", engine="reverse_over_reverse")(images, 1)
    for engine in ("gauss_newton", "forward_over_reverse"):
        one = Explainer(model, "target", engine=engine)(images, 1)
        torch.testing.assert_close(one.raw, other.raw, rtol=1e-9, atol=1e-12)
    assert other.raw.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a: a * F.hardsigmoid(a.mean((2, 3), keepdim=True) + 50), "MulBackward"),  # an open gate
        (lambda a: F.hardswish(60 * a), "HardswishBackward"),
        (lambda a: F.softplus(a + 200, threshold=20), "SoftplusBackward"),
        (lambda a: torch.where(a > 60, a * a, a), "MulBackward|WhereBackward"),
        (lambda a: (a - 50).relu() ** 2 + a, "PowBackward"),
        (lambda a: F.conv2d(a, a[:1, :, :1, :1]).expand(-1, 6, -1, -1), "ConvolutionBackward"),
        (lambda a: 1 / (a + 100), "Reciprocal|DivBackward"),
        (lambda a: F.batch_norm(a, None, None, training=True), "NativeBatchNormBackward"),
    ],
)
def test_curvature_in_corners_that_these_images_do_not_reach(function, message, images):
    torch.manual_seed(1)
    model, images = Split(nn.Conv2d(3, 6, 1), Head(function)).double().eval(), images.double()
    with pytest.raises(DerivativeError, match=message):
        Explainer(model, "target", engine="gauss_newton")(images, 1)
    assert Explainer(model, "target")(images, 1).diagnostics.engine == "reverse_over_reverse"


def test_in_place_on_a_view_may_hide_anything(images):
    def hidden(a):
        a = a * 1
        a[:, 0].sigmoid_()
        return a

    torch.manual_seed(1)
    model = Split(nn.Conv2d(3, 6, 1), Head(hidden)).double().eval()
    with pytest.raises(DerivativeError, match="CopySlices"):
        Explainer(model, "target", engine="gauss_newton")(images.double(), 1)


class Lopsided(torch.autograd.Function):
    """Its own derivatives contradict each other."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, back):
        return back

    @staticmethod
    def jvp(ctx, moved):
        return moved * 0


def hooked(a):
    a = a * 1
    if a.requires_grad:
        a.register_hook(lambda back: back * 0.5)
    return a


def test_forward_and_reverse_mode_are_held_against_each_other(images):
    torch.manual_seed(1)
    images = images.double()
    model = Split(nn.Conv2d(3, 6, 1), Head(hooked)).double().eval()
    with pytest.raises(DerivativeError, match="forward and reverse mode see different heads"):
        Explainer(model, "target", engine="gauss_newton")(images, 1)
    model = Split(nn.Conv2d(3, 6, 1), Head(Lopsided.apply)).double().eval()
    with pytest.raises(DerivativeError, match="Lopsided"):
        Explainer(model, "target", engine="gauss_newton")(images, 1)


def test_a_head_that_is_edited_in_place_is_noticed(images):
    torch.manual_seed(1)
    model, images = Split(nn.Conv2d(3, 6, 1), Head(lambda a: a * 2)).double().eval(), images.double()
    explainer = Explainer(model, "target", engine="gauss_newton")
    assert explainer(images, 1).raw.abs().max() > 0
    model.head.function = lambda a: a * a
    with pytest.raises(DerivativeError, match="MulBackward"):
        explainer(images, 1)


@pytest.mark.parametrize("outer", ["gauss_newton", "forward_over_reverse"])
def test_a_head_that_explains_something_itself_does_not_wait_for_ever(outer, images):
    inner = Explainer(model_of("vgg"), "target", engine="gauss_newton")
    torch.manual_seed(1)
    seen = images.double()
    model = Split(nn.Conv2d(3, 6, 1), Head(lambda a: a * inner(seen, 1).raw.mean())).double().eval()
    with pytest.raises(DerivativeError, match="gauss_newton cannot run inside a head.*reverse_over_reverse"):
        Explainer(model, "target", engine=outer)(seen, 1)
    assert inner(seen, 1).finite.all()
    assert Explainer(model, "target")(seen, 1).finite.all()


@pytest.mark.parametrize("name", ["vgg", "residual"])
def test_half_precision_autocast_channels_last_and_frozen_weights(name, images):
    exact = Explainer(model_of(name), "target", "shapleycam-h", engine="reverse_over_reverse")(images.double(), [0, 1, 2]).raw
    model = model_of(name, torch.float32)
    explainer = Explainer(model, "target", "shapleycam-h", engine="gauss_newton")
    with torch.autocast("cpu", torch.bfloat16):
        if name == "residual":  # torch's batch norm gives values of bfloat16 tangents of float32
            with pytest.raises(DerivativeError, match="fails in forward mode.*engine='auto'"):
                explainer(images, [0, 1, 2])
        else:
            assert (explainer(images, [0, 1, 2]).raw - exact).norm() < 0.1 * exact.norm()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    shaped, asked = model.to(memory_format=torch.channels_last), {"engine": "gauss_newton"}
    found = Explainer(shaped, "target", "shapleycam-h", **asked)(images.to(memory_format=torch.channels_last), [0, 1, 2])
    assert found.diagnostics.engine == "gauss_newton"
    torch.testing.assert_close(found.raw.double(), exact, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    half = Explainer(model_of(name, torch.bfloat16), "target", "shapleycam-h", **asked)(images.bfloat16(), [0, 1, 2])
    assert half.diagnostics.engine == "gauss_newton" and (half.raw - exact).norm() < 0.1 * exact.norm()


def test_nothing_stays_behind_after_an_error_and_between_threads(images):
    model = model_of("vgg", torch.float32)
    explainer = Explainer(model, "target", engine="gauss_newton")
    expected = explainer(images).raw
    handle = model.head[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explainer(images)
    handle.remove()
    layer = nn.Linear(3, 2)
    assert type(layer(torch.ones(1, 3)).grad_fn).__name__ == "AddmmBackward0"  # no mode is left on
    with torch.autograd.forward_ad.dual_level():
        assert torch.autograd.forward_ad.unpack_dual(torch.ones(1)).tangent is None
    found = []
    threads = [threading.Thread(target=lambda: found.append(explainer(images).raw)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(raw, expected) for raw in found)


def test_it_wants_one_layer(images):
    model = model_of("vgg")
    with pytest.raises(DerivativeError, match="one target layer, got 2"):
        Explainer(model, ["target", "head.0"], engine="gauss_newton")(images.double())


def test_more_classes_than_features_go_through_the_features(images):
    torch.manual_seed(1)
    head = nn.Sequential(nn.Conv2d(6, 3, 3), nn.ReLU(), *POOLED, nn.Linear(3, 40))
    model, images = Split(nn.Conv2d(3, 6, 1), head).double().eval(), images.double()
    targets = torch.arange(40).expand(3, -1).contiguous()
    one, other = (Explainer(model, "target", engine=e)(images, targets) for e in ("gauss_newton", "forward_over_reverse"))
    assert one.diagnostics.engine == "gauss_newton"
    torch.testing.assert_close(one.raw, other.raw, rtol=1e-9, atol=1e-12)
