"""Utilities that are not the table's: they are explained as they are, with their own derivatives and the call's targets."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from shapleycam import UTILITIES, Explainer, InputError, Utility

from .helpers import Split, small_heads


def model_of() -> nn.Module:
    torch.manual_seed(1)
    return Split(*small_heads()["pool-linear"]).double().eval()


def reference(model: nn.Module, images: Tensor, value, targets: Tensor) -> Tensor:
    """ShapleyCAM-H by plain autograd in float64."""
    a = model.target(images).detach().requires_grad_(True)
    (g,) = torch.autograd.grad(value(model.head(a), targets).sum(), a, create_graph=True)
    (h,) = torch.autograd.grad((g * a.detach()).sum(), a)
    return ((g - h / 2) * a).sum(1).detach()


def square(z: Tensor, targets: Tensor | None) -> Tensor:
    assert targets is not None
    return z.softmax(1).gather(1, targets[:, None])[:, 0] ** 2


# U = p_c²: dU/dz = 2 p_c² (e_c - p), and its derivative along v, by hand.
def square_gradient(p: Tensor):
    return 2 * p**2, -2 * p**2, 0.0


def square_curvature(p: Tensor, v: Tensor, s: Tensor):
    return 4 * p**2 * (v - s), -4 * p**2 * (v - s) + 2 * p**2 * s, -2 * p**2


T = torch.tensor([1, 4, 0])
OWN = {
    "rest, replaced": replace(UTILITIES["rest"], value=square, gradient=square_gradient, curvature=square_curvature),
    "own coefficients": Utility("mine", "p_c²", square, square_gradient, square_curvature),
    "value alone": Utility("mine", "p_c²", square),
    "callable": square,
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("with_norms", [False, True])
def test_own_derivatives(name: str, with_norms: bool, images: Tensor) -> None:
    model, x = model_of(), images.double()
    result = Explainer(model, "target", "shapleycam-h", OWN[name])(x, T, with_norms=with_norms)
    assert result.diagnostics.engine == "closed_form"
    torch.testing.assert_close(result.raw, reference(model, x, square, T), rtol=1e-9, atol=1e-12)
    both = Explainer(model, "target", "shapleycam-h", OWN[name])(x, torch.stack((T, (T + 1) % 5), 1))
    torch.testing.assert_close(both.raw[:, 1], reference(model, x, square, (T + 1) % 5), rtol=1e-9, atol=1e-12)


def test_coefficients_that_are_not_the_values_are_refused(images: Tensor) -> None:
    for wrong in (
        replace(UTILITIES["rest"], value=square),
        Utility("u", "", square, square_gradient, lambda p, v, s: (p, p, p)),
    ):
        with pytest.raises(InputError, match="not the derivatives of its value"):
            Explainer(model_of(), "target", utility=wrong)(images.double())


class Mapping(nn.Module):
    """Logits inside a mapping under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Split(*small_heads()["flatten-mlp"]).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.inner(x)}


@pytest.mark.parametrize("layer", ["auto", "inner.target"])
def test_the_study_asks_with_the_targets_of_the_call(layer: str, images: Tensor) -> None:
    seen: list[list[int]] = []

    def utility(outputs: dict[str, Tensor], targets: Tensor | None) -> Tensor:
        assert targets is not None
        seen.append(targets.tolist())
        return square(outputs["scores"], targets)

    torch.manual_seed(0)
    model, x = Mapping().eval(), images.double()
    result = Explainer(model, layer, "shapleycam-h", utility)(x, T)
    assert all(targets == T.tolist()[: len(targets)] for targets in seen) and [1, 4] in seen
    torch.testing.assert_close(result.raw, reference(model.inner, x, square, T), rtol=1e-9, atol=1e-12)


def test_a_utility_that_holds_something_for_the_whole_batch(images: Tensor) -> None:
    """It fails on two of the images; the study then takes all of them."""
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    weigh = lambda z, targets: square(z, targets) * weights[: len(weights)]
    model, x = model_of(), images.double()
    model.head.append(nn.Tanh())
    result = Explainer(model, "target", "shapleycam-h", weigh)(x, T)
    torch.testing.assert_close(result.raw, reference(model, x, weigh, T), rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match=r"method rows\(rows\)"):
        Explainer(model, "target", "ablationcam", weigh)(x, T)


def test_a_wrapper_that_holds_something_for_the_whole_batch(images: Tensor) -> None:
    class Shift(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.shift = inner, torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x) * (1 + self.shift)
            return out

    model, x = model_of(), images.double()
    raw = Explainer(Shift(model).eval(), "inner.target", "shapleycam-h", square)(x, T).raw
    expected = reference(model, x, lambda z, t: square(z * torch.tensor([[1.0], [2.0], [3.0]]), t), T)
    torch.testing.assert_close(raw, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", UTILITIES)
def test_named_utilities_survive_a_copy(name: str) -> None:
    for other in (pickle.loads(pickle.dumps(UTILITIES[name])), copy.deepcopy(UTILITIES[name])):
        assert other == UTILITIES[name]


@pytest.mark.parametrize("method", ["shapleycam", "randomcam"])
def test_explainers_survive_a_copy(method: str, images: Tensor) -> None:
    model, x = model_of(), images.double()
    explainer = Explainer(model, model.target, method, seed=3)
    fresh = [copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))]
    expected = explainer(x, T)
    for other in (*fresh, copy.deepcopy(explainer)):
        assert other.model is not model and repr(other).startswith("Explainer(Split")
        result = other(x, T)
        assert torch.equal(result.raw, expected.raw)
        assert result.diagnostics.engine == expected.diagnostics.engine
