"""Bad input gets a clear error, before any work is lost, and never a pretty map."""

import pytest
import torch
from torch import nn

from shapleycam import (
    Explainer,
    InputError,
    LayerError,
    ModelStateError,
    ShapleyCamError,
    ShapleyCamWarning,
    TargetError,
)

from .helpers import Split, small_heads, toy

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("images", "match"),
    [
        (X[:0], "empty batch"),
        (X[0], r"images\[None\]"),
        (X[None], "4 dimensions"),
        (X[:, :2], "3 channels"),
        (X.movedim(1, -1), "movedim"),
        ((X * 255).to(torch.uint8), "float\\(\\) / 255"),
        (X.numpy(), "ndarray"),
        (X.double(), "float64"),
        (X.to("meta"), "meta"),
    ],
    ids=["empty", "no batch", "rank", "channels", "channels last", "integer", "numpy", "dtype", "device"],
)
def test_images(images, match, prepared):
    explainer = Explainer(toy())
    if prepared:
        explainer.prepare(X)
    with pytest.raises(InputError, match=match):
        explainer(images)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("engine", ["auto", "forward_over_reverse", "midpoint"])
@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (5, "target 5 is out of range"),
        (-1, "target -1 is out of range"),
        (torch.tensor([0, 7]), "target 7"),
        ([0, 7], "target 7"),
        (torch.tensor([0, 1, 2]), r"\[2\] or \[2, M\]"),
        (torch.tensor([[0], [1], [2]]), r"\[2\] or \[2, M\]"),
        (torch.zeros(2, 0, dtype=torch.int64), r"\[2\] or \[2, M\]"),
        (torch.tensor(3), r"\[2\] or \[2, M\]"),
        (torch.tensor([0.0, 1.0]), "float32"),
        (torch.tensor([True, False]), "bool"),
        (True, "bool"),
        ("cat", "str"),
        ([[0, 1], [2]], "rectangular"),
    ],
)
def test_targets(targets, match, engine, prepared):
    explainer = Explainer(toy(), engine=engine)
    if prepared:
        explainer.prepare(X)
    with pytest.raises(TargetError, match=match):
        explainer(X, targets)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("head", ["pool-linear", "flatten-mlp"])
@pytest.mark.parametrize("method", ["shapleycam", "layercam", "randomcam"])
def test_nan_and_inf_in_an_image_are_reported_and_stay_nan(bad, head, method):
    model = Split(*small_heads()[head]).eval()
    x = X[:, :, :4, :4].clone()
    explainer = Explainer(model, "target", method, seed=0)
    explainer.prepare(x)
    clean = explainer(x).raw
    x[1, 0, 2, 2] = bad
    explainer = Explainer(model, "target", method, seed=0)
    explainer.prepare(X[:, :, :4, :4])
    with pytest.warns(ShapleyCamWarning, match=r"images \[1\] are not finite"):
        result = explainer(x)
    assert result.finite.tolist() == [True, False]
    assert result.raw[1].isnan().all() and result.heatmaps()[1].isnan().all()
    torch.testing.assert_close(result.raw[0], clean[0])
    with pytest.raises(InputError, match=r"images \[1\]"):
        result.check()


def test_an_inf_that_the_network_swallows_is_still_reported():
    class Squash(nn.Module):
        def forward(self, x):
            return x.sigmoid()

    model = nn.Sequential(Squash(), *toy()).eval()
    x = X.clone()
    x[0, 0, 0, 0] = float("inf")
    with pytest.warns(ShapleyCamWarning, match=r"images \[0\]"):
        result = Explainer(model)(x)
    assert result.logits.isfinite().all() and result.raw[0].isnan().all() and result.finite.tolist() == [False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_in_the_activations(bad):
    class Break(nn.Module):
        def forward(self, a):
            a = a.clone()
            a[1, 2, 1, 1] = bad
            return a

    model = Split(nn.Sequential(nn.Conv2d(3, 6, 1), Break()), small_heads()["pool-linear"][1]).eval()
    with pytest.warns(ShapleyCamWarning, match=r"images \[1\]"):
        result = Explainer(model, "target")(X)
    assert result.finite.tolist() == [True, False]
    assert result.heatmaps()[1].isnan().any()


def test_layers():
    model = toy()
    with pytest.raises(LayerError, match="Nearest: .*'0'"):
        Explainer(model, "00")
    with pytest.raises(LayerError, match="not part of the model"):
        Explainer(model, nn.Conv2d(3, 3, 1))
    with pytest.raises(LayerError, match="twice"):
        Explainer(model, ["0", model[0]])
    with pytest.raises(LayerError, match="empty list"):
        Explainer(model, [])
    with pytest.raises(LayerError, match="3"):
        Explainer(model, 3)
    with pytest.raises(LayerError, match="three dimensions or more"):
        Explainer(model, "6")(X)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.spare, self.fc = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 4)

        def forward(self, x):
            return self.fc(self.conv(self.conv(x)).mean((2, 3))).tanh()

    with pytest.raises(LayerError, match="'conv' was reached twice"):
        Explainer(Twice().eval(), "conv")(X)
    with pytest.raises(LayerError, match="'spare' was not reached"):
        Explainer(Twice().eval(), "spare")(X)


@pytest.mark.parametrize("module", [nn.BatchNorm2d(6), nn.Dropout(0.5)])
def test_training_mode_is_refused_and_left(module):
    model = toy()
    model.insert(1, module.train())
    with pytest.raises(ModelStateError, match=r"training mode \(1\).*model.eval\(\)"):
        Explainer(model)(X)
    assert module.training
    model.eval()
    explainer = Explainer(model)
    explainer(X)
    model.train()
    with pytest.raises(ModelStateError, match="training mode"):
        explainer(X)
    assert model.training


def test_training_mode_of_modules_that_do_not_care_is_fine():
    model = toy()
    expected = Explainer(model)(X).raw
    assert torch.equal(Explainer(model.train())(X).raw, expected)
    assert model.training


def test_models_and_choices():
    with pytest.raises(ModelStateError, match="torch.nn.Module"):
        Explainer(lambda x: x)
    with pytest.raises(ModelStateError, match="_orig_mod"):
        Explainer(torch.compile(toy()))
    with pytest.raises(InputError, match="Unknown engine 'exact'"):
        Explainer(toy(), engine="exact")
    with pytest.raises(InputError, match="Unknown backend 'rocm'"):
        Explainer(toy(), backend="rocm")
    with pytest.raises(InputError, match="Did you mean 'shapleycam'"):
        Explainer(toy(), method="shapley-cam")


def test_overlay_arguments():
    result = Explainer(toy())(X)
    for images in (X[:1], X[0], "x"):
        with pytest.raises(InputError, match="images"):
            result.overlay(images)


def test_a_classifier_of_zeros_has_no_layer_to_explain():
    model = toy()
    nn.init.zeros_(model[-1].weight)
    with pytest.raises(LayerError, match="No gradient reaches any.*classifier all zeros"):
        Explainer(model)(X)


def test_one_family():
    for error in (InputError, TargetError, LayerError, ModelStateError):
        assert issubclass(error, ShapleyCamError)
    assert issubclass(TargetError, ValueError) and issubclass(ModelStateError, RuntimeError)
