"""The quadrature's nodes against numpy, and the points of the path against their formula."""

import numpy as np
import pytest
import torch

from shapleycam import InputError, Layout
from shapleycam.derivatives.path import background, gauss_legendre, points
from shapleycam.ops.shared import MOST_NODES


@pytest.mark.parametrize("count", range(1, MOST_NODES + 1))
def test_nodes_and_weights_are_those_of_numpy(count):
    x, w = np.polynomial.legendre.leggauss(count)
    nodes, weights = gauss_legendre(count)
    assert np.allclose(nodes, (x + 1) / 2, rtol=0, atol=4e-16)
    assert np.allclose(weights, w / 2, rtol=0, atol=2e-15)  # numpy's own rounding
    assert np.isclose(sum(weights), 1, rtol=0, atol=1e-15)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16, 32])
def test_the_rule_is_exact_up_to_its_degree_and_no_further(count):
    nodes, weights = (np.array(part, dtype=np.longdouble) for part in gauss_legendre(count))
    for degree in range(2 * count):
        assert abs(float((weights * nodes**degree).sum()) - 1 / (degree + 1)) < 3e-17 * 10
    if count < 8:  # beyond, the error is below the rounding
        assert abs(float((weights * nodes ** (2 * count)).sum()) - 1 / (2 * count + 1)) > 1e-12


def test_literal_values_of_the_first_rules():
    assert gauss_legendre(1) == ((0.5,), (1.0,))
    nodes, weights = gauss_legendre(2)
    assert nodes == (0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2) or np.allclose(
        nodes, (0.21132486540518713, 0.7886751345948129), atol=1e-16
    )
    assert weights == (0.5, 0.5)


def test_points_lie_on_the_line_from_the_baseline_and_leave_other_tokens_alone():
    a = torch.randn(2, 1 + 4 + 1, 3, dtype=torch.float64)
    layout = Layout("NTC", (2, 2), prefix=1, suffix=1)
    start = background("mean", layout.view(a))
    assert torch.allclose(start, a[:, 1:5].mean(1)[:, :, None])
    found = points(a, layout, start, [0.25, 1.0])
    expected = a.clone()
    expected[:, 1:5] = a[:, 1:5].mean(1, keepdim=True) * 0.75 + a[:, 1:5] * 0.25
    assert torch.allclose(found[:2], expected, rtol=1e-14)
    assert torch.allclose(found[2:], a, rtol=1e-14)
    scaled = points(a, layout, None, [0.5])
    assert torch.equal(scaled[:, 1:5], a[:, 1:5] / 2)
    assert torch.equal(scaled[:, [0, 5]], a[:, [0, 5]])


def test_masked_points_show_the_activations_or_the_baseline():
    a = torch.randn(2, 3, 2, 2)
    layout = Layout("NCHW", (2, 2))
    keep = torch.tensor([[True, False, False, True], [False, False, True, True]])
    found = points(a, layout, torch.full((3, 1), 7.0), [0.5, 0.5], keep).view(2, 2, 3, 4)
    for p in range(2):
        for s in range(4):
            expected = a.flatten(2)[:, :, s] if keep[p, s] else torch.full((2, 3), 7.0)
            assert torch.equal(found[p, :, :, s], expected)


def test_points_keep_the_memory_format():
    a = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert points(a, Layout("NCHW", (4, 4)), None, [0.5, 0.75]).is_contiguous(memory_format=torch.channels_last)


def test_a_baseline_that_does_not_fit_is_refused():
    a = torch.zeros(2, 3, 4)
    with pytest.raises(InputError, match="broadcast to the activations \\[N, 3, 4\\], .*; got \\(5, 1\\)"):
        background(torch.zeros(5, 1), a)
    with pytest.raises(InputError, match="Unknown baseline 'blur'"):
        background("blur", a)
