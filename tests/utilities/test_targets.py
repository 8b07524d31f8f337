"""Targets in every form that people write them in, and what is no list of class indices."""

import numpy as np
import pytest
import torch

from shapleycam import Explainer, TargetError
from shapleycam.utilities.targets import as_targets, check_targets, place_targets

from ..helpers import toy

X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Z = torch.zeros(5, 4)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (2, [2] * 5),
        (np.int64(2), [2] * 5),
        (range(4), [0, 1, 2, 3]),
        (range(3, -1, -1), [3, 2, 1, 0]),
        ([3, 1], [3, 1]),
        ((3, 1), [3, 1]),
        ([np.int32(3), np.int32(1)], [3, 1]),
        ([torch.tensor(3), torch.tensor(1)], [3, 1]),
        (np.array([3, 1]), [3, 1]),
        ([[3, 1], [0, 2]], [[3, 1], [0, 2]]),
        (((3, 1), (0, 2)), [[3, 1], [0, 2]]),
        ([range(2), range(2, 4)], [[0, 1], [2, 3]]),
        ([torch.tensor([3, 1]), torch.tensor([0, 2])], [[3, 1], [0, 2]]),
        ([np.array([3, 1]), np.array([0, 2])], [[3, 1], [0, 2]]),
        (torch.tensor([3, 1], dtype=torch.uint8), [3, 1]),
        (torch.tensor([3, 1], dtype=torch.int32), [3, 1]),
    ],
    ids=repr,
)
def test_forms(targets, expected):
    expected = torch.tensor(expected)
    placed, poison = place_targets(as_targets(targets), Z[: len(expected)], len(expected), CPU)
    assert placed.dtype == torch.int64 and poison is None
    assert torch.equal(placed, expected if expected.ndim == 2 else expected[:, None])


def test_a_range_and_a_nested_list_through_the_explainer():
    explainer = Explainer(toy())
    one, several = explainer(X, range(5)), explainer(X, [[n, (n + 1) % 5] for n in range(5)])
    assert one.targets.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(several.raw[:, 0], one.raw)


WRONG = [
    ([], "empty.*targets=None"),
    ((), "empty"),
    ([[]], "empty"),
    (torch.zeros(5, 0, dtype=torch.int64), r"empty.*\[5\] or \[5, M\]"),
    (torch.tensor(3), r"got \(\).*int\(targets\)"),
    (np.array(3), r"got \(\).*int\(targets\)"),
    (torch.eye(5), r"argmax\(1\)"),
    (torch.eye(5).bool(), r"argmax\(1\)"),
    (torch.eye(5).tolist(), r"argmax\(1\)"),
    (torch.rand(5, 5), r"argmax\(1\)"),
    ([1.0] * 5, r"long\(\)"),
    ([True] * 5, "bool"),
    ([None] * 5, "rectangular"),
    ([torch.tensor([1, 2]), torch.tensor([1])] * 2, "rectangular"),
    (range(4), r"for a batch of 5 images, got \(4,\)"),
    (b"abcde", "bytes"),
    ({0: 1}, "dict"),
]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("targets", "match"), WRONG, ids=[repr(targets)[:30] for targets, _ in WRONG])
def test_what_is_refused(targets, match, prepared):
    explainer = Explainer(toy())
    if prepared:
        explainer.prepare(X)
    with pytest.raises(TargetError, match=match):
        explainer(X, targets)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (-1, "target -1 is out of range"),
        (5, "target 5 is out of range: the model has 5 classes, 0 to 4"),
        ([0, 1, 2, 3, -1], "target -1 is out of range"),
        ([0, 1, 2, 3, 5], "target 5 is out of range: the model has 5 classes, 0 to 4"),
        (torch.eye(5).long(), r"\(5, 5\) are one-hot.*argmax\(1\)"),
        (torch.eye(5).long().tolist(), r"one-hot.*argmax\(1\)"),
        (torch.tensor([[0, 0, 0, 1, 0]] * 5), "one-hot"),
    ],
)
def test_out_of_range_and_one_hot(targets, match, prepared):
    explainer = Explainer(toy())
    if prepared:
        explainer.prepare(X)
    with pytest.raises(TargetError, match=match) as caught:
        explainer(X, targets)
    assert "fewer" not in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "classes"),
    [
        (torch.tensor([[0, 1], [1, 0]]), 2),  # both classes of two, in this order and in that
        (torch.tensor([[0, 1, 0]] * 2), 4),  # three classes of four
        (torch.tensor([[0, 1, 2]] * 2), 3),
        (torch.tensor([[0, 0, 0], [0, 1, 0]]), 3),
        (torch.tensor([[0, 1, 1], [0, 1, 0]]), 3),
    ],
)
def test_zeros_and_ones_that_are_classes(targets, classes):
    check_targets(targets, 2, classes)
    placed, _ = place_targets(targets, torch.zeros(2, classes), 2, CPU)
    assert torch.equal(placed, targets)


@pytest.mark.gpu
def test_one_hot_on_the_device_is_no_map():
    explainer = Explainer(toy().cuda())
    result = explainer(X.cuda(), torch.eye(5, dtype=torch.int64, device="cuda"))
    assert result.finite.tolist() == [False] * 5


@pytest.mark.parametrize("shape", [(3,), (64,), (65,), (3, 2), (40, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_the_range_of_few_and_of_many(shape, dtype):
    good = torch.arange(torch.Size(shape).numel()).remainder(7).view(shape).to(dtype)
    place_targets(good, torch.zeros(shape[0], 7), shape[0], CPU)
    for wrong in (7, -1)[: 1 if dtype == torch.uint8 else 2]:
        bad = good.clone()
        bad.view(-1)[-2] = wrong
        for checked in (False, True):
            with pytest.raises(TargetError, match=rf"target {wrong} is out of range: the model has 7 classes"):
                place_targets(bad, torch.zeros(shape[0], 7), shape[0], CPU, checked=checked)
