"""Smoothing by test-time augmentation, written out view by view."""

from __future__ import annotations

import pytest
import torch

from shapleycam import Explainer, InputError, ShapleyCamWarning
from shapleycam.smoothing import smoothed

from .helpers import toy


@pytest.fixture(name="batch")
def _batch() -> torch.Tensor:
    return torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("classes", [None, torch.tensor([[0, 3], [1, 4], [2, 2]])])
@pytest.mark.parametrize("method", ["shapleycam", "eigencam"])
def test_the_heatmap_is_the_mean_over_the_views(method, classes, batch):
    explainer = Explainer(toy(), "2", method)
    result = smoothed(explainer, batch, classes)
    plain = explainer(batch, classes)
    assert torch.equal(result.raw, plain.raw) and torch.equal(result.targets, plain.targets)
    for size in (None, (5, 7)):
        expected = torch.zeros(())
        for factor in (0.9, 1.0, 1.1):
            expected = expected + explainer(batch * factor, plain.targets).heatmaps(size) / 6
            expected = expected + explainer(batch.flip(3) * factor, plain.targets).heatmaps(size).flip(-1) / 6
        torch.testing.assert_close(result.heatmaps(size), expected)
    assert not torch.allclose(result.heatmaps(), plain.heatmaps(), atol=0.01)
    if classes is None:
        pixels = torch.zeros(3, 3, 8, 10, dtype=torch.uint8)
        assert not torch.equal(result.overlay(pixels), plain.overlay(pixels))


def test_one_view_is_the_image_itself(batch):
    explainer = Explainer(toy(), "2")
    result = smoothed(explainer, batch, mirror=False, factors=[1.0])
    assert torch.equal(result.heatmaps(), explainer(batch).heatmaps())
    mirrored = smoothed(explainer, batch, factors=[2])
    assert len(mirrored.views) == 2 and [flag for _, flag in mirrored.views] == [False, True]


def test_a_view_that_overflows_is_seen(batch):
    batch[1] = 3e38
    with pytest.warns(ShapleyCamWarning, match=r"images \[1\]"):
        result = smoothed(Explainer(toy(), "2"), batch, 1, factors=[1e-30, 2.0])
    assert result.finite.tolist() == [True, False, True]
    assert result.heatmaps()[1].isnan().all()


@pytest.mark.parametrize("factors", [(), (0.0,), (1, float("nan")), (float("inf"),), ("1",)])
def test_bad_factors_are_refused(factors, batch):
    with pytest.raises(InputError, match="factors"):
        smoothed(Explainer(toy(), "2"), batch, factors=factors)
