"""Engines against explicit float64 Hessians, against each other, and against exact Shapley values."""

import itertools
import math

import pytest
import torch
import torch.nn.attention
from torch import nn

from shapleycam import UTILITIES, DerivativeError, Explainer, ShapleyCamWarning
from shapleycam.model.inputs import Inputs
from shapleycam.utilities import evaluate, get_utility

from ..helpers import Pick, Split, small_heads

EXACT = ("closed_form", "reverse_over_reverse", "forward_over_reverse")


def cube(outputs, targets):
    return outputs.gather(1, targets[:, None])[:, 0] ** 3


def model_of(name, dtype=torch.float64):
    torch.manual_seed(1)
    target, head = small_heads()[name]
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return Split(target, head).to(dtype).eval()


def derive(model, images, targets, **options):
    """The gradient and Hessian-vector product of every class, [N, M, C, S], through the public road."""
    explainer = Explainer(model, "target", **options)
    plan = explainer.prepare(images)
    [term] = plan.run(plan.request(explainer._settings, Inputs(images), targets)).terms
    a = term.activations
    zero = torch.zeros_like(a)
    return (
        a,
        torch.stack([g.expand_as(a) for g in term.gradients], 1),
        torch.stack([zero if h is None else h.expand_as(a) for h in term.hvps], 1),
        term.layout,
    )


def explicit(model, images, targets, utility, layout):
    """The same from torch's explicit Hessian of the head, one image and class at a time."""
    stored = model.target(images).detach()
    gradients, products = [], []
    for n, m in itertools.product(range(images.shape[0]), range(targets.shape[1])):

        def scalar(a, n=n, m=m):
            z = model.head(a[None].clone())  # a head may write into its input
            return evaluate(get_utility(utility), z, z, targets[n : n + 1, m], 1)[0]

        a = stored[n]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            gradient = torch.autograd.functional.jacobian(scalar, a)
            hessian = torch.autograd.functional.hessian(scalar, a).reshape(a.numel(), a.numel())
        gradients.append(gradient)
        products.append((hessian @ a.flatten()).view_as(a))
    shape = (images.shape[0], targets.shape[1])
    view = lambda parts: layout.view(torch.stack(parts)).unflatten(0, shape)
    return view(gradients), view(products)


@pytest.mark.parametrize("utility", [*UTILITIES, cube], ids=lambda u: u if isinstance(u, str) else u.__name__)
@pytest.mark.parametrize("name", small_heads())
@pytest.mark.filterwarnings("ignore::shapleycam.ShapleyCamWarning")
def test_every_engine_equals_the_explicit_hessian(name, utility, images):
    model, images = model_of(name), images.double()
    targets = torch.tensor([[0, 4], [1, 1], [3, 2]])
    engines = [e for e in EXACT if e != "closed_form" or name == "pool-linear"]
    if name == "conv-bn-silu":
        engines.remove("forward_over_reverse")  # torch: silu_backward has no forward derivative; tested below
    expected = {}  # by layout: the explicit Hessian takes longer than the engines
    for engine in engines:
        a, g, h, layout = derive(model, images, targets, utility=utility, engine=engine)
        if layout not in expected:
            expected[layout] = explicit(model, images, targets, utility, layout)
        expected_g, expected_h = expected[layout]
        torch.testing.assert_close(g, expected_g, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(h, expected_h, rtol=1e-9, atol=1e-12)
        if utility != "logit":
            assert h.norm() > 1e-3 * g.norm(), "a head without curvature proves nothing"
        assert a.shape[2] == 16


class Excite(nn.Module):
    """Squeeze and excitation as in MobileNetV3: channels weighted by a gate of their means."""

    def __init__(self, gate):
        super().__init__()
        self.mix, self.gate = nn.Conv2d(6, 6, 1), gate

    def forward(self, a):
        return a * self.gate(4 * self.mix(a.mean((2, 3), keepdim=True)) + 1)


class Clamped(nn.Module):
    def forward(self, x):
        return x.clamp(-3, 3) / 6 + 0.5


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("engine", ["reverse_over_reverse", "forward_over_reverse"])
def test_hard_sigmoid_which_torch_differentiates_once(engine, inplace, images):
    models = []
    for gate in (nn.Hardsigmoid(inplace), Clamped()):
        torch.manual_seed(2)
        tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
        models.append(Split(nn.Conv2d(3, 6, 1), nn.Sequential(Excite(gate), *tail)).double().eval())
    model, twin = models
    images, targets = images.double(), torch.tensor([[0, 4], [1, 1], [3, 2]])
    _, g, h, layout = derive(model, images, targets, engine=engine)
    expected_g, expected_h = explicit(twin, images, targets, "rest", layout)
    torch.testing.assert_close(g, expected_g, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(h, expected_h, rtol=1e-9, atol=1e-12)
    gates = twin.head[0].gate(4 * twin.head[0].mix(twin.target(images).mean((2, 3), keepdim=True)) + 1)
    assert (gates == 1).any() and ((gates > 0) & (gates < 1)).any()  # on both sides of a kink
    torch.testing.assert_close(Explainer(model, "target")(images).logits, model(images))


def test_closed_form_equals_reverse_over_reverse_in_float32(images):
    model = model_of("pool-linear", torch.float32)
    targets = torch.tensor([[0], [1], [3]])
    for utility in (*UTILITIES, cube):
        with pytest.warns(ShapleyCamWarning) if utility == "logit" else _quiet():
            _, g, h, _ = derive(model, images, targets, utility=utility, engine="closed_form")
            _, g2, h2, _ = derive(model, images, targets, utility=utility, engine="reverse_over_reverse")
        assert (g - g2).norm() <= 1e-5 * g2.norm()
        assert (h - h2).norm() <= 1e-5 * h2.norm()


class _quiet:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_auto_takes_the_closed_form_only_where_the_head_has_it(images):
    images = images.double()
    for name in small_heads():
        explainer = Explainer(model_of(name), "target")
        expected = "closed_form" if name == "pool-linear" else "reverse_over_reverse"
        assert explainer(images).diagnostics.engine == expected, name
    with pytest.raises(DerivativeError, match="not pool and linear"):
        Explainer(model_of("relu-pool-linear"), "target", engine="closed_form")(images)


def test_an_edited_head_is_noticed(images):
    model = model_of("pool-linear", torch.float32)
    explainer = Explainer(model, "target")
    assert explainer(images).diagnostics.engine == "closed_form"
    model.head.append(nn.Softplus().eval())
    after = explainer(images)
    assert after.diagnostics.engine == "reverse_over_reverse"
    torch.testing.assert_close(after.raw, Explainer(model, "target")(images).raw)
    # A new weight in the same classifier needs no new plan.
    del model.head[-1]
    explainer = Explainer(model, "target")
    explainer(images)
    nn.init.normal_(model.head[-1].weight)
    torch.testing.assert_close(
        explainer(images).raw,
        Explainer(model, "target", engine="reverse_over_reverse")(images).raw,
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_missing_derivative_is_named_and_never_taken_for_zero(images):
    model = model_of("conv-bn-silu")
    with pytest.raises(DerivativeError, match="forward_over_reverse cannot.*silu.*engine='auto'"):
        Explainer(model, "target", engine="forward_over_reverse")(images.double())

    class OnceOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return a**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 3 * g * ctx.saved_tensors[0] ** 2

    class Once(nn.Module):
        def forward(self, a):
            return OnceOnly.apply(a).mean((2, 3))

    head = nn.Sequential(Once(), nn.Linear(6, 5))
    model = Split(nn.Conv2d(3, 6, 1), head).eval()
    with pytest.raises(DerivativeError, match="once_differentiable"):
        Explainer(model, "target")(images)
    assert Explainer(model, "target", "gradcam")(images).finite.all()
    assert Explainer(model, "target", engine="midpoint")(images).finite.all()


@pytest.mark.parametrize("engine", ["reverse_over_reverse", "forward_over_reverse", "midpoint"])
def test_exact_shapley_values_of_a_quadratic_utility(engine):
    """All 2⁸ coalitions of eight players: the Shapley value of element i is A_i w_i (method of the paper, theorem 1)."""
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(1, 2, 2, 2, generator=generator, dtype=torch.float64)
    linear = torch.randn(8, generator=generator, dtype=torch.float64)
    quadratic = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    quadratic = quadratic + quadratic.T

    def value(x):
        return x @ linear + (x @ quadratic * x).sum(-1) / 2

    players = a.flatten()
    members = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)), dtype=torch.float64)
    worth = {tuple(row): v for row, v in zip(members.int().tolist(), value(members * players), strict=True)}
    shapley = torch.zeros(8, dtype=torch.float64)
    for row, v in worth.items():
        for i in (i for i in range(8) if row[i]):
            without = (*row[:i], 0, *row[i + 1 :])
            size = sum(without)
            shapley[i] += (v - worth[without]) * math.factorial(size) * math.factorial(7 - size) / math.factorial(8)

    model = Split(Pick(a), nn.Flatten()).eval()
    explainer = Explainer(model, "target", "shapleycam-h", lambda z, t: value(z), engine=engine, layout="NCHW")
    images = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    plan = explainer.prepare(images)
    [term] = plan.run(plan.request(explainer._settings, Inputs(images))).terms
    [w] = term.attribution_weights(2)
    torch.testing.assert_close((term.activations * w).flatten(), shapley, rtol=1e-10, atol=1e-10)
    result = explainer(images, with_gap=True)
    assert result.gap.abs().item() < 1e-9
    assert result.raw.sum().item() == pytest.approx((value(players) - value(torch.zeros_like(players))).item())


def test_gap_and_norms_against_a_direct_computation(images):
    for name in ("pool-linear", "pool-norm-linear", "attention"):
        model = model_of(name, torch.float64)
        x, targets = images.double(), torch.tensor([2, 0, 1])
        result = Explainer(model, "target")(x, targets, with_norms=True, with_gap=True)
        a, g, h, _ = derive(model, x, targets[:, None])
        stored = model.target(x).detach()
        value = lambda t: UTILITIES["rest"].value(model.head(t.clone()), targets).detach()
        expected_gap = value(stored) - value(torch.zeros_like(stored)) - ((g - h / 2)[:, 0] * a).sum((1, 2))
        torch.testing.assert_close(result.gap, expected_gap, rtol=1e-9, atol=1e-9)
        ratio = h[:, 0].flatten(1).norm(dim=1) / g[:, 0].flatten(1).norm(dim=1)
        torch.testing.assert_close(result.hvp_ratio.double(), ratio, rtol=1e-5, atol=1e-6)
        assert (ratio > 1e-3).all()
