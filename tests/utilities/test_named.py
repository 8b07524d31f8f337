"""The table's gradients and curvatures against an explicit float64 Hessian."""

import copy
import dataclasses
import functools
import pickle

import pytest
import torch

from shapleycam import UTILITIES, InputError, Utility
from shapleycam.utilities import evaluate, get_utility
from shapleycam.utilities.tasks import SegmentationScore


@pytest.mark.parametrize("name", UTILITIES)
def test_coefficients_are_the_derivatives(name):
    utility = UTILITIES[name]
    generator = torch.Generator().manual_seed(0)
    z, v = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64) * 2
    targets = torch.tensor([[0, 3], [6, 6], [2, 1], [5, 0]])
    p = z.softmax(1)
    p_c, v_c, s = p.gather(1, targets), v.gather(1, targets), (p * v).sum(1, keepdim=True)

    def dense(coefficients):
        on_class, on_p, on_pv = (torch.as_tensor(c, dtype=z.dtype).expand_as(p_c)[..., None] for c in coefficients)
        one_hot = torch.nn.functional.one_hot(targets, 7).to(z.dtype)
        return on_class * one_hot + on_p * p[:, None] + on_pv * (p * v)[:, None]

    gradient, curvature = dense(utility.gradient(p_c)), dense(utility.curvature(p_c, v_c, s))
    for n in range(4):
        for m in range(2):
            scalar = lambda row: utility.value(row[None], targets[n : n + 1, m])[0]
            expected = torch.autograd.functional.jacobian(scalar, z[n])
            hessian = torch.autograd.functional.hessian(scalar, z[n])
            torch.testing.assert_close(gradient[n, m], expected, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(curvature[n, m], hessian @ v[n], rtol=1e-12, atol=1e-13)
            assert bool((hessian @ v[n]).any()) == utility.curved


def test_values():
    z = torch.tensor([[1.0, 2.0, 0.5]])
    p = torch.tensor([0.2312239, 0.6285317, 0.1402444])
    c = torch.tensor([1])
    for name, expected in {
        "logit": 2.0,
        "probability": p[1].item(),
        "log_probability": p[1].log().item(),
        "rest": 2.0 + p[1].log().item(),
    }.items():
        assert UTILITIES[name].value(z, c).item() == pytest.approx(expected, abs=1e-6)


def test_half_precision_logits_are_widened():
    z = torch.randn(2, 1000).to(torch.bfloat16)
    assert UTILITIES["rest"].value(z, torch.tensor([0, 1])).dtype == torch.float32


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(InputError, match="'log_probability'"):
        get_utility("log_prob")
    with pytest.raises(InputError, match="callable"):
        get_utility(3)


@pytest.mark.parametrize(
    ("result", "match"), [(lambda z, t: z.sum(), r"shape \(\)"), (lambda z, t: 1.0, "float"), (lambda z, t: t, "int64")]
)
def test_a_user_utility_must_return_one_value_per_image(result, match):
    with pytest.raises(InputError, match=match):
        evaluate(get_utility(result), torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]), 2)


def test_named_utility_needs_logits():
    with pytest.raises(InputError, match="your own utility"):
        evaluate(UTILITIES["rest"], {"boxes": []}, None, None, 2)


@pytest.mark.parametrize(
    "function",
    [
        lambda outputs: outputs[:, 0],
        lambda outputs, targets, more: outputs[:, 0],
        lambda outputs, *, targets: outputs[:, 0],
        type("Scorer", (torch.nn.Module,), {"forward": lambda self, outputs: outputs[:, 0]})(),
    ],
)
def test_a_callable_must_take_outputs_and_targets(function):
    with pytest.raises(InputError, match=r"must take \(outputs, targets\), but"):
        get_utility(function)


def test_what_can_be_called_so_is_taken():
    class Bound:
        def method(self, outputs, targets=None):
            return outputs[:, 0]

    free = lambda *arguments: arguments[0][:, 0]
    partial = functools.partial(lambda index, outputs, targets: outputs[:, index], 0)
    for function in (free, Bound().method, partial, torch.add, max):
        get_utility(function)


@pytest.mark.parametrize("wrong", [Utility, SegmentationScore, dict])
def test_a_class_is_no_utility(wrong):
    with pytest.raises(InputError, match=f"utility is the class {wrong.__name__}: pass"):
        get_utility(wrong)


def test_coefficients_come_together():
    row = UTILITIES["rest"]
    with pytest.raises(InputError, match="'mine' has a gradient but no curvature"):
        Utility("mine", "U", row.value, gradient=row.gradient)
    with pytest.raises(InputError, match="'mine' has a curvature but no gradient"):
        Utility("mine", "U", row.value, curvature=row.curvature)
    with pytest.raises(InputError, match=r"curvature of utility 'mine' must take \(p_c, v_c, s\)"):
        Utility("mine", "U", row.value, row.gradient, row.gradient)
    with pytest.raises(InputError, match="value of utility 'mine' must be a callable"):
        Utility("mine", "U", None)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda u: pickle.loads(pickle.dumps(u))])
@pytest.mark.parametrize("name", UTILITIES)
def test_utilities_are_copied_and_pickled(name, again):
    row = again(UTILITIES[name])
    assert row == UTILITIES[name] and row.fused and row.named
    assert not again(dataclasses.replace(row, value=_half)).fused


def _half(z, targets):
    return z.gather(1, targets[:, None])[:, 0] / 2


def test_only_the_tables_own_rows_are_fused():
    row = UTILITIES["rest"]
    assert row.fused and get_utility("ReST").fused
    other = UTILITIES["logit"]
    for change in (
        {"value": _half},
        {"gradient": other.gradient},
        {"curvature": other.curvature},
        {"curved": False},
        {"name": "mine"},
        {"name": "logit"},
    ):
        changed = dataclasses.replace(row, **change)
        assert changed.named and not changed.fused
    assert not get_utility(_half).fused and not get_utility(_half).named
