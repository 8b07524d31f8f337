"""display_map and overlay: every backend, dtype and layout against the reference in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shapleycam import InputError, ops
from shapleycam.ops import reference

from ..helpers import TOLERANCE
from .test_contract import BACKENDS, DEVICE, DTYPES, poisoned

# Enough for every path of a kernel; the interpreter is slow.
quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def maps(shape, dtype, layout="plain", seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(DEVICE)
    if layout == "last":  # the batch walks fastest
        return values.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "misaligned":
        stored = torch.full((values.numel() + 1,), float("nan"), dtype=dtype, device=DEVICE)
        stored[1:] = values.flatten()
        return stored[1:].view(shape)
    return values


def check(result, raw, size, renormalize, dtype=None):
    expected = reference.display_map(raw.double(), size, renormalize)
    assert result.is_contiguous() and result.shape == expected.shape
    if dtype == torch.uint8:
        assert result.dtype == torch.uint8
        torch.testing.assert_close(result.double(), expected * 255, rtol=0, atol=0.501)
        return
    wide = reference.accumulator(raw.dtype)
    assert result.dtype == (dtype or wide)
    rtol, atol = (1e-3, 1e-3) if dtype == torch.float16 else TOLERANCE[wide]
    torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=atol)


#: What the interpreter sees of the product, which takes it five minutes.
INTERPRETED = (("plain", torch.float32), ("last", torch.bfloat16), ("misaligned", torch.float16))
DISPLAYS = [
    pytest.param(
        *(layout, dtype, backend),
        id=f"{layout}-{dtype}-{backend}",
        marks=[pytest.mark.long] * (backend == "triton" and DEVICE == "cpu" and (layout, dtype) not in INTERPRETED),
    )
    for layout in ("plain", "last", "misaligned")
    for dtype in DTYPES
    for backend in BACKENDS
]


@pytest.mark.parametrize(("layout", "dtype", "backend"), DISPLAYS)
def test_display_map(backend, dtype, layout, monkeypatch):
    poisoned(monkeypatch)
    cases = [
        ((2, 7, 5), (19, 33)),
        ((3, 9), (4,)),
        ((2, 2, 3, 4), (5, 4, 9)),
        ((2, 4, 6), (4, 6)),
        ((2, 4, 6), (4, 9)),
    ]
    for at, (shape, size) in enumerate(cases):
        raw = maps(shape, dtype, layout)
        for index, renormalize in enumerate((True, False)):
            for column, wanted in enumerate((None, torch.float16, torch.uint8)):
                if backend == "triton" and DEVICE == "cpu" and (at + index + column) % 2:
                    continue  # the interpreter is slow: every pair of a shape, a form and a dtype is left
                result = ops.display_map(raw, size, renormalize=renormalize, dtype=wanted, backend=backend)
                check(result, raw, size, renormalize, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@quick
@given(
    images=st.integers(0, 4),
    grid=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    stretch=st.lists(st.integers(1, 40), min_size=3, max_size=3),
    layout=st.sampled_from(["plain", "last", "misaligned"]),
    dtype=st.sampled_from(DTYPES),
    renormalize=st.booleans(),
    wanted=st.sampled_from([torch.float16, torch.uint8]),
)
def test_display_map_on_any_shape(backend, images, grid, stretch, layout, dtype, renormalize, wanted):
    if backend == "triton" and DEVICE == "cpu":  # which is slow; 12 to the third is still more than a block
        images, stretch = min(images, 2), [min(s, 40 if len(grid) < 3 else 12) for s in stretch]
    raw, size = maps((images, *grid), dtype, layout), tuple(stretch[: len(grid)])
    result = ops.display_map(raw, size, renormalize=renormalize, backend=backend)
    check(result, raw, size, renormalize)
    other = ops.display_map(raw, size, renormalize=renormalize, dtype=wanted, backend=backend)
    assert other.dtype == wanted
    if wanted == torch.float16:
        assert torch.equal(other, result.half())
    else:
        assert torch.equal(other, (result.clamp(0, 1).float() * 255).round().to(torch.uint8)) or dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("size", "renormalize"), [((3, 4), True), ((7, 9), True), ((7, 9), False)])
def test_display_map_keeps_what_is_not_finite(backend, bad, size, renormalize):
    raw = maps((3, 3, 4), torch.float32)
    raw[1, 1, 2] = bad
    result, expected = (
        ops.display_map(raw, size, renormalize=renormalize, backend=backend),
        reference.display_map(raw, size, renormalize),
    )
    assert torch.equal(result.isnan(), expected.isnan()) and torch.equal(result.isinf(), expected.isinf())
    torch.testing.assert_close(result[0], expected[0])
    if renormalize:
        assert torch.equal(result[1].isnan().all(), torch.tensor(bad > 0 or bad != bad, device=DEVICE))
    as_bytes = ops.display_map(raw, size, renormalize=renormalize, dtype=torch.uint8, backend=backend)
    assert not as_bytes[expected.isnan()].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [2.0, 0.3, 1e4, -1.0])
def test_a_constant_map_is_zero_and_not_nan(backend, value):
    """Reassociated, the divisor 1e-7 + (max - min) would be 0."""
    for dtype in (torch.float32, torch.float64):
        for wanted in (None, torch.float16, torch.uint8):
            raw = torch.full((2, 3, 5), value, dtype=dtype, device=DEVICE)
            result = ops.display_map(raw, (6, 7), dtype=wanted, backend=backend)
            assert torch.equal(result, torch.zeros_like(result))


def test_display_map_dtypes():
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        with pytest.raises(InputError, match="dtype must be"):
            ops.display_map(torch.zeros(1, 2, 2), (3, 3), dtype=dtype)


def pictures(kind, shape, layout):
    n, h, w = shape
    images = torch.rand((n, 3, h, w), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    images = (images * 255).to(torch.uint8) if kind == torch.uint8 else images.to(kind)
    return images.contiguous(memory_format=torch.channels_last) if layout == "last" else images


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("layout", ["first", "last"])
def test_overlay(backend, kind, layout, monkeypatch):
    colormap = "jet" if layout == "first" else "viridis"
    shape = (2, 37, 41)
    images = pictures(kind, shape, layout)
    heat = torch.rand(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    heat[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -1.0, 2.0])
    poisoned(monkeypatch)
    for mean, std in ((None, None), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))):
        options = {"colormap": colormap, "alpha": 0.3, "mean": mean, "std": std}
        for values in (heat, heat.to(torch.float16), heat.transpose(1, 2).contiguous().transpose(1, 2)):
            result = ops.overlay(images, values, backend=backend, **options)
            expected = ops.overlay(images, values, backend="torch", **options)
            assert result.shape == (*shape, 3) and result.dtype == torch.uint8 and result.is_contiguous()
            difference = (result.int() - expected.int()).abs()
            # One level where rounding is a tie (a fused multiply-add rounds once, not twice), and that is rare.
            assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01
            assert result[0, 0, :2].tolist() == [[255, 0, 255]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_overlay_of_nothing(backend):
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        images, heat = torch.zeros(shape[0], 3, *shape[1:], device=DEVICE), torch.zeros(shape, device=DEVICE)
        assert ops.overlay(images, heat, backend=backend).shape == (*shape, 3)
