"""Each method's map for one worked example, by hand."""

import pytest
import torch
from torch import nn

from shapleycam import METHODS, Explainer, InputError
from shapleycam.methods import get_method

from ..helpers import Pick, Split

A = torch.tensor([[1.0, 2.0], [3.0, -1.0]])  # [C, S]
G = torch.tensor([[0.5, 1.0], [-1.0, 2.0]])
HA = torch.tensor([[1.0, 0.0], [2.0, -2.0]])  # w = G - HA/2 = [[0, 1], [-2, 3]]

EXPECTED = {
    "shapleycam": [2.0, 0.5],
    "shapleycam-h": [-6.0, -1.0],
    "shapleycam-e": [0.0, 2.0],
    "shapleycam-x": [2 / 3 - 13.5, 4 / 3 + 4.5],
    "gradcam": [2.25, 1.0],
    "hirescam": [-2.5, 0.0],
    "gradcam-e": [0.5, 2.0],
    "xgradcam": [2.5 / 3 - 7.5, 5 / 3 + 2.5],
    "layercam": [0.5, 0.0],
    "gradcam++": [0.125 / 0.875 + 0.2 + 1.0, 2 * (0.125 / 0.875 + 0.2) - 1 / 3],
}


def explain(method, **options):
    """A model whose utility has exactly gradient G and Hessian-vector product HA at A."""
    model = Split(Pick(A[None, :, None, :]), nn.Flatten())
    diagonal = HA / A
    linear = G - HA

    def utility(outputs, targets):
        a = outputs.unflatten(1, (2, 2))
        return (linear * a + diagonal * a**2 / 2).sum((1, 2))

    explainer = Explainer(model.eval(), "target", method, utility, layout="NCHW", **options)
    return explainer(torch.zeros(1, 3, 1, 2), with_gap=True)


@pytest.mark.parametrize("engine", ["reverse_over_reverse", "forward_over_reverse"])
@pytest.mark.parametrize("method", EXPECTED)
def test_worked_example(method, engine):
    result = explain(method, engine=engine)
    torch.testing.assert_close(result.raw[0, 0], torch.tensor(EXPECTED[method]), rtol=1e-5, atol=1e-5)
    assert result.diagnostics.engine == engine


@pytest.mark.parametrize("method", ["shapleycam", "shapleycam-h", "shapleycam-e", "shapleycam-x"])
def test_the_midpoint_is_exact_for_a_quadratic_utility(method):
    result = explain(method, engine="midpoint")
    torch.testing.assert_close(result.raw[0, 0], torch.tensor(EXPECTED[method]), rtol=1e-5, atol=1e-5)


def test_a_quadratic_utility_has_no_gap():
    assert explain("shapleycam").gap.abs().item() < 1e-5
    # First-order methods share the gap: it speaks of w = g where no Hessian was asked for.
    assert explain("gradcam").gap.item() == pytest.approx((HA * A).sum().item() / -2, abs=1e-5)


def test_every_method_of_the_issue_is_a_row():
    elsewhere = {"randomcam", "scorecam", "ablationcam", "eigencam", "eigengradcam"}  # the last four: test_perturbation.py
    assert set(EXPECTED) | elsewhere == set(METHODS)


def test_randomcam_is_seeded_and_differs_between_calls():
    a = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    model = Split(Pick(a), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))).eval()
    images = torch.zeros(2, 3, 6, 6)
    first, again = (Explainer(model, "target", "randomcam", seed=5) for _ in range(2))
    one, two = first(images), first(images)
    assert torch.equal(one.raw, again(images).raw)
    assert not torch.equal(one.raw, two.raw)
    assert not torch.equal(one.raw, Explainer(model, "target", "randomcam", seed=6)(images).raw)
    assert one.diagnostics.engine == "none"
    alpha = torch.linalg.lstsq(a[0].flatten(1).T.double(), one.raw[0].flatten().double()).solution
    assert alpha.abs().max() <= 1 + 1e-4  # weights of Uniform(-1, 1)


def test_names():
    assert get_method("ShapleyCAM-H") is METHODS["shapleycam-h"]
    with pytest.raises(InputError, match="'gradcam"):
        get_method("grad-cam")
