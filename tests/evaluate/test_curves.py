"""Insertion, deletion and ROAD against per-image references, and ROAD against pytorch-grad-cam."""

import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchmetrics")

from shapleycam import InputError
from shapleycam.evaluate.metrics.curves import area, blur, deletion, insertion
from shapleycam.evaluate.metrics.road import impute, road
from shapleycam.metrics import ROAD, DeletionAUC, InsertionAUC


class MeanPixel(nn.Module):
    """Two classes whose probabilities are known by heart: p_1 = the mean of the first channel."""

    def forward(self, x):
        mean = x[:, 0].flatten(1).mean(1).clamp(1e-6, 1 - 1e-6)
        return torch.stack((torch.log1p(-mean), mean.log()), 1)


def test_literal_curves():
    images = torch.ones(1, 3, 2, 2)
    maps = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]])
    ones = torch.ones(1, dtype=torch.int64)
    assert deletion(MeanPixel(), images, maps, ones, steps=4)[0].tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-5)
    up = insertion(MeanPixel(), images, maps, ones, steps=2, baseline="zero")
    assert up[0].tolist() == pytest.approx([0, 0.5, 1], abs=1e-5)
    assert area(up).tolist() == pytest.approx([0.5], abs=1e-5)
    assert area(torch.tensor([[0.0, 1.0, 1.0]])).tolist() == [0.75]


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("baseline", ["zero", "blur"])
def test_against_a_loop(images, model, steps, baseline):
    maps = torch.rand(6, 20, 24).mul(8).floor() / 8  # with ties
    targets = torch.tensor([0, 1, 2, 3, 4, 5])
    start = images if baseline == "blur" else torch.zeros_like(images)
    got = insertion(model, images, maps, targets, steps=steps, baseline=baseline, chunk=5)
    for n in range(6):
        order = np.argsort(-maps[n].numpy().reshape(-1), kind="stable")
        from_ = blur(images[n : n + 1])[0] if baseline == "blur" else start[n] * 0
        for k in range(steps + 1):
            x, taken = from_.clone().reshape(3, -1), order[: round(k * 480 / steps)]
            x[:, taken] = images[n].reshape(3, -1)[:, taken]
            with torch.no_grad():
                p = model(x.view(1, 3, 20, 24)).softmax(1)[0, n]
            assert float(got[n, k]) == pytest.approx(float(p), abs=1e-5)


class Conditioned(nn.Module):
    """Takes the images by keyword and a number per image besides, and returns its logits inside a mapping."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, shift, *, pixels):
        return {"features": shift, "scores": self.model(pixels) + shift}


def test_models_that_take_and_return_more(images, model):
    torch.manual_seed(0)
    maps, targets, shift = torch.rand(6, 20, 24), torch.arange(6), torch.randn(6, 1) * torch.arange(7.0)
    given = {"output": "scores", "args": (shift,), "images_as": "pixels"}
    for measure in (insertion, deletion, road):
        got = measure(Conditioned(model), images, maps, targets, **given)
        for n in range(6):  # alone, with its own number
            alone = nn.Sequential(model, Shift(shift[n]))
            expected = measure(alone, images[n : n + 1], maps[n : n + 1], targets[n : n + 1])
            close = 1e-4 if measure is not road else 5e-3  # road draws noise
            assert torch.allclose(got[n], expected[0], atol=close), (measure, n)
    metric = InsertionAUC(steps=3)
    metric.update(Conditioned(model), images, maps, targets, **given)
    plain = insertion(Conditioned(model), images, maps, targets, steps=3, **given)
    assert float(metric.compute()) == pytest.approx(float(area(plain).mean()), abs=1e-9)
    with pytest.raises(InputError, match="'logits'"):
        insertion(Conditioned(model), images, maps, targets, args=(shift,), images_as="pixels", output="logits")


class Shift(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, logits):
        return logits + self.by


def test_blur_is_a_gaussian():
    from scipy.ndimage import gaussian_filter

    x = torch.zeros(1, 2, 31, 31, dtype=torch.float64)
    x[0, 0, 15, 15] = 1
    x[0, 1, 10:20, 12:18] = 2
    expected = np.stack([gaussian_filter(x[0, c].numpy(), 5, radius=5, mode="constant") for c in range(2)])
    torch.testing.assert_close(blur(x)[0], torch.from_numpy(expected), rtol=0, atol=1e-12)


def system_per_image(image, known):
    """The linear system of ROAD, pixel by pixel, solved densely."""
    c, h, w = image.shape
    unknown = [(y, x) for y in range(h) for x in range(w) if not known[y, x]]
    place = {yx: i for i, yx in enumerate(unknown)}
    matrix, right = np.zeros((len(unknown),) * 2), np.zeros((len(unknown), c))
    for (y, x), i in place.items():
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if (dy, dx) == (0, 0) or not (0 <= y + dy < h and 0 <= x + dx < w):
                    continue
                weight = 1 / 6 if dy == 0 or dx == 0 else 1 / 12
                matrix[i, i] += weight
                if known[y + dy, x + dx]:
                    right[i] += weight * image[:, y + dy, x + dx]
                else:
                    matrix[i, place[y + dy, x + dx]] -= weight
    filled = image.copy()
    for (y, x), values in zip(unknown, np.linalg.solve(matrix, right), strict=True):
        filled[:, y, x] = values
    return filled


@pytest.mark.parametrize("share", [0.05, 0.5, 0.97])
def test_imputation_against_a_dense_solver(share):
    images = torch.randn(3, 3, 13, 17, dtype=torch.float64)
    known = torch.rand(3, 13, 17) > share
    known[0, :, :] = False
    known[0, 0, 0] = True  # a single pixel is known: all others take its value
    got = impute(images, known, noise=0)
    for n in range(3):
        expected = system_per_image(images[n].numpy(), known[n].numpy())
        torch.testing.assert_close(got[n], torch.from_numpy(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(got[0], images[0, :, :1, :1].expand(3, 13, 17), rtol=0, atol=1e-6)


def test_imputation_like_pytorch_grad_cam():
    peer = pytest.importorskip("pytorch_grad_cam.metrics.road")
    images = torch.randn(2, 3, 40, 40)
    coarse = torch.rand(2, 1, 5, 5)
    maps = nn.functional.interpolate(coarse, size=(40, 40), mode="bilinear")[:, 0]
    known = maps < maps.flatten(1).quantile(0.3, 1)[:, None, None]
    got = impute(images, known, noise=0)
    for n in range(2):
        expected = peer.NoisyLinearImputer(noise=0)(images[n], known[n].float())
        torch.testing.assert_close(got[n], expected, rtol=0, atol=1e-5)


def test_road_is_pytorch_grad_cams(images, model, monkeypatch):
    peer = pytest.importorskip("pytorch_grad_cam.metrics.road")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    monkeypatch.setattr(peer.NoisyLinearImputer.__init__, "__defaults__", (0.0, peer.neighbors_weights))
    maps = nn.functional.interpolate(torch.rand(6, 1, 4, 4), size=(20, 24), mode="bilinear")[:, 0]
    classes = torch.tensor([0, 1, 2, 3, 4, 5])
    percentiles = [10, 40, 90]
    theirs = peer.ROADCombined(percentiles)(
        images, maps.numpy(), [targets.ClassifierOutputSoftmaxTarget(c) for c in classes.tolist()], model
    )
    ours = road(model, images, maps, classes, percentiles=percentiles, noise=0)
    assert float(ours.abs().max()) > 1e-3
    assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-5)


def test_noise_is_seeded_and_of_the_size_asked_for():
    images, known = torch.zeros(1, 1, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    known[:, ::2] = True
    seeded = [impute(images, known, noise=0.5, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    assert float(seeded[0][:, :, 1::2].std()) == pytest.approx(0.5, rel=0.1)
    assert not seeded[0][:, :, ::2].any()


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_constant_maps_are_finite_and_nan_is_nan(images, model, value):
    maps = torch.full((6, 20, 24), value)
    classes = torch.zeros(6, dtype=torch.int64)
    assert road(model, images, maps, classes, percentiles=[50]).isfinite().all()
    maps[2] = math.nan
    score = road(model, images, maps, classes, percentiles=[50])
    assert score.isnan().tolist() == [False, False, True, False, False, False]
    images = images.clone()
    images[1, 0, 0, 0] = math.nan
    metric = ROAD([50])
    metric.update(model, images, torch.rand(6, 20, 24), classes)
    assert int(metric.skipped) == 1


def test_metrics_are_means_over_images(images, model):
    maps, classes = torch.rand(6, 20, 24), torch.arange(6)
    for metric, values in (
        (DeletionAUC(steps=5), area(deletion(model, images, maps, classes, steps=5))),
        (InsertionAUC(steps=5), area(insertion(model, images, maps, classes, steps=5))),
        (ROAD([30, 60], noise=0), road(model, images, maps, classes, percentiles=[30, 60], noise=0)),
    ):
        two = metric.clone()
        metric.update(model, images[:4], maps[:4], classes[:4])
        two.update(model, images[4:], maps[4:], classes[4:])
        metric.merge_state(two)
        assert float(metric.compute()) == pytest.approx(float(values.mean()), abs=1e-7)


def test_refuses(images, model):
    maps, classes = torch.rand(6, 20, 24), torch.arange(6)
    with pytest.raises(InputError, match="Unknown baseline"):
        deletion(model, images, maps, classes, baseline="grey")
    with pytest.raises(InputError, match="at least 1"):
        deletion(model, images, maps, classes, steps=0)
    with pytest.raises(InputError, match="broadcast"):
        insertion(model, images, maps, classes, baseline=torch.zeros(5))
    with pytest.raises(InputError, match="Expected images"):
        insertion(model, images, maps[:, 1:], classes)
    with pytest.raises(InputError, match="between 0 and 100"):
        road(model, images, maps, classes, percentiles=[0])
    with pytest.raises(InputError, match="known"):
        impute(images, maps[:2] > 0.5)
