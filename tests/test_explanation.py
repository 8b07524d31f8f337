"""An explanation is a sequence of its images: cut, moved, pickled, printed."""

import collections
import copy
import pickle

import pytest
import torch
from torch import nn

from shapleycam import Explainer, InputError
from shapleycam.smoothing import Smoothed, smoothed

from .helpers import toy

X = torch.randn(5, 3, 8, 10, generator=torch.Generator().manual_seed(0))
Pair = collections.namedtuple("Pair", ["logits", "scale"])


class Rich(nn.Module):
    """Returns more than logits: something per image, and something that is not."""

    def __init__(self):
        super().__init__()
        self.inner = toy()

    def forward(self, x):
        z = self.inner(x)
        return {"logits": z, "more": (z.exp(), torch.arange(3.0), torch.tensor(2.0)), "name": "five"}


def explained(classes=None, model=None, layer="inner.2"):
    return Explainer(model or Rich().eval(), layer)(X, classes, with_norms=True, with_gap=True)


SEVERAL = torch.tensor([[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]])
PICKS = [
    (3, [3]),
    (-1, [4]),
    (torch.tensor(2), [2]),
    (slice(1, 3), [1, 2]),
    (slice(None, None, 2), [0, 2, 4]),
    (slice(None, None, -1), [4, 3, 2, 1, 0]),
    (slice(3, 99), [3, 4]),
    ([4, 0, 0], [4, 0, 0]),
    ((1, -2), [1, 3]),
    (range(2), [0, 1]),
    (torch.tensor([2, -5]), [2, 0]),
    (torch.tensor([True, False, False, True, False]), [0, 3]),
    ([False, True, False, False, True], [1, 4]),
]


@pytest.mark.parametrize("classes", [None, SEVERAL], ids=["one class", "several"])
@pytest.mark.parametrize(("rows", "expected"), PICKS, ids=[str(rows) for rows, _ in PICKS])
def test_cutting(rows, expected, classes):
    whole = explained(classes)
    part = whole[rows]
    assert type(part) is type(whole) and len(part) == len(expected)
    for name in ("logits", "targets", "raw", "hvp_ratio", "gap", "probabilities", "finite"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[expected]), name
    assert torch.equal(part.heatmaps(), whole.heatmaps()[expected])
    assert torch.equal(part.outputs["logits"], whole.logits[expected])
    assert torch.equal(part.outputs["more"][0], whole.outputs["more"][0][expected])
    assert part.outputs["more"][1].tolist() == [0, 1, 2] and part.outputs["more"][2] == 2 and part.outputs["name"] == "five"
    assert part.diagnostics is whole.diagnostics and part.image_size == (8, 10)
    assert len(whole) == 5  # which is untouched


def test_a_part_is_the_explanation_of_these_images():
    whole = explained()
    alone = Explainer(Rich().eval(), "inner.2")(X[3:4])
    torch.testing.assert_close(whole[3].raw, alone.raw)
    torch.testing.assert_close(whole[3].heatmaps(), alone.heatmaps())
    pixels = torch.zeros(1, 3, 8, 10, dtype=torch.uint8)
    assert whole[3].overlay(pixels).shape == (1, 8, 10, 3)
    assert whole[1:][2].check() is not None


def test_what_was_not_asked_for_stays_none():
    part = Explainer(toy(), "2")(X)[1:3]
    assert part.hvp_ratio is None and part.gap is None and torch.equal(part.outputs, part.logits)


def test_iteration():
    whole = explained()
    ones = list(whole)
    assert [len(one) for one in ones] == [1] * 5
    assert torch.equal(torch.cat([one.raw for one in ones]), whole.raw)
    assert list(whole[5:]) == [] and len(whole[5:]) == 0 and whole[[]].raw.shape == (0, 8, 10)


@pytest.mark.parametrize(
    "rows",
    [
        5,
        -6,
        [0, 5],
        [-6],
        1.0,
        "0",
        None,
        True,
        torch.tensor(True),
        torch.tensor([1.0]),
        torch.tensor([True, False]),
        torch.zeros(1, 1, dtype=torch.int64),
        slice("a"),
        [[1], [2, 3]],
        (slice(1), 2),
    ],
    ids=str,
)
def test_wrong_indices(rows):
    with pytest.raises(InputError, match="explanation|out of range"):
        explained()[rows]


def test_several_layers_and_namedtuples():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = toy()

        def forward(self, x):
            return Pair(self.inner(x), torch.ones(7))

    whole = Explainer(Named().eval(), ["inner.0", "inner.2"])(X)
    part = whole[[1, 4]]
    assert [raw.shape[0] for raw in part.raws] == [2, 2] and torch.equal(part.raws[1], whole.raws[1][[1, 4]])
    assert isinstance(part.outputs, Pair) and part.outputs.scale.shape == (7,) and len(part.outputs.logits) == 2


def test_detections_are_cut_as_a_list():
    class Detects(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            a = self.conv(x).tanh().mean((2, 3))
            return [{"scores": row.repeat(2)[:5], "image": i} for i, row in enumerate(a)]  # five of five, as by chance

    score = lambda found, targets: torch.stack([one["scores"].square().sum() for one in found])
    score.rows = lambda rows: score
    whole = Explainer(Detects().eval(), "conv", utility=score)(X)
    part = whole[3:]
    assert whole.logits is None and part.logits is None and part.targets is None
    assert [one["image"] for one in part.outputs] == [3, 4]
    assert torch.equal(part.outputs[0]["scores"], whole.outputs[3]["scores"])


def test_equality_is_identity():
    one, other = explained(), explained()
    assert one == one and one != other and len({one, other, one}) == 2


def test_repr_is_a_line():
    text = repr(explained(SEVERAL))
    assert text == (
        "Explanation(5 images of 2 classes, method='shapleycam', utility='rest', layers=['inner.2'], maps=(8, 10), "
        "engine='reverse_over_reverse', torch.float32, device='cpu')"
    )
    assert "of" not in repr(explained()).split(",")[0]
    assert len(repr(smoothed(Explainer(toy(), "2"), X))) < 250


def tensors(explanation):
    found = [explanation.logits, explanation.targets, explanation.hvp_ratio, explanation.gap, *explanation.raws]
    return [*found, explanation.outputs["logits"], *explanation.outputs["more"]]


def test_moving():
    whole = explained()
    moved = whole.to("meta")
    assert all(tensor.device.type == "meta" for tensor in tensors(moved)) and len(moved) == 5
    assert all(tensor.device.type == "cpu" for tensor in tensors(whole))
    home = whole.cpu()
    assert all(a is b for a, b in zip(tensors(home), tensors(whole), strict=True))
    named = Explainer(toy(), "2", backend="torch")(X)
    assert named.cpu().backend == "torch" and named.to(torch.device("meta")).backend == "auto"


@pytest.mark.gpu
def test_moving_to_the_host():
    model, images = Rich().eval().cuda(), X.cuda()
    whole = Explainer(model, "inner.2")(images, with_norms=True, with_gap=True)
    home = whole.cpu()
    assert all(tensor.device.type == "cpu" for tensor in tensors(home))
    torch.testing.assert_close(home.heatmaps(), whole.heatmaps().cpu(), rtol=0, atol=1e-5)
    assert torch.equal(whole[whole.finite].raw, whole.raw) and torch.equal(whole[torch.tensor([1])].raw, whole.raw[1:2])


@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("smooth", [False, True])
def test_pickling(again, smooth):
    whole = smoothed(Explainer(Rich().eval(), "inner.2"), X) if smooth else explained(SEVERAL)
    back = again(whole)
    assert type(back) is type(whole) and back.diagnostics == whole.diagnostics and back.outputs["name"] == "five"
    assert torch.equal(back.raw, whole.raw) and torch.equal(back.heatmaps(), whole.heatmaps())
    assert torch.equal(back[1].heatmaps(), whole[1].heatmaps())


def test_smoothed_explanations_are_cut_and_moved_with_their_views():
    whole = smoothed(Explainer(toy(), "2"), X, SEVERAL)
    part = whole[[3, 1]]
    assert isinstance(part, Smoothed) and len(part) == 2 and len(part.views) == len(whole.views) == 6
    assert torch.equal(part.heatmaps(), whole.heatmaps()[[3, 1]]) and part.finite.tolist() == [True, True]
    assert not torch.allclose(part.heatmaps(), super(Smoothed, part).heatmaps(), atol=0.01)
    moved = whole.to("meta")
    assert moved.raw.is_meta and all(view.raw.is_meta for view, _ in moved.views)
