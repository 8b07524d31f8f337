"""States of a model that torch's hooks or gradients do not survive: they work, or an error says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from shapleycam import Explainer, ModelStateError, ShapleyCamError

from .helpers import Split, small_heads, toy


@pytest.fixture(name="x")
def _x() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("head", ["pool-linear", "flatten-mlp"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_compiled_in_place_runs_as_it_was(head: str, when: str, x: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = Split(*small_heads()[head]).eval()
    expected = Explainer(copy.deepcopy(model), "target")(x, 1)
    explainer = Explainer(model, "target")
    if when == "after":
        explainer(x, 1)
    model.compile(backend="eager")
    assert torch.equal(explainer(x, 1).raw, expected.raw)
    assert torch.equal(Explainer(model)(x, 1).raw, Explainer(copy.deepcopy(model))(x, 1).raw)


def test_a_part_compiled_in_place_is_named(x: torch.Tensor) -> None:
    model = Split(*small_heads()["pool-linear"]).eval()
    model.target.compile(backend="eager")
    with pytest.raises(ModelStateError, match="part 'target' of the model is compiled in place"):
        Explainer(model, "target")(x)


def test_weights_made_in_inference_mode(x: torch.Tensor) -> None:
    with torch.inference_mode():
        model = toy()
    for layer in ("auto", "2"):
        with pytest.raises(ModelStateError, match="inference_mode"):
            Explainer(model, layer)(x)
    with torch.inference_mode():
        model = Split(*small_heads()["pool-linear"]).eval()
    assert Explainer(model, "target")(x).finite.all()  # whose closed form differentiates nothing


class Checkpointed(nn.Module):
    """As timm does it: a stage is run block by block, past its own call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.grad_checkpointing = True
        self.layer4 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 6, 1))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing:
            for block in self.layer4:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        else:
            x = self.layer4(x)
        out: torch.Tensor = self.fc(x.mean((2, 3)).tanh())
        return out


def test_gradient_checkpointing_is_named(x: torch.Tensor) -> None:
    model = Checkpointed().eval()
    with pytest.raises(ShapleyCamError, match=r"checkpointing is on.*set_grad_checkpointing\(False\)"):
        Explainer(model, "layer4")(x)
    # A block that runs as a call of its own is explained as without checkpoints.
    raw = Explainer(model, "layer4.2")(x).raw
    model.grad_checkpointing = False
    torch.testing.assert_close(raw, Explainer(model, "layer4.2")(x).raw)
    torch.testing.assert_close(raw, Explainer(model, "layer4")(x).raw)


def test_no_private_exception_leaves(x: torch.Tensor) -> None:
    """A model that never computes what it was learned to compute."""

    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.target, self.fc, self.calls = nn.Conv2d(3, 6, 1), nn.Linear(6, 5), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            a = self.target(x)
            out: torch.Tensor = self.fc(a.mean((2, 3)) if a.abs().amax() > 3 else a.amax((2, 3)))
            return out

    torch.manual_seed(0)
    model = Restless().eval()
    result = Explainer(model, "target")(0.1 * x, 1)  # random activations are large, the images' are not
    assert result.diagnostics.engine == "reverse_over_reverse"
    assert result.finite.all()
    for exception in (ModelStateError,):
        assert issubclass(exception, ShapleyCamError)
