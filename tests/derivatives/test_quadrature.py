"""The quadrature engine against the path integral itself: gradients in float64, written out by hand for every head."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from shapleycam import UTILITIES, Explainer, InputError, Layout, ReshapeTransform, ShapleyCamWarning
from shapleycam.shapley import Game
from tests.helpers import Pick, Split, small_heads

HEADS = list(small_heads())


def live(name, seed=1):
    """A head with random weights in float64: every kind of curvature."""
    torch.manual_seed(seed)
    model = Split(*small_heads()[name]).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def by_hand(model, images, nodes, utility, targets, baseline="zero", prefix=0):
    """(A - B)·w summed over the channels [N, S], one hooked forward and backward pass of the whole model per node."""
    x, shares = np.polynomial.legendre.leggauss(nodes)
    seen = {}
    hook = model.target.register_forward_hook(lambda m, i, o: seen.update(a=o.detach().clone()))
    logits = model(images)
    hook.remove()
    a = seen["a"]
    part = a[:, prefix:] if a.ndim == 3 else a
    start = torch.zeros_like(part) if isinstance(baseline, str) and baseline == "zero" else baseline
    if isinstance(start, str):
        start = (part.mean(1, keepdim=True) if a.ndim == 3 else part.mean((2, 3), keepdim=True)).expand_as(part)
    classes = logits.argmax(1) if targets is None else targets
    total = torch.zeros_like(part)
    for node, share in zip((x + 1) / 2, shares / 2, strict=True):
        here = start + node * (part - start)
        leaf = (torch.cat((a[:, :prefix], here), 1) if prefix else here).requires_grad_(True)
        hook = model.target.register_forward_hook(lambda m, i, o, leaf=leaf: leaf * 1)
        value = UTILITIES[utility].value(model(images), classes).sum()
        hook.remove()
        (gradient,) = torch.autograd.grad(value, leaf)
        total += share * (gradient[:, prefix:] if a.ndim == 3 else gradient)
    paid = (part - start) * total
    return paid.sum(2) if a.ndim == 3 else paid.flatten(2).sum(1)


@pytest.mark.filterwarnings("ignore:The path says nothing")
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("utility", list(UTILITIES))
@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_the_map_is_the_path_integral(name, utility, baseline):
    model, images = live(name), torch.randn(3, 3, 4, 4, dtype=torch.float64)
    targets = torch.tensor([0, 3, 2])
    for nodes in (1, 3, 8):
        explainer = Explainer(model, "target", "shapleycam-h", utility, engine="quadrature", nodes=nodes, baseline=baseline)
        found = explainer(images, targets, with_gap=True)
        expected = by_hand(model, images, nodes, utility, targets, baseline, prefix=name == "attention")
        assert torch.allclose(found.raw.flatten(1), expected, rtol=1e-9, atol=1e-12)
        assert found.diagnostics.engine == "quadrature"
        assert (found.diagnostics.nodes, found.diagnostics.baseline) == (nodes, baseline)
        # The gap is what the sum lacks of U(A) - U(B), which the game knows by itself.
        game = Game(explainer, images, targets, cells=1, baseline=baseline)
        span = game.worth(torch.tensor([[True]]))[:, 0] - game.worth(torch.tensor([[False]]))[:, 0]
        assert torch.allclose(found.gap, span - expected.sum(1), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", HEADS)
def test_midpoint_is_its_one_node_case(name):
    model, images = live(name), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    one = Explainer(model, "target", "shapleycam-x", engine="quadrature", nodes=1)(images)
    midpoint = Explainer(model, "target", "shapleycam-x", engine="midpoint")(images)
    assert torch.equal(one.raw, midpoint.raw)
    assert (midpoint.diagnostics.engine, midpoint.diagnostics.nodes) == ("midpoint", 1)


class Polynomial(nn.Module):
    """A random polynomial of a given degree in the activations, as a logit beside a second one that is 0."""

    def __init__(self, degree, size):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(degree, degree, size, dtype=torch.float64) / size**0.5)

    def forward(self, a):
        z = sum(torch.stack([a.flatten(1) @ row for row in rows[: d + 1]]).prod(0) for d, rows in enumerate(self.rows))
        return torch.stack((z, torch.zeros_like(z)), 1)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
@pytest.mark.parametrize("start", ["zero", "mean", "tensor"])
def test_exact_for_polynomials_up_to_twice_the_nodes_and_efficient(nodes, start):
    torch.manual_seed(nodes)
    a = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    images = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    baseline = torch.randn(3, 4, dtype=torch.float64) if start == "tensor" else start
    for degree in (2 * nodes, 2 * nodes + 1):
        model = Split(Pick(a), Polynomial(degree, 12)).eval()
        settings = {
            "layer": "target",
            "utility": "logit",
            "method": "shapleycam-h",
            "engine": "quadrature",
            "baseline": baseline,
        }
        found = Explainer(model, **settings, nodes=nodes)(images, 0, with_gap=True)
        exact = Explainer(model, **settings, nodes=degree)(images, 0)
        if degree == 2 * nodes:
            assert torch.allclose(found.raw, exact.raw, rtol=1e-12, atol=1e-12)
            assert float(found.gap.abs().max()) < 1e-12
        else:
            assert float(found.gap.abs().max()) > 1e-9  # one degree too many


def test_exact_shapley_values_of_a_quadratic():
    torch.manual_seed(0)
    a, images = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    model = Split(Pick(a), Polynomial(2, 12)).eval()
    for baseline in ("zero", "mean", torch.randn(3, 1, dtype=torch.float64)):
        explainer = Explainer(model, "target", "shapleycam-h", "logit", engine="quadrature", nodes=1, baseline=baseline)
        values = Game(explainer, images, 0, players="elements", baseline=baseline).exact()
        assert torch.allclose(values.map(), explainer(images, 0).raw, rtol=1e-10, atol=1e-12)
        # So is the second order of the other engines, whose direction is A - B.
        for engine in ("reverse_over_reverse", "forward_over_reverse"):
            second = Explainer(model, "target", "shapleycam-h", "logit", engine=engine, baseline=baseline)
            found = second(images, 0, with_gap=True)
            assert torch.allclose(values.map(), found.raw, rtol=1e-10, atol=1e-12)
            assert float(found.gap.abs().max()) < 1e-12


class Dependent(nn.Module):
    """Logits of positions 0 and 1 alike, of 2, and not of 3."""

    def forward(self, a):
        s = a.flatten(2).sum(1)
        z = (s[:, 0] * s[:, 1]).sin() + s[:, 2].exp() * (s[:, 0] + s[:, 1])
        return torch.stack((z, s[:, 2].tanh()), 1)


def test_symmetric_players_get_the_same_and_a_dummy_nothing():
    a = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    a.flatten(2)[:, :, 1] = a.flatten(2)[:, :, 0]
    explainer = Explainer(Split(Pick(a), Dependent()).eval(), "target", "shapleycam-h", engine="quadrature", nodes=6)
    paid = explainer(torch.zeros(1, 3, 2, 2, dtype=torch.float64), 0).raw.flatten()
    assert torch.isclose(paid[0], paid[1], rtol=1e-12)
    assert paid[3] == 0
    assert paid[2].abs() > 1e-3


def test_linear_in_the_utility():
    model, images = live("conv-bn-silu"), torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def explain(utility):
        return Explainer(model, "target", "shapleycam-h", utility, engine="quadrature", nodes=3)(images, [1, 4]).raw

    def mixed(outputs, targets):
        return 2 * UTILITIES["logit"].value(outputs, targets) - 3 * UTILITIES["probability"].value(outputs, targets)

    assert torch.allclose(explain(mixed), 2 * explain("logit") - 3 * explain("probability"), rtol=1e-9, atol=1e-12)
    assert torch.allclose(explain("rest"), explain("logit") + explain("log_probability"), rtol=1e-9, atol=1e-12)


class ManyAlike(nn.Module):
    """A smooth utility of the mean over the players, each of which moves it by 1 / players."""

    def forward(self, a):
        s = a.flatten(2).mean(2)  # [N, C]
        z = (2 * s[:, 0] + s[:, 1]).sin() * (s[:, 1] - s[:, 0]).exp()
        return torch.stack((z, torch.zeros_like(z)), 1)


def test_tends_to_the_shapley_values_of_many_players_as_one_over_their_number():
    errors, counts = [], (4, 8, 16)
    for players in counts:
        a = torch.tensor([1.0, 0.6], dtype=torch.float64)[None, :, None, None].expand(1, 2, 1, players)
        a = a * torch.linspace(0.5, 1.5, players, dtype=torch.float64)
        explainer = Explainer(
            Split(Pick(a.contiguous()), ManyAlike()).eval(), "target", "shapleycam-h", "logit", engine="quadrature", nodes=8
        )
        images = torch.zeros(1, 3, 1, players, dtype=torch.float64)
        exact = Game(explainer, images, 0).exact()
        errors.append(float(exact.agreement(explainer(images, 0)).relative_error))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert errors[-1] < 0.02
    assert -2.3 < slope < -0.8  # symmetric sums cancel part of the first order


@pytest.mark.parametrize("name", ["pool-linear", "conv-bn-silu", "attention"])
def test_several_classes_chunks_and_batches_give_the_same(name):
    model, images = live(name), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    targets = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1], [3, 2]])
    settings = {"layer": "target", "method": "shapleycam-h", "engine": "quadrature", "nodes": 3}
    several = Explainer(model, **settings)(images, targets, with_gap=True)
    for m in range(2):
        one = Explainer(model, **settings)(images, targets[:, m], with_gap=True)
        assert torch.allclose(several.raw[:, m], one.raw, rtol=1e-10, atol=1e-13)
        assert torch.allclose(several.gap[:, m], one.gap, rtol=1e-9, atol=1e-12)
    for chunk in (1, 5, 7, 10, 1000):
        cut = Explainer(model, **settings, chunk=chunk)(images, targets, with_gap=True)
        assert torch.allclose(cut.raw, several.raw, rtol=1e-10, atol=1e-13)
        assert torch.allclose(cut.gap, several.gap, rtol=1e-9, atol=1e-12)
        assert torch.equal(cut.logits, several.logits)
    alone = Explainer(model, **settings)
    for i in range(5):
        assert torch.allclose(alone(images[i : i + 1], targets[i : i + 1]).raw[0], several.raw[i], rtol=1e-10, atol=1e-13)


class Around(nn.Module):
    """A side path around the target layer reaches the head."""

    def __init__(self):
        super().__init__()
        self.target, self.side = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.head = nn.Sequential(nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def forward(self, images):
        return self.head(self.target(images) * self.side(images))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_side_path_keeps_to_its_image(batch):
    torch.manual_seed(0)
    model, images = Around().double().eval(), torch.randn(batch, 3, 4, 4, dtype=torch.float64)
    for masks in (None, 4):
        found = Explainer(model, "target", "shapleycam-h", engine="quadrature", nodes=3, masks=masks)(images, 2, with_gap=True)
        if masks is None:
            expected = by_hand(model, images, 3, "rest", torch.full((batch,), 2))
            assert torch.allclose(found.raw.flatten(1), expected, rtol=1e-9, atol=1e-12)
        else:
            each = [
                Explainer(model, "target", "shapleycam-h", engine="quadrature", nodes=3, masks=masks)(images[i : i + 1], 2)
                for i in range(batch)
            ]
            assert torch.allclose(found.raw, torch.cat([e.raw for e in each]), rtol=1e-10, atol=1e-13)


class Two(nn.Module):
    def __init__(self, series):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4 if series else 3, 4, 1)
        self.series = series
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(self, images):
        if self.series:
            return self.head(self.two(self.one(images).sigmoid()).tanh())
        return self.head(self.one(images) * self.two(images))


@pytest.mark.parametrize("series", [True, False])
def test_layers_beside_each_other_go_together_and_one_behind_another_alone(series):
    torch.manual_seed(0)
    model, images = Two(series).double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found = Explainer(model, ["one", "two"], "shapleycam-h", engine="quadrature", nodes=6)(images, 1)
    if series:
        for name, raw in zip(("one", "two"), found.raws, strict=True):
            single = Explainer(model, name, "shapleycam-h", engine="quadrature", nodes=6)(images, 1)
            assert torch.allclose(raw, single.raw, rtol=1e-10, atol=1e-13)
        return
    # Together the two share U(A) - U(0), and the product treats them alike.
    assert torch.allclose(found.raws[0], found.raws[1], rtol=1e-9, atol=1e-12)
    value = UTILITIES["rest"].value
    span = value(model(images), torch.tensor([1, 1])) - value(
        model.head(torch.zeros(2, 4, 4, 4).double()), torch.tensor([1, 1])
    )
    assert torch.allclose(sum(raw.flatten(1).sum(1) for raw in found.raws), span, rtol=1e-6)


def test_a_tensor_baseline_belongs_to_the_images():
    model, images = live("conv-bn-silu"), torch.randn(4, 3, 4, 4, dtype=torch.float64)
    baseline = torch.randn(4, 6, 16, dtype=torch.float64)
    found = Explainer(model, "target", "shapleycam-h", engine="quadrature", nodes=2, baseline=baseline)(images, 0)
    expected = by_hand(model, images, 2, "rest", torch.zeros(4, dtype=torch.int64), baseline.view(4, 6, 4, 4))
    assert torch.allclose(found.raw.flatten(1), expected, rtol=1e-9, atol=1e-12)
    assert found.diagnostics.baseline == "tensor"
    zeros = Explainer(model, "target", "shapleycam-h", engine="quadrature", nodes=2, baseline=torch.zeros(1).double())(
        images, 0
    )
    zero = Explainer(model, "target", "shapleycam-h", engine="quadrature", nodes=2)(images, 0)
    assert torch.allclose(zeros.raw, zero.raw, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["pool-linear", "pool-norm-linear"])
@pytest.mark.parametrize("baseline", ["mean", "tensor"])
def test_every_engine_attributes_from_the_baseline(name, baseline):
    """First and second order against an explicit Hessian, whose vector is A - B."""
    model, images = live(name), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    a = model.target(images).detach()
    b = a.mean((2, 3), keepdim=True) if baseline == "mean" else torch.linspace(-1, 1, 6).double().view(1, 6, 1, 1)
    given = "mean" if baseline == "mean" else b[0].flatten(1)
    targets = torch.tensor([1, 2])
    engines = ["reverse_over_reverse", "forward_over_reverse"] + ["closed_form"] * (name == "pool-linear")
    for i in range(2):

        def value(flat, i=i):
            return UTILITIES["rest"].value(model.head(flat.view(1, 6, 4, 4)), targets[i : i + 1]).sum()

        flat, step = a[i].flatten(), (a - b)[i].flatten()
        g = torch.autograd.functional.jacobian(value, flat)
        h = torch.autograd.functional.hessian(value, flat) @ step
        for engine in engines:
            for method, w in (("hirescam", g), ("shapleycam-h", g - h / 2)):
                found = Explainer(model, "target", method, engine=engine, baseline=given)(images, targets, with_gap=True)
                expected = (step * w).view(6, 16).sum(0)
                assert torch.allclose(found.raw[i].flatten(), expected, rtol=1e-9, atol=1e-12), (engine, method)
                at_start = UTILITIES["rest"].value(model.head(b.expand_as(a)[i : i + 1]), targets[i : i + 1])
                gap = value(flat) - at_start.sum() - expected.sum()
                assert torch.isclose(found.gap[i], gap, rtol=1e-9, atol=1e-11)


def test_compare_gives_first_and_second_order_methods_their_own():
    for name in ("pool-linear", "conv-bn-silu", "attention"):
        model, images = live(name), torch.randn(2, 3, 4, 4, dtype=torch.float64)
        explainer = Explainer(model, "target", engine="quadrature", nodes=3)
        both = explainer.compare(images, methods=["shapleycam-h", "hirescam", "shapleycam-x", "gradcam++"])
        for method, found in both.items():
            alone = Explainer(model, "target", method, engine="quadrature", nodes=3)(images)
            assert torch.allclose(found.raw, alone.raw, rtol=1e-9, atol=1e-12)
        plain = Explainer(model, "target", "hirescam", engine="reverse_over_reverse")(images)
        assert torch.allclose(both["hirescam"].raw, plain.raw, rtol=1e-9, atol=1e-12)
        assert both["hirescam"].diagnostics.nodes is None


@pytest.mark.parametrize("name", ["pool-linear", "conv-bn-silu"])
def test_norms_compare_the_path_with_the_gradient(name):
    model, images = live(name), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    a = model.target(images).detach()
    targets = torch.tensor([1, 3])

    def gradient(t):
        leaf = (a * t).requires_grad_(True)
        return torch.autograd.grad(UTILITIES["rest"].value(model.head(leaf), targets).sum(), leaf)[0].flatten(1)

    g, w = gradient(1.0), (gradient(0.5 - 3**-0.5 / 2) + gradient(0.5 + 3**-0.5 / 2)) / 2
    found = Explainer(model, "target", "shapleycam-h", engine="quadrature", nodes=2)(images, targets, with_norms=True)
    expected = 2 * (g - w).norm(dim=1) / g.norm(dim=1)
    assert torch.allclose(found.hvp_ratio.double(), expected, rtol=1e-5)  # norms are float32


def test_automatic_nodes_stop_at_the_tolerance_and_say_where():
    images = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    for name in ("pool-linear", "conv-bn-silu"):
        model = live(name)
        counts = []
        for tolerance in (0.5, 1e-2, 1e-5):
            explainer = Explainer(model, "target", "shapleycam-h", engine="quadrature", nodes="auto", tolerance=tolerance)
            found = explainer(images)
            count = found.diagnostics.nodes
            counts.append(count)
            fixed = Explainer(model, "target", "shapleycam-h", engine="quadrature", nodes=count)(images, with_gap=True)
            assert torch.allclose(found.raw, fixed.raw, rtol=1e-10, atol=1e-13)
            assert torch.allclose(found.gap, fixed.gap, rtol=1e-7, atol=1e-12)
            span = (found.raw.flatten(1).sum(1) + found.gap).abs()
            assert (fixed.gap.abs() <= tolerance * span).all()
            if count > 1:
                fewer = Explainer(model, "target", "shapleycam-h", engine="quadrature", nodes=count // 2)(images, with_gap=True)
                assert (fewer.gap.abs() > tolerance * span).any()
        assert counts == sorted(counts) and counts[-1] > counts[0]


class Step(nn.Module):
    def forward(self, a):
        s = a.flatten(1).sum(1)
        return torch.stack(((1e5 * (s - 1)).atan() * 3 + s, -s), 1)


def test_a_tolerance_that_is_not_reached_is_said():
    a = torch.rand(2, 3, 2, 2, dtype=torch.float64) + 0.5
    explainer = Explainer(Split(Pick(a), Step()).eval(), "target", "shapleycam-h", "logit", engine="quadrature", nodes="auto")
    images = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    with pytest.warns(ShapleyCamWarning, match="above the tolerance of 0.001 with 32 nodes"):
        explainer(images, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = explainer(images, 0)  # said once
    assert found.diagnostics.nodes == 32
    assert any("above the tolerance" in note for note in found.diagnostics.notes)
    assert (found.gap.abs() > 1).all()


class Root(nn.Module):
    def forward(self, a):
        s = a.flatten(1).sum(1)
        return torch.stack(((s - 3).sqrt(), s), 1)  # not a number below 3


def test_a_head_that_is_undefined_on_the_path_is_named_with_the_place():
    a = torch.full((2, 3, 2, 2), 0.5, dtype=torch.float64)
    a[1] *= 20
    explainer = Explainer(Split(Pick(a), Root()).eval(), "target", "shapleycam-h", "logit", engine="quadrature", nodes=2)
    with pytest.warns(ShapleyCamWarning, match=r"NaN or Inf at t = 0.2113 of the path .* images \[0\]"):
        found = explainer(torch.zeros(2, 3, 2, 2, dtype=torch.float64), 0)
    assert found.finite.tolist() == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": 0}, "nodes must be a whole number from 1 to 32, or 'auto', got 0"),
        ({"nodes": -1}, "got -1"),
        ({"nodes": 2.5}, "got 2.5"),
        ({"nodes": True}, "got True"),
        ({"nodes": 33}, "got 33"),
        ({"nodes": "many"}, "got 'many'"),
        ({"engine": "auto", "nodes": 4}, "nodes=4 belongs to engine='quadrature'; the engine is 'auto'"),
        ({"engine": "midpoint", "nodes": 1}, "the engine is 'midpoint'"),
        ({"engine": "closed_form", "masks": 4}, "masks=4 belongs to engine='quadrature'"),
        ({"nodes": 4, "tolerance": 1e-3}, "tolerance=0.001 is where nodes='auto' stops; nodes is 4"),
        ({"nodes": "auto", "tolerance": 0}, "tolerance must be a positive number such as 1e-3, got 0"),
        ({"nodes": "auto", "tolerance": math.nan}, "got nan"),
        ({"masks": 3}, "masks come in pairs"),
        ({"masks": 2}, "two pairs at least"),
        ({"nodes": "auto", "masks": 4}, "which masks make noisy"),
        ({"baseline": "blur"}, "Unknown baseline 'blur': expected 'zero', 'mean' or a tensor"),
        ({"baseline": torch.zeros(1, dtype=torch.int64)}, "baseline must be a floating tensor"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError) as caught:
        Explainer(live("pool-linear"), "target", **{"engine": "quadrature", **arguments})
    assert message in str(caught.value)


def test_a_method_without_derivatives_has_no_baseline():
    explainer = Explainer(live("pool-linear"), "target", "eigencam", baseline="mean")
    with pytest.raises(InputError, match="'eigencam' has no derivatives, and no baseline"):
        explainer(torch.randn(2, 3, 4, 4, dtype=torch.float64))


def test_a_path_that_says_nothing_is_said():
    """A logit over a pool-and-linear head: the gradient is the same everywhere."""
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for engine in ("quadrature", "midpoint"):
        with pytest.warns(ShapleyCamWarning, match="says nothing beyond the gradient.*ShapleyCAM-H equals its first-order"):
            found = Explainer(live("pool-linear"), "target", "shapleycam-h", "logit", engine=engine)(images)
        plain = Explainer(live("pool-linear"), "target", "hirescam", "logit")(images)
        assert torch.allclose(found.raw, plain.raw, rtol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Explainer(live("conv-bn-silu"), "target", "shapleycam-h", "logit", engine="quadrature")(images)


@pytest.mark.parametrize("method", ["shapleycam-x", "xgradcam"])
def test_a_row_that_would_divide_by_nothing_is_refused(method):
    explainer = Explainer(live("conv-bn-silu"), "target", method, baseline="mean")
    with pytest.raises(InputError, match="which is zero for baseline='mean'"):
        explainer(torch.randn(2, 3, 4, 4, dtype=torch.float64))


class Pyramid(nn.Module):
    """Two target layers beside each other, on different grids."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 2, stride=2)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))

    def forward(self, images):
        return self.head(torch.cat((self.fine(images).mean((2, 3)), self.coarse(images).amax((2, 3))), 1))


def test_layers_on_different_grids():
    torch.manual_seed(0)
    model, images = Pyramid().double().eval(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    settings = {"layer": ["fine", "coarse"], "method": "shapleycam-h", "engine": "quadrature", "nodes": 8}
    raws = Explainer(model, **settings)(images, 1).raws
    value, target = UTILITIES["rest"].value, torch.tensor([1, 1])
    empty = model.head(torch.zeros(2, 8, dtype=torch.float64))
    span = value(model(images), target) - value(empty, target)
    assert torch.allclose(sum(raw.flatten(1).sum(1) for raw in raws), span, rtol=1e-6)
    with pytest.raises(InputError, match=r"theirs are \(2, 2\), \(4, 4\)"):
        Explainer(model, **settings, masks=4)(images, 1)


def test_a_transform_that_computes_takes_the_baseline_zero_only():
    model, images = live("conv-bn-silu"), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    halves = ReshapeTransform(lambda a: a * 0.5)
    plain = Explainer(model, "target", "shapleycam-h", engine="quadrature")(images, 0).raw
    found = Explainer(model, "target", "shapleycam-h", engine="quadrature", layout=halves)(images, 0).raw
    assert torch.allclose(found, plain / 4, rtol=1e-12)
    with pytest.raises(InputError, match="computes with the layer's output"):
        Explainer(model, "target", engine="quadrature", layout=halves, baseline="mean")(images, 0)


class Pairs(nn.Module):
    """Positions that interact, so that the diagonal is not enough."""

    def forward(self, a):
        s = a.flatten(2).sum(1)
        z = torch.maximum(s[:, 0] + s[:, 1], s[:, 2] + 2 * s[:, 3]).square().sin() * 2
        return torch.stack((z, torch.zeros_like(z)), 1)


def test_masks_are_seeded_and_their_standard_error_is_that_of_their_mean():
    torch.manual_seed(0)
    a, images = torch.rand(2, 3, 2, 2, dtype=torch.float64), torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    model = Split(Pick(a), Pairs()).eval()

    def explain(seed, masks=8):
        settings = {"layer": "target", "method": "shapleycam-h", "utility": "logit", "engine": "quadrature", "nodes": 4}
        return Explainer(model, **settings, masks=masks, seed=seed)(images, 0)

    assert torch.equal(explain(3).raw, explain(3).raw)
    assert not torch.equal(explain(3).raw, explain(4).raw)
    runs = [explain(seed) for seed in range(200)]
    spread = torch.stack([run.raw for run in runs]).std(0)
    [claimed] = zip(*[run.standard_errors for run in runs], strict=True)
    claimed = torch.stack(claimed).square().mean(0).sqrt()
    assert claimed.shape == (2, 2, 2)
    assert torch.allclose(claimed, spread, rtol=0.25)
    assert explain(0)[1:].standard_errors[0].shape == (1, 2, 2)


def test_masks_read_the_gradient_at_masked_activations():
    """Against the expectation written out: all 2^4 masks with their probabilities at each node."""
    torch.manual_seed(0)
    a, images = torch.rand(1, 3, 2, 2, dtype=torch.float64), torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    model = Split(Pick(a), Pairs()).eval()
    nodes, shares = np.polynomial.legendre.leggauss(4)
    expected = torch.zeros(4, dtype=torch.float64)
    for t, share in zip((nodes + 1) / 2, shares / 2, strict=True):
        for number in range(16):
            keep = torch.tensor([(number >> s) & 1 for s in range(4)], dtype=torch.float64)
            chance = float(torch.where(keep > 0, t, 1 - t).prod())
            leaf = (a.flatten(2) * keep).view_as(a).requires_grad_(True)
            (gradient,) = torch.autograd.grad(model.head(leaf)[:, 0].sum(), leaf)
            expected += share * chance * (gradient * a).flatten(2).sum(1)[0]
    found = Explainer(model, "target", "shapleycam-h", "logit", engine="quadrature", nodes=4, masks=4000)(images, 0)
    error = found.standard_errors[0].flatten()
    assert ((found.raw.flatten() - expected).abs() < 5 * error + 1e-9).all()
    assert (error < 0.05 * expected.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    for name in ("pool-linear", "conv-bn-silu"):
        model, images = live(name), torch.randn(4, 3, 4, 4, dtype=torch.float64)
        exact = Explainer(model, "target", "shapleycam-h", engine="quadrature")(images, 1).raw
        low = Explainer(live(name).to(dtype), "target", "shapleycam-h", engine="quadrature")(images.to(dtype), 1).raw
        assert low.dtype == torch.float32
        assert float((low - exact).norm() / exact.norm()) < (1e-5 if dtype == torch.float32 else 5e-2)


def test_the_model_is_left_as_it_was_and_the_trunk_runs_once():
    model, images = live("conv-bn-silu"), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    explainer = Explainer(model, "target", engine="quadrature", nodes=8)
    explainer(images)
    calls = []
    handle = model.target.register_forward_pre_hook(lambda m, args: calls.append(args[0].shape[0]))
    explainer(images, with_gap=True)
    handle.remove()
    assert calls == [2]
    assert not model.target._forward_hooks and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_an_own_utility_that_holds_something_per_image():
    class Weighted:
        def __init__(self, weights):
            self.weights = weights

        def rows(self, rows):
            chosen = Weighted(self.weights[rows])
            return lambda outputs, targets: chosen(outputs, targets)  # which has no rows() itself

        def __call__(self, outputs, targets):
            assert len(outputs) == len(self.weights)
            return (outputs.tanh() * self.weights).sum(1)

    weights = torch.randn(3, 5, dtype=torch.float64)
    for name in ("pool-linear", "conv-bn-silu"):
        model, images = live(name), torch.randn(3, 3, 4, 4, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = Explainer(model, "target", "shapleycam-h", Weighted(weights), engine="quadrature", nodes=2)(images)
        x = [0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2]
        a = model.target(images).detach()
        total = torch.zeros_like(a)
        for t in x:
            leaf = (a * t).requires_grad_(True)
            total += torch.autograd.grad((model.head(leaf).tanh() * weights).sum(), leaf)[0] / 2
        assert torch.allclose(found.raw, (a * total).sum(1), rtol=1e-9, atol=1e-12)


def test_prefix_tokens_stay_as_they_are():
    model, images = live("attention"), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    layout = Layout("NTC", (4, 4), prefix=1)
    found = Explainer(model, "target", "shapleycam-h", engine="quadrature", nodes=8, layout=layout)(images, 1)
    assert torch.allclose(found.raw.flatten(1), by_hand(model, images, 8, "rest", torch.tensor([1, 1]), prefix=1), rtol=1e-9)
