"""Models that take more than images: an image with a table of numbers, a Siamese pair, an image with prompts, keywords only."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shapleycam import METHODS, Explainer, InputError
from shapleycam.evaluate.metrics.functional import measure
from shapleycam.model.inputs import Inputs, Whole
from shapleycam.shapley import Game
from shapleycam.smoothing import smoothed


class Encoder(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x).tanh().mean((2, 3))
        return out


class WithNumbers(nn.Module):
    """An image and a table of numbers: the numbers join behind the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.fc = Encoder(), nn.Linear(6 + 4, 5)

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.cat((self.encoder(x), numbers), 1).sin())
        return out


class Siamese(nn.Module):
    """One encoder for the image, another for what it is compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.other, self.fc = Encoder(), Encoder(), nn.Linear(6, 5)

    def forward(self, x: Tensor, pair: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.fc((self.encoder(x) - self.other(pair["right"])) ** 2 * 50)
        return out


@dataclass
class Scores:
    logits: Tensor


class Clip(nn.Module):
    """Images by keyword, prompts besides: logits [N, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.words = Encoder(), nn.Embedding(11, 6)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Scores:
        image, text = self.encoder(pixel_values), self.words(input_ids).mean(1)
        return Scores(20 * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T)


IDS = torch.arange(15).reshape(5, 3) % 11
N = 3


def kinds(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(N, 3, 8, 8, generator=generator).double()
    numbers = torch.randn(N, 4, generator=generator).double()
    torch.manual_seed(0)
    return {
        "numbers": (WithNumbers(), {}, {"args": (numbers,)}, lambda m, i: lambda x: m(x, numbers[i])),
        "siamese": (
            Siamese(),
            {},
            {"kwargs": {"pair": {"right": right}}},
            lambda m, i: lambda x: m(x, {"right": right[i]}),
        ),
        "prompts": (
            Clip(),
            {"images_as": "pixel_values"},
            {"kwargs": {"input_ids": IDS}},
            lambda m, i: lambda x: m(IDS, x).logits,
        ),
    }


KINDS = tuple(kinds())


class Bound(nn.Module):
    """The model of one image only, with what belongs to it bound: the independent reference."""

    def __init__(self, model: nn.Module, call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.call(x)
        return out


@pytest.fixture(name="x")
def _x() -> Tensor:
    return torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(9)).double()


T = torch.tensor([1, 4, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_against_plain_autograd(kind: str, x: Tensor) -> None:
    model, options, extra, call = kinds()[kind]
    model = model.double().eval()
    raw = Explainer(model, "encoder.layer", "shapleycam-h", **options)(x, T, **extra).raw
    layers = Explainer(model, **options)(x, T, **extra).diagnostics.layers
    assert layers[0].split(".")[:2] in (["encoder", "layer"], ["other", "layer"])
    a = model.encoder.layer(x).detach().requires_grad_(True)
    handle = model.encoder.layer.register_forward_hook(lambda *_: a)
    z = call(model, slice(None))(x)
    handle.remove()
    u = (z + z.log_softmax(1)).gather(1, T[:, None]).sum()
    (g,) = torch.autograd.grad(u, a, create_graph=True)
    (h,) = torch.autograd.grad((g * a.detach()).sum(), a)
    assert h.norm() > 1e-3 * g.norm()
    torch.testing.assert_close(raw, ((g - h / 2) * a).sum(1).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "randomcam"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_cuts_what_belongs_to_the_images(kind: str, method: str, x: Tensor) -> None:
    """The batch's maps are those of the images alone, each in a model with its own arguments bound."""
    model, options, extra, call = kinds()[kind]
    model = model.double().eval()
    raw = Explainer(model, "encoder.layer", method, chunk=5, **options)(x, T, **extra).raw
    for i in range(N):
        alone = Bound(model, lambda part, i=i: call(model, torch.tensor([i] * part.shape[0]))(part)).eval()
        expected = Explainer(alone, "model.encoder.layer", method)(x[i : i + 1], T[i : i + 1]).raw
        torch.testing.assert_close(raw[i : i + 1], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_uses_pass_them_on(kind: str, x: Tensor) -> None:
    model, options, extra, call = kinds()[kind]
    model = model.double().eval()
    explainer = Explainer(model, "encoder.layer", **options)
    i = 1
    alone = Explainer(
        Bound(model, lambda part: call(model, torch.tensor([i] * part.shape[0]))(part)).eval(), "model.encoder.layer"
    )
    one, t = x[i : i + 1], T[i : i + 1]
    compared = explainer.compare(x, T, ["gradcam", "layercam"], **extra)
    torch.testing.assert_close(compared["layercam"].raw[i], alone.compare(one, t, ["layercam"])["layercam"].raw[0])
    torch.testing.assert_close(smoothed(explainer, x, T, **extra).heatmaps()[i], smoothed(alone, one, t).heatmaps()[0])
    values = Game(explainer, x, T, cells=(2, 2), **extra).exact().values
    torch.testing.assert_close(values[i], Game(alone, one, t, cells=(2, 2)).exact().values[0], rtol=1e-7, atol=1e-9)
    measured, expected = measure(explainer, x, T, ["gradcam"], **extra), measure(alone, one, t, ["gradcam"])
    for mine, theirs in zip(measured["gradcam"].tensors, expected["gradcam"].tensors, strict=True):
        torch.testing.assert_close(mine[i], theirs[0], rtol=1e-7, atol=1e-9)


def test_rows_of_inputs() -> None:
    images, per_image, shared = torch.rand(3, 3, 4, 4), torch.arange(3), torch.arange(4)
    inputs = Inputs(images, (per_image, [shared, 7]), {"a": {"b": per_image}, "c": Whole(per_image)})
    cut = inputs.rows(torch.tensor([2, 2, 0, 1]))
    assert torch.equal(cut.images, images[[2, 2, 0, 1]])
    assert cut.args[0].tolist() == [2, 2, 0, 1] and cut.args[1][0] is shared and cut.args[1][1] == 7
    assert cut.kwargs["a"]["b"].tolist() == [2, 2, 0, 1] and cut.kwargs["c"].value is per_image
    seen = {}

    class Look(nn.Module):
        def forward(self, x, *args, **kwargs):
            seen.update(kwargs)
            return x

    cut.run(Look())
    assert seen["c"] is per_image, "the model gets what is in Whole, uncut"


def test_prompts_as_many_as_images_are_declared_whole(x: Tensor) -> None:
    model, options, _, _ = kinds()["prompts"]
    model = model.double().eval()
    explainer = Explainer(model, "encoder.layer", "scorecam", **options)
    raw = explainer(x, 1, kwargs={"input_ids": Whole(IDS[:3])}).raw
    for i in range(N):
        alone = Bound(model, lambda part: model(IDS[:3], part).logits).eval()
        expected = Explainer(alone, "model.encoder.layer", "scorecam")(x[i : i + 1], 1).raw
        torch.testing.assert_close(raw[i : i + 1], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "call", "said"),
    [
        ({}, {"args": torch.ones(3)}, "args must be a tuple"),
        ({}, {"kwargs": [1]}, "kwargs must be a mapping"),
        ({"images_as": "x"}, {"kwargs": {"x": 1}}, "images_as names as the images"),
    ],
)
def test_refused(options, call, said: str, x: Tensor) -> None:
    with pytest.raises(InputError, match=said):
        Explainer(WithNumbers().double().eval(), "encoder.layer", **options)(x, **call)
    with pytest.raises(InputError, match="images_as must be the name"):
        Explainer(WithNumbers(), images_as="not a name")
