"""utility_rows with nodes, on every backend: against autograd along the path in float64, and on awkward arguments."""

import math
import types

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shapleycam import BackendError, DerivativeError, InputError, ops
from shapleycam.ops.backends import LADDER, Call, compiled
from shapleycam.ops.backends.native import Native
from shapleycam.ops.shared import MOST_NODES
from shapleycam.ops.shared import UTILITIES as NAMES
from shapleycam.utilities import UTILITIES

from ..helpers import available
from .test_head import DEVICE, DTYPES, close, draw

BACKENDS = available("quadrature_rows", DEVICE)
COUNTS = (1, 2, 3, 4, 8, 32)


def rule(count, seed=0):
    """Nodes and weights without any order or symmetry that a kernel could rely on."""
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.rand(count, generator=generator, dtype=torch.float64)
    weights = torch.randn(count, generator=generator, dtype=torch.float64)
    return nodes.tolist(), weights.tolist()


def by_autograd(z, targets, start, utility, nodes, weights, scale):
    """[N, M, K] in float64 by differentiating U at every point of the path; NaN for a target that is no class."""
    z, start = z.double().cpu(), start.double().cpu()
    n, k = z.shape
    rows = torch.full((n, targets.shape[1], k), math.nan, dtype=torch.float64)
    for m in range(targets.shape[1]):
        c = targets[:, m].cpu()
        known = (c >= 0) & (c < k)
        total = torch.zeros_like(z)
        for t, w in zip(nodes, weights, strict=True):
            leaf = (start + t * (z - start)).requires_grad_(True)
            value = UTILITIES[utility].value(leaf, c.clamp(0, k - 1))
            total += w * torch.autograd.grad(value.sum(), leaf)[0]
        rows[known, m] = scale * total[known]
    return rows.to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("utility", NAMES)
@pytest.mark.parametrize("start", ["zero", "bias", "base"])
def test_rows_are_the_integral_of_the_gradient(backend, utility, start):
    z, targets = draw(3, 11, dtype=torch.float64, scale=2.0), torch.tensor([[0, 10], [3, 3], [7, 11]], device=DEVICE)
    begin = {
        "zero": draw(3, 11, dtype=torch.float64, scale=0.0),
        "bias": draw(11, dtype=torch.float64, seed=1).expand(3, 11),
        "base": draw(3, 11, dtype=torch.float64, seed=1, scale=2.0),
    }[start]
    how = {"bias": {"bias": begin[0]}, "base": {"base": begin}}.get(start, {})
    for count in COUNTS:
        nodes, weights = rule(count)
        rows = ops.utility_rows(z, targets, utility=utility, scale=0.3, nodes=nodes, weights=weights, backend=backend, **how)
        expected = by_autograd(z, targets, begin, utility, nodes, weights, 0.3)
        assert torch.equal(rows.isnan(), expected.isnan())
        torch.testing.assert_close(rows, expected, rtol=1e-11, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    n=st.integers(0, 4),
    m=st.integers(0, 6),
    k=st.one_of(st.integers(1, 70), st.sampled_from([257, 1000, 1025, 2100])),
    count=st.sampled_from(COUNTS),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    start=st.sampled_from(["zero", "bias", "base"]),
    utility=st.sampled_from(NAMES),
    strided=st.sampled_from(["plain", "rows", "columns", "expanded"]),
)
def test_rows_on_any_shape(backend, n, m, k, count, dtypes, start, utility, strided):
    def placed(values):
        if strided == "rows":
            return torch.cat((values, values), 1)[:, :k]
        if strided == "columns":
            return values.repeat_interleave(2, 1)[:, ::2]
        return values[:1].expand(n, k) if strided == "expanded" and n else values

    z, nodes_weights = placed(draw(n, k, dtype=dtypes[0], scale=3.0)), rule(count)
    how, begin = {}, torch.zeros(n, k)
    if start == "bias":
        how["bias"] = placed(draw(1, k, dtype=dtypes[1], seed=1))[0] if strided != "expanded" else draw(k, dtype=dtypes[1])
        begin = how["bias"].expand(n, k)
    elif start == "base":
        how["base"] = begin = placed(draw(n, k, dtype=dtypes[1], seed=1, scale=3.0))
    # Some classes are out of range, on either side.
    targets = torch.randint(-max(1, k // 10), k + max(1, k // 10), (n, m), generator=torch.Generator().manual_seed(2)).to(
        DEVICE
    )
    nodes, weights = nodes_weights
    result = ops.utility_rows(z, targets, utility=utility, scale=0.1, nodes=nodes, weights=weights, backend=backend, **how)
    assert result.shape == (n, m, k)
    assert torch.equal(result.isnan().all(2), (targets < 0) | (targets >= k))
    close(result, by_autograd(z, targets, begin, utility, nodes, weights, 0.1), dtypes[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("utility", NAMES)
def test_one_node_at_the_end_is_the_gradient(backend, utility):
    z, bias = draw(2, 1000, scale=3.0), draw(1000, seed=1)
    targets = torch.tensor([[0, 999], [17, 5]], device=DEVICE)
    for start in ({}, {"bias": bias}, {"base": draw(2, 1000, seed=2)}):
        one = ops.utility_rows(z, targets, utility=utility, nodes=(1.0,), weights=(1,), backend=backend, **start)
        order_1 = ops.utility_rows(z, targets, start.get("bias"), utility=utility, order=1, backend=backend)
        torch.testing.assert_close(one, order_1, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("utility", ["probability", "rest"])
def test_many_classes(backend, dtype, utility):
    z, base = draw(1, 21841, dtype=dtype, scale=3.0), draw(1, 21841, dtype=dtype, seed=1)
    targets = torch.tensor([[20000, 3]], device=DEVICE)
    for count in (1, 5):
        nodes, weights = rule(count)
        result = ops.utility_rows(z, targets, utility=utility, nodes=nodes, weights=weights, base=base, backend=backend)
        expected = by_autograd(z, targets, base, utility, nodes, weights, 1.0)
        close(result, expected, dtype)
        # By class, since the explained one is larger than all others by far.
        others = result.double().clone()
        others[0, 0, 20000] = others[0, 1, 3] = expected[0, 0, 20000] = expected[0, 1, 3] = 0.0
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(others, expected, rtol=tolerance, atol=tolerance * expected.abs().amax().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 3, 32])
def test_one_logit(backend, count):
    nodes, weights = rule(count)
    z, targets = draw(2, 1), torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    for utility, gradient in (("rest", 1.0), ("log_probability", 0.0), ("probability", 0.0), ("logit", 1.0)):
        rows = ops.utility_rows(z, targets, utility=utility, nodes=nodes, weights=weights, backend=backend)
        torch.testing.assert_close(rows, torch.full_like(rows, gradient * sum(weights)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["logits", "base"])
@pytest.mark.parametrize("at", [0, 4, 1000])
@pytest.mark.parametrize("utility", ["probability", "rest"])
def test_a_logit_that_is_not_finite_spoils_its_image_alone(backend, bad, place, at, utility):
    tensors = {"logits": draw(3, 1001), "base": draw(3, 1001, seed=1)}
    tensors[place][1, at] = bad
    rows = ops.utility_rows(
        **tensors,
        targets=torch.tensor([[2], [2], [2]], device=DEVICE),
        utility=utility,
        nodes=(0.2, 0.7, 0.5),
        weights=(0.25, 0.5, 0.25),
        backend=backend,
    )
    assert rows[0].isfinite().all() and rows[2].isfinite().all()
    assert rows[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_that_is_masked_out_has_no_part(backend, dtype):
    """-Inf is a probability of zero along the whole path, and says nothing of the other classes."""
    z = draw(2, 1100, dtype=dtype)
    z[0, :300], z[1, 2:] = -math.inf, -math.inf  # a whole part of an image, and all but the first
    targets, (nodes, weights) = torch.tensor([[400, 0], [0, 1]], device=DEVICE), rule(3)
    rows = ops.utility_rows(z, targets, utility="rest", nodes=nodes, weights=weights, backend=backend)
    kept = ops.utility_rows(z[:1, 300:], targets[:1] - 300, utility="rest", nodes=nodes, weights=weights, backend="torch")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(rows[0, 0, 300:], kept[0, 0], rtol=tolerance, atol=tolerance)
    assert (rows[0, 0, :300] == 0).all() and (rows[1, :, 2:] == 0).all() and rows.isfinite().all()
    z[0] = -math.inf
    assert ops.utility_rows(z, targets, nodes=nodes, weights=weights, backend=backend)[0].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("utility", ["probability", "rest"])
def test_large_logits_do_not_overflow(backend, utility):
    z = torch.tensor([[3e4, -3e4, 2.9e4, 0.0], [90.0, 0.0, -90.0, 87.0]], device=DEVICE)
    targets, (nodes, weights) = torch.tensor([[2], [3]], device=DEVICE), rule(5)
    for base in (torch.zeros_like(z), z.flip(1) * 0.5):
        rows = ops.utility_rows(z, targets, utility=utility, nodes=nodes, weights=weights, base=base, backend=backend)
        close(rows, by_autograd(z, targets, base, utility, nodes, weights, 1.0), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_head_is_the_path_integral(backend):
    """raw = sum_c A sum_k w_k grad U(t_k A) by autograd in A, in float64."""
    a = draw(2, 6, 12, dtype=torch.float64).abs()
    weight, bias = draw(5, 6, dtype=torch.float64, seed=1, scale=0.7), draw(5, dtype=torch.float64, seed=2)
    targets, (nodes, weights) = torch.tensor([[4], [0]], device=DEVICE), rule(4)
    w = torch.zeros_like(a)
    for t, part in zip(nodes, weights, strict=True):
        leaf = (t * a).requires_grad_(True)
        value = UTILITIES["rest"].value(leaf.mean(2) @ weight.T + bias, targets[:, 0]).sum()
        w += part * torch.autograd.grad(value, leaf)[0]
    logits = a.mean(2) @ weight.T + bias
    raw, _ = ops.shapley_head(a, logits, weight, bias, targets, (3, 4), (6, 8), nodes=nodes, weights=weights, backend=backend)
    torch.testing.assert_close(raw[:, 0], (w * a).sum(1), rtol=1e-11, atol=1e-12)


def samples():
    z, targets, nodes = draw(2, 5), torch.tensor([[1], [4]], device=DEVICE), [0.2, 0.5, 0.9]
    for backend in ("torch", "native" if DEVICE == "cpu" else "cuda"):
        if backend in BACKENDS:
            for start in (z[:1].expand(2, 5), None):
                yield torch.ops.shapleycam.quadrature_rows.default, (
                    z, targets, start, "rest", 0.5, nodes, [0.2, 0.3, 0.5], backend,
                )  # fmt: skip


@pytest.mark.parametrize("sample", list(samples()), ids=lambda s: f"{s[0].name()}-{s[1][-1]}")
def test_opcheck(sample):
    torch.library.opcheck(*sample)


def test_it_compiles_without_graph_breaks_and_follows_its_nodes():
    z, targets = draw(2, 5), torch.tensor([[1], [4]], device=DEVICE)

    def explain(z, nodes):
        return ops.utility_rows(z, targets, z[0], nodes=nodes, weights=(0.5, 0.5))

    compiled = torch.compile(explain, fullgraph=True)
    for nodes in ((0.25, 0.75), (0.1, 0.9)):
        torch.testing.assert_close(compiled(z, nodes), explain(z, nodes))


def test_an_extension_of_an_earlier_version_says_so(monkeypatch):
    module = types.SimpleNamespace(cpu_operators=["utility_rows"], cpu_variant=lambda: "avx2", poolings={}, has_cuda=False)
    monkeypatch.setattr(compiled, "native_module", lambda: module)
    call = Call("quadrature_rows", "cpu", torch.float32)
    earlier = Native()
    assert earlier.can(call) == "it does not implement this operator"
    assert earlier.can(call._replace(operator="utility_rows")) is None
    monkeypatch.setattr(earlier, "name", "earlier", raising=False)
    z, targets = draw(2, 5).cpu(), torch.tensor([[1], [4]])
    with LADDER.holding(earlier):
        with pytest.raises(BackendError, match="cannot serve quadrature_rows on cpu: it does not implement this operator"):
            ops.utility_rows(z, targets, nodes=(0.5,), weights=(1.0,), backend="earlier")
        assert ops.select("quadrature_rows", z) != "earlier"


def test_bad_arguments():
    z, t = torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.int64)
    half = {"nodes": (0.5,), "weights": (1.0,)}
    for options, match in [
        ({"nodes": (), "weights": ()}, "expected 1 to 32 nodes, got 0"),
        ({"nodes": [0.5] * (MOST_NODES + 1), "weights": [0.1] * (MOST_NODES + 1)}, "expected 1 to 32 nodes, got 33"),
        ({"nodes": (0.5, 0.7), "weights": (1.0,)}, "a weight for each of the 2 nodes, got 1"),
        ({"nodes": (0.5,)}, "weights must be a list or tuple of floats, got NoneType"),
        ({"weights": (0.5,)}, "nodes must be a list or tuple of floats, got NoneType"),
        ({"nodes": 4, "weights": (1.0,)}, "nodes must be a list or tuple of floats, got int"),
        ({"nodes": torch.tensor([0.5]), "weights": (1.0,)}, "nodes must be a list or tuple of floats, got Tensor"),
        ({"nodes": (math.nan,), "weights": (1.0,)}, "nodes must be finite, got .nan,."),
        ({"nodes": (0.5,), "weights": (math.inf,)}, "weights must be finite, got .inf,."),
        ({"nodes": ("half",), "weights": (1.0,)}, "nodes must be numbers, got .'half',."),
        ({"base": z}, "base is the start of a path: give nodes and weights too"),
        ({"base": z, "bias": z[0], **half}, "base takes the place of bias"),
        ({"base": z[:1], **half}, r"base must be \(2, 5\) on cpu, got \(1, 5\)"),
        ({"base": z.long(), **half}, "base must be float16"),
        ({"bias": z[0, :4], **half}, r"bias must be \[5\]"),
        ({"utility": "margin", **half}, "unknown utility 'margin'"),
    ]:
        with pytest.raises(InputError, match=match):
            ops.utility_rows(z, t, **options)
    for place in ("logits", "base"):
        tensors = {"logits": z.clone(), "base": z.clone()}
        tensors[place].requires_grad_(True)
        with pytest.raises(DerivativeError, match=r"ops.reference.quadrature_rows, which is differentiable"):
            ops.utility_rows(**tensors, targets=t, **half)


def test_the_reference_is_differentiable():
    z = draw(2, 5, dtype=torch.float64).requires_grad_(True)
    t = torch.tensor([[1], [4]], device=DEVICE)
    assert torch.autograd.gradcheck(
        lambda z: ops.reference.quadrature_rows(z, t, None, "probability", 1.0, [0.3, 0.8], [0.5, 0.5]), z
    )
