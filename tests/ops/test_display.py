"""The display form and the overlay against independent computations and literal values."""

import numpy as np
import pytest
import torch

from shapleycam import InputError, ops

from ..helpers import available


def test_literal_display_map():
    raw = torch.tensor([[[-1.0, 0.0], [1.0, 3.0]]])
    # max(·, 0) and min-max: [[0, 0], [1/3, 1]]; half-pixel bilinear to 4x4: weights 1, 3/4, 1/4, 0 along each side
    small = np.array([[0, 0], [1 / 3, 1]])
    weights = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    expected = weights @ small @ weights.T
    torch.testing.assert_close(ops.display_map(raw, (4, 4))[0], torch.from_numpy(expected).float(), rtol=1e-6, atol=1e-6)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_backends_that_must_be_here_are():
    for operator in ("display_map", "overlay"):
        assert {"torch", "triton"} <= set(available(operator, DEVICE))
        assert DEVICE != "cpu" or "native" in available(operator, DEVICE)


@pytest.mark.parametrize("backend", available("display_map", DEVICE))
def test_rows_wider_than_a_block(backend):
    raw = torch.randn(1, 2, 1500, device=DEVICE)
    expected = ops.reference.display_map(raw.double(), (3, 1700), True)
    torch.testing.assert_close(ops.display_map(raw, (3, 1700), backend=backend).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", available("overlay", DEVICE))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_overlay_on_every_backend(backend, dtype, last, normalised):
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(2, 3, 17, 23, generator=generator) * 1.2 - 0.1
    images = (images.clamp(0, 1) * 255).to(torch.uint8) if dtype == torch.uint8 else images.to(dtype)
    images = images.to(DEVICE)
    images = images.contiguous(memory_format=torch.channels_last) if last else images
    heat = (torch.rand(2, 17, 23, generator=generator) * 1.2 - 0.1).to(DEVICE)
    heat[0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    options = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)} if normalised else {}
    for colormap, alpha in (("jet", 0.5), ("viridis", 0.3), ("turbo", 0.0), ("magma", 1.0)):
        arguments = dict(colormap=colormap, alpha=alpha, **options)
        result = ops.overlay(images, heat, backend=backend, **arguments)
        expected = ops.overlay(images, heat, backend="torch", **arguments)
        assert result.dtype == torch.uint8
        assert result[0, 0, :3].tolist() == [[255, 0, 255]] * 3
        # Where the sum lies half-way between two bytes, the order of the additions decides.
        assert (result.int() - expected.int()).abs().max() <= 1
        assert (result != expected).float().mean() < 0.01


def test_against_opencv():
    cv2 = pytest.importorskip("cv2")
    raw = torch.randn(3, 7, 9, generator=torch.Generator().manual_seed(0))
    result = ops.display_map(raw, (50, 33))
    for r, m in zip(raw.numpy(), result.numpy(), strict=True):
        r = np.maximum(r, 0)
        r = (r - r.min()) / (1e-7 + (r - r.min()).max())
        r = cv2.resize(r, (33, 50))
        r = (r - r.min()) / (1e-7 + (r - r.min()).max())
        np.testing.assert_allclose(m, r, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4), (2, 2, 3, 4), (0, 3, 4)])
def test_dimensions_and_range(shape):
    raw = torch.randn(shape)
    size = tuple(2 * s + 1 for s in shape[1:])
    result = ops.display_map(raw, size)
    assert result.shape == (shape[0], *size)
    if shape[0]:
        assert result.amin() == 0 and result.flatten(1).amax(1).min() > 0.999


def test_constant_and_dead_maps_are_zero():
    assert not ops.display_map(torch.full((1, 3, 3), 2.0), (5, 5)).any()
    assert not ops.display_map(torch.full((1, 3, 3), -2.0), (5, 5)).any()


def test_nan_stays():
    raw = torch.rand(2, 3, 3)
    raw[1, 0, 0] = float("nan")
    result = ops.display_map(raw, (6, 6))
    assert result[0].isfinite().all() and result[1].isnan().all()


@pytest.mark.parametrize("name", ["viridis", "magma", "turbo", "jet"])
def test_colour_maps_are_the_known_ones(name):
    colormaps = pytest.importorskip("matplotlib").colormaps
    table = ops.table_of(name, torch.device("cpu")).float() / 255
    expected = torch.tensor(colormaps[name](np.linspace(0, 1, 256))[:, :3]).float()
    # jet: ours is the symmetric formula, matplotlib's is piecewise with slightly different corners
    assert (table - expected).abs().max() <= (0.14 if name == "jet" else 0.5 / 255 + 1e-6)


def test_overlay():
    images = torch.zeros(1, 3, 2, 2)
    images[0, 0] = 1.0  # red
    heat = torch.tensor([[[0.0, 1.0], [float("nan"), float("inf")]]])
    jet = ops.table_of("jet", torch.device("cpu"))
    result = ops.overlay(images, heat, alpha=0.25)
    assert result.dtype == torch.uint8 and result.shape == (1, 2, 2, 3)
    red = torch.tensor([255.0, 0, 0])
    for at, index in (((0, 0), 0), ((0, 1), 255)):
        torch.testing.assert_close(result[0][at].float(), 0.75 * red + 0.25 * jet[index].float(), atol=0.51, rtol=0)
    assert result[0, 1].tolist() == [[255, 0, 255]] * 2
    as_bytes = ops.overlay((images * 255).to(torch.uint8), heat, alpha=0.25)
    assert torch.equal(as_bytes, result)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.equal(ops.overlay(normalised, heat, alpha=0.25, mean=mean, std=std), result)


def test_overlay_arguments():
    images, heat = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2)
    for arguments, options, match in [
        ((images[0], heat), {}, r"\[N, 3, H, W\]"),
        ((images, heat[:, :1]), {}, "heatmaps must be"),
        ((images, heat), {"alpha": 2}, "between 0 and 1"),
        ((images, heat), {"mean": (0, 0, 0)}, "both mean and std"),
        ((images, heat), {"mean": (0, 0), "std": (1, 1)}, "three numbers"),
        ((images, heat), {"colormap": "virdis"}, "Did you mean 'viridis'"),
        ((images.long(), heat), {}, "images must be float16"),
    ]:
        with pytest.raises(InputError, match=match):
            ops.overlay(*arguments, **options)
