"""The operators of the closed form, on every backend: against float64, against autograd, and on awkward arguments."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shapleycam import DerivativeError, InputError, ops
from shapleycam.ops.shared import UTILITIES as NAMES
from shapleycam.utilities import UTILITIES

from ..helpers import TOLERANCE, available

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


BACKENDS = available("utility_rows", DEVICE)


def test_the_backends_that_must_be_here_are():
    for operator in ("utility_rows", "quadrature_rows", "class_maps"):
        assert {"torch", "triton", "native" if DEVICE == "cpu" else "cuda"} <= set(available(operator, DEVICE))


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return values.to(dtype).to(DEVICE)


def close(result, expected, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.dtype == wide and result.is_contiguous()
    rtol, atol = TOLERANCE[wide]
    scale = expected.nan_to_num(0.0).abs().amax().clamp_min(1e-30).item() if expected.numel() else 1.0
    torch.testing.assert_close(result.double(), expected, rtol=rtol, atol=atol * scale, equal_nan=True)


def by_autograd(z, target, bias, utility, order, scale):
    """One row by two differentiations of U in the logits."""
    leaf = z.clone().requires_grad_(True)
    value = UTILITIES[utility].value(leaf[None], torch.tensor([target], device=z.device)).sum()
    [gradient] = torch.autograd.grad(value, leaf, create_graph=True)
    if order == 1 or not gradient.requires_grad:
        return gradient.detach() * scale
    z0 = (z if bias is None else z - bias).detach()
    [hvp] = torch.autograd.grad((gradient * z0).sum(), leaf)
    return (gradient - hvp / 2).detach() * scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("utility", NAMES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_are_the_derivatives_of_the_utility(backend, utility, order, biased):
    z, bias = draw(3, 11, dtype=torch.float64, scale=2.0), draw(11, dtype=torch.float64, seed=1) if biased else None
    targets = torch.tensor([[0, 10], [3, 3], [7, 1]], device=DEVICE)
    rows = ops.utility_rows(z, targets, bias, utility=utility, order=order, scale=0.25, backend=backend)
    for n in range(3):
        for m in range(2):
            expected = by_autograd(z[n], int(targets[n, m]), bias, utility, order, 0.25)
            torch.testing.assert_close(rows[n, m], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    n=st.integers(0, 4),
    m=st.integers(0, 3),
    k=st.one_of(st.integers(1, 70), st.sampled_from([1000, 1025, 2100])),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    biased=st.booleans(),
    utility=st.sampled_from(NAMES),
    order=st.sampled_from([1, 2]),
    strided=st.sampled_from(["plain", "rows", "columns", "expanded"]),
)
def test_rows_on_any_shape(backend, n, m, k, dtypes, biased, utility, order, strided):
    z = draw(n, k, dtype=dtypes[0], scale=3.0)
    if strided == "rows":
        z = torch.cat((z, z), 1)[:, :k]
    elif strided == "columns":
        z = z.repeat_interleave(2, 1)[:, ::2]
    elif strided == "expanded":
        z = z[:1].expand(n, k) if n else z
    bias = draw(k, dtype=dtypes[1], seed=1) if biased else None
    # Some classes are out of range, on either side.
    targets = torch.randint(-max(1, k // 10), k + max(1, k // 10), (n, m), generator=torch.Generator().manual_seed(2)).to(
        DEVICE
    )
    wide = None if bias is None else bias.double()
    expected = ops.utility_rows(z.double(), targets, wide, utility=utility, order=order, scale=0.1, backend="torch")
    result = ops.utility_rows(z, targets, bias, utility=utility, order=order, scale=0.1, backend=backend)
    assert result.shape == (n, m, k)
    assert torch.equal(result.isnan().all(2), (targets < 0) | (targets >= k))
    close(result, expected, dtypes[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("order", [1, 2])
def test_a_logit_that_is_not_finite_spoils_its_image_alone(backend, bad, order):
    z = draw(2, 9)
    z[1, 4] = bad
    rows = ops.utility_rows(z, torch.tensor([[2], [2]], device=DEVICE), order=order, backend=backend)
    assert rows[0].isfinite().all()
    assert rows[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend):
    z = torch.tensor([[3e4, -3e4, 2.9e4, 0.0]], device=DEVICE)
    result = ops.utility_rows(z, torch.tensor([[2]], device=DEVICE), backend=backend)
    expected = ops.utility_rows(z.double(), torch.tensor([[2]], device=DEVICE), backend="torch")
    close(result, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (1, 7), (9, 1), (0, 3), (2, 0)])
@pytest.mark.parametrize("tied", [False, True])
def test_head_weights_are_the_product(dtype, n, m, tied):
    rows = draw(n, m, 37, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weight = draw(19, 37, dtype=dtype, seed=1).T if tied else draw(37, 19, dtype=dtype, seed=1)
    if n * m > 1:
        rows[0, 0, 3] = float("nan")  # one row's alone
    result = ops.head_weights(rows, torch.nn.Parameter(weight, requires_grad=False))
    assert result.shape == (n, m, 19)
    close(result, rows.double() @ weight.double(), dtype)
    assert ops.head_weights(rows, torch.nn.Parameter(weight)).requires_grad


def test_head_weights_of_a_weight_that_is_no_plain_tensor():
    class Packed(torch.Tensor):
        """Its storage is not what it says: only its own operators may read it."""

        def to(self, *args, **kwargs):
            return self.as_subclass(torch.Tensor).to(*args, **kwargs) * 2

    rows, weight = draw(1, 1, 5), draw(5, 4, dtype=torch.bfloat16, seed=1)
    close(ops.head_weights(rows, weight.as_subclass(Packed)), rows.double() @ weight.double() * 2, torch.bfloat16)


@pytest.mark.parametrize("backend", available("class_maps", DEVICE))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    grid=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    n=st.integers(0, 3),
    m=st.integers(0, 3),
    c=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    last=st.booleans(),
    renormalize=st.booleans(),
    out=st.sampled_from([None, torch.float16, torch.uint8]),
)
def test_class_maps_are_its_two_parts(backend, grid, n, m, c, dtype, last, renormalize, out):
    if backend == "triton" and DEVICE == "cpu":  # which is slow; 11 to the third is still more than a block
        n, m, grid = min(n, 2), min(m, 2), [min(g, 5 if len(grid) == 3 else 9) for g in grid]
    s = torch.Size(grid).numel()
    a = draw(n, s, c, dtype=dtype).transpose(1, 2) if last else draw(n, c, s, dtype=dtype)
    alpha = draw(n, m, c, seed=1)
    size = [g * 2 + 1 for g in grid]
    raw, maps = ops.class_maps(a, alpha, grid, size, renormalize=renormalize, dtype=out, backend=backend)
    assert raw.shape == (n, m, s) and maps.shape == (n, m, *size)
    close(raw, ops.channel_weighted_sum(a.double(), alpha.double(), backend="torch"), dtype)
    expected = ops.display_map(
        raw.flatten(0, 1).unflatten(1, grid), size, renormalize=renormalize, dtype=out, backend="torch"
    ).reshape(maps.shape)
    assert maps.dtype == expected.dtype
    if out == torch.uint8:
        assert (maps.int() - expected.int()).abs().max() <= 1 if maps.numel() else True
    else:
        tolerance = 2e-3 if out == torch.float16 else 1e-4
        torch.testing.assert_close(maps, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", available("class_maps", DEVICE))
def test_class_maps_of_activations_too_large_for_one_program(backend):
    a, alpha = draw(1, 700, 196), draw(1, 2, 700, seed=1)
    raw, maps = ops.class_maps(a, alpha, (14, 14), (28, 28), backend=backend)
    close(raw, ops.channel_weighted_sum(a.double(), alpha.double(), backend="torch"), torch.float32)
    torch.testing.assert_close(
        maps[0], ops.display_map(raw[0].unflatten(1, (14, 14)), (28, 28), backend="torch"), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("backend", available("class_maps", DEVICE))
@pytest.mark.parametrize(
    ("shape", "grid", "m"), [((2, 140, 49), (7, 7), 3), ((1, 5, 4225), (65, 65), 1), ((3, 40, 6), (6,), 2)]
)
@pytest.mark.parametrize("last", [False, True])
def test_class_maps_have_the_same_bits_every_time(backend, shape, grid, m, last):
    """Of several pieces of the channels and several classes, of a map too large for a block, and of one dimension."""
    n, c, s = shape
    a = draw(n, s, c).transpose(1, 2) if last else draw(n, c, s)
    alpha, size = draw(n, m, c, seed=1), [2 * g + 2 if s < 4096 else g // 3 for g in grid]  # the interpreter is slow
    raw, maps = ops.class_maps(a, alpha, grid, size, backend=backend)
    close(raw, ops.channel_weighted_sum(a.double(), alpha.double(), backend="torch"), torch.float32)
    shown = ops.display_map(raw.flatten(0, 1).unflatten(1, grid), size, backend="torch").reshape(maps.shape)
    torch.testing.assert_close(maps, shown, rtol=1e-4, atol=1e-4)
    again = ops.class_maps(a, alpha, grid, size, backend=backend)
    assert torch.equal(raw, again[0]) and torch.equal(maps, again[1])


@pytest.mark.parametrize("backend", available("class_maps", DEVICE))
@pytest.mark.parametrize("order", [1, 2])
def test_the_whole_head_is_the_shapley_weight_by_autograd(backend, order):
    """raw = sum_c A (g - HA/2) with the derivatives of U(W mean(A) + b) taken in A, in float64."""
    a = draw(2, 6, 12, dtype=torch.float64).abs()
    weight, bias = draw(5, 6, dtype=torch.float64, seed=1, scale=0.7), draw(5, dtype=torch.float64, seed=2)
    targets = torch.tensor([[4], [0]], device=DEVICE)
    leaf = a.clone().requires_grad_(True)
    logits = leaf.mean(2) @ weight.T + bias
    value = UTILITIES["rest"].value(logits, targets[:, 0]).sum()
    [gradient] = torch.autograd.grad(value, leaf, create_graph=True)
    [hvp] = torch.autograd.grad((gradient * a).sum(), leaf)
    w = (gradient - hvp / 2 if order == 2 else gradient).detach()
    assert hvp.abs().max() > 0.05 * gradient.abs().max()
    raw, maps = ops.shapley_head(a, logits.detach(), weight, bias, targets, (3, 4), (6, 8), order=order, backend=backend)
    torch.testing.assert_close(raw[:, 0], (w * a).sum(1), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(maps[:, 0], ops.reference.display_map(raw[:, 0].unflatten(1, (3, 4)), (6, 8), True))


def samples():
    z, targets, a, alpha = draw(2, 5), torch.tensor([[1], [4]], device=DEVICE), draw(2, 5, 12), draw(2, 3, 5)
    for backend in ("torch", "native" if DEVICE == "cpu" else "cuda"):
        yield torch.ops.shapleycam.utility_rows.default, (z, targets, z[0], "rest", 2, 0.5, backend)
        yield torch.ops.shapleycam.utility_rows.default, (z, targets, None, "logit", 1, 0.5, backend)
        yield torch.ops.shapleycam.class_maps.default, (a, alpha, [3, 4], [6, 7], True, None, backend)


@pytest.mark.parametrize("sample", list(samples()), ids=lambda s: f"{s[0].name()}-{s[1][-1]}")
def test_opcheck(sample):
    torch.library.opcheck(*sample)


def test_the_head_compiles_without_graph_breaks():
    a, z, weight, bias = draw(2, 6, 12), draw(2, 5), draw(5, 6), draw(5)
    targets = torch.tensor([[1], [4]], device=DEVICE)

    def explain(a, z):
        return ops.shapley_head(a, z, weight, bias, targets, (3, 4), (6, 8))

    for one, other in zip(torch.compile(explain, fullgraph=True)(a, z), explain(a, z), strict=True):
        torch.testing.assert_close(one, other)


def test_bad_arguments():
    z, t = torch.zeros(2, 5), torch.zeros(2, 1, dtype=torch.int64)
    for arguments, options, match in [
        ((z[0], t), {}, r"logits must be \[N, K\]"),
        ((z, t[:, 0]), {}, r"targets must be \[2, M\]"),
        ((z, t.int()), {}, "targets must be an int64 tensor"),
        ((z, t, z[0, :4]), {}, r"bias must be \[5\]"),
        ((z, t), {"utility": "margin"}, "unknown utility 'margin'"),
        ((z, t), {"order": 3}, "order must be 1"),
        ((z.long(), t), {}, "logits must be float16"),
    ]:
        with pytest.raises(InputError, match=match):
            ops.utility_rows(*arguments, **options)
    a, alpha = torch.zeros(2, 3, 6), torch.zeros(2, 1, 3)
    for grid, size, match in [
        ((2, 2), (4, 4), r"product is the 6 positions, got \(2, 2\)"),
        ((2, 3), (4,), "size must be 2"),
        ((2, 3), (4, 0), "size must be 2"),
    ]:
        with pytest.raises(InputError, match=match):
            ops.class_maps(a, alpha, grid, size)
    with pytest.raises(InputError, match="dtype must be None"):
        ops.class_maps(a, alpha, (2, 3), (4, 6), dtype=torch.int32)
    with pytest.raises(InputError, match=r"weight must be \(5, 3\)"):
        ops.shapley_head(a, z, torch.zeros(3, 5), None, t, (2, 3), (4, 6))
    with pytest.raises(DerivativeError, match="no derivative"):
        ops.utility_rows(z.clone().requires_grad_(True), t)
