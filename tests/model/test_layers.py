"""layer="auto" chooses a layer that is all of what the target reads, at the price of a forward pass, or says its doubts."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from shapleycam import Explainer, LayerError, Layout, ShapleyCamWarning
from shapleycam.model.layers import find_layer, survey
from shapleycam.model.reach import Question
from shapleycam.utilities.named import get_utility
from shapleycam.utilities.tasks import SegmentationScore

from ..helpers import toy


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def auto(model: nn.Module, images: Tensor, utility="rest"):
    seen = survey(model.eval(), images, gradients=True)
    return find_layer(model, seen, images.shape, get_utility(utility), "auto")[0], seen


class Branches(nn.Module):
    """Two branches, joined by a module or by an operator without one."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.two = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 4, 3), nn.Conv2d(6, 4, 3)
        self.join, self.fc = nn.SiLU() if joined else None, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem(x)
        a = torch.cat((self.one(a), self.two(a)), 1)
        return self.fc((a if self.join is None else self.join(a)).mean((2, 3)).tanh())


def test_a_branch_loses_against_what_joins_or_is_doubted():
    assert auto(Branches(True), noise(2, 3, 16, 16))[0] == "join"
    name, seen = auto(Branches(False), noise(2, 3, 16, 16))
    assert name == "two" and "only a part" in seen.notes[0]  # the stem has another grid
    with pytest.warns(ShapleyCamWarning, match="'two', but that is only a part"):
        Explainer(Branches(False).eval())(noise(2, 3, 16, 16))


def test_a_skip_connection_of_the_same_grid_is_passed_over():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.trunk, self.branch, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 5)

        def forward(self, x):
            a = self.trunk(x)
            return self.fc((a + self.branch(a)).relu().mean((2, 3)))

    name, seen = auto(Residual(), noise(2, 3, 16, 16))
    assert name == "trunk" and not seen.notes


def test_the_study_keeps_shapes_and_no_graph_over_the_trunk():
    model = nn.Sequential(*[layer for _ in range(20) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.SiLU())])
    model = nn.Sequential(nn.Conv2d(3, 4, 1), model, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    images, graphs = noise(2, 3, 8, 8), []
    seen = survey(model, images, gradients=True)
    assert all(record.output.is_meta for record in seen.records if record.output.ndim > 2)
    assert not seen.logits.requires_grad
    handles = [part.register_forward_hook(lambda m, a, out: graphs.append(out.requires_grad)) for part in model[1]]
    find_layer(model, seen, images.shape, get_utility("rest"), "auto")
    for handle in handles:
        handle.remove()
    assert 0 < sum(graphs) <= 4 and len(graphs) == 40, "one forward pass, with a graph over its end only"


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("first", [None, "0", "2"])
def test_gradients_are_autograds_wherever_the_graph_begins(first, frozen):
    model, images = toy().double().requires_grad_(not frozen), noise(2, 3, 8, 8).double()
    question = Question(model, survey(model, images, True), get_utility("rest"))
    found = question.gradients(first, {"2": Layout("NCHW", (8, 8))} | ({} if first == "2" else {"0": Layout("NCHW", (8, 8))}))
    a = model[:3](images).detach().requires_grad_()
    z = model[3:](a.clone())
    picked = z.gather(1, z.argmax(1, keepdim=True))[:, 0]
    (expected,) = torch.autograd.grad((2 * picked - z.logsumexp(1)).sum(), a)
    # The next module writes into this one's output: what is told is the gradient behind it, where that is not zero.
    nonzero = found.gradients["2"] * (a > 0)
    torch.testing.assert_close(nonzero, expected, rtol=1e-10, atol=1e-13)


def test_a_constant_map_is_no_layer_and_breaks_nothing():
    class Embedded(nn.Module):
        """As in DETR: positions are added to features, from a module that returns a constant."""

        def __init__(self, learned):
            super().__init__()
            torch.manual_seed(0)
            self.features, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5)
            self.position = Constant(learned)

        def forward(self, x):
            return self.fc((self.features(x) + self.position(x)).tanh().mean((2, 3)))

    class Constant(nn.Module):
        def __init__(self, learned):
            super().__init__()
            self.map = nn.Parameter(torch.randn(1, 6, 8, 8), requires_grad=learned)

        def forward(self, x):
            return self.map.expand(x.shape[0], -1, -1, -1) * 1.0

    for learned in (False, True):
        assert auto(Embedded(learned), noise(2, 3, 8, 8))[0] == "features"


def test_a_map_per_class_is_no_feature_map():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.SiLU(), nn.Conv2d(12, 4, 1), nn.Upsample(scale_factor=2))
    assert auto(model, noise(2, 3, 8, 8), SegmentationScore(mask=torch.ones(12, 12)))[0] == "1"


class Sequence1d(nn.Module):
    def __init__(self, kind: str, length: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 32, 5, 2, 2)
        self.body = {
            "norm": nn.LayerNorm(32),
            "lstm": nn.LSTM(32, 32, batch_first=True),
            "transformer": nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 32, batch_first=True), 1),
        }[kind]
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        t = self.body(self.conv(x).transpose(1, 2))
        return self.fc((t[0] if isinstance(t, tuple) else t).mean(1).tanh())


@pytest.mark.parametrize("length", [64, 100])
@pytest.mark.parametrize("kind", ["norm", "transformer"])
def test_time_before_features(kind, length):
    result = Explainer(Sequence1d(kind).eval())(noise(2, 2, length))
    assert result.diagnostics.layers[0].startswith("body") and result.diagnostics.layouts == (Layout("NTC", (length // 2,)),)


def test_all_zero_maps_are_said_beforehand():
    class ClassToken(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.patches, self.norm, self.last = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.LayerNorm(6)
            self.attention, self.fc = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 5)

        def forward(self, x):
            t = self.patches(x).flatten(2).transpose(1, 2)
            t = self.norm(torch.cat((t.mean(1, keepdim=True), t), 1))
            return self.fc(self.last(t + self.attention(t, t, t)[0])[:, 0])

    images = noise(2, 3, 16, 16)
    with pytest.warns(ShapleyCamWarning, match=r"'last', only its class token.*layer='auto' would take 'norm'"):
        result = Explainer(ClassToken().eval(), "last")(images)
    assert not result.raw.any()
    single = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 6, 1), nn.Flatten(), nn.Linear(6, 5)
    )
    with pytest.warns(ShapleyCamWarning, match="'3' has a single position.*would take '1'"):
        Explainer(single.eval(), "3")(noise(2, 3, 8, 8))
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 12, 3), nn.SiLU(), nn.Conv2d(12, 4, 1)).eval()
    with torch.no_grad():
        dense[2].bias[3] = -1e4  # a class that nobody predicts
    with pytest.warns(ShapleyCamWarning, match="a class that no pixel is predicted to have"):
        Explainer(dense, "1", utility=SegmentationScore(3))(images)


@pytest.mark.parametrize("utility", ["rest", "probability", "logit"])
def test_one_logit(utility):
    model = toy(classes=1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Explainer(model, "2", utility=utility)(noise(2, 3, 8, 8))
    assert any("sigmoid" in str(w.message) for w in said) == (utility != "logit")


def test_the_reason_why_nothing_is_found_is_the_true_one():
    images = noise(2, 3, 8, 8)
    with pytest.raises(LayerError, match="constant for its single logit"):
        Explainer(toy(classes=1), utility="probability")(images)
    cut = nn.Sequential(toy()[:2], Cut(), nn.Linear(6, 5)).eval()
    with pytest.raises(LayerError, match="detaches"):
        Explainer(cut)(images)


class Cut(nn.Module):
    def forward(self, a: Tensor) -> Tensor:
        return a.detach().mean((2, 3))
