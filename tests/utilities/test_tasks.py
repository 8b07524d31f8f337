"""Utilities of models that do not classify, against their formulas and by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from shapleycam import UTILITIES, Explainer, InputError
from shapleycam.smoothing import smoothed
from shapleycam.utilities.tasks import SCORES, BoxScore, EmbeddingSimilarity, SegmentationScore

from ..helpers import Split


class Dense(nn.Module):
    """Logits for every pixel, under "out", from [N, 3, 8, 8]; with curvature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.target = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.head = nn.Sequential(nn.Tanh(), nn.Conv2d(6, 4, 1), nn.Upsample(scale_factor=2, mode="bilinear"))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": 4 * self.head(self.target(x))}


@pytest.fixture(name="dense")
def _dense() -> nn.Module:
    return Dense().double().eval()


@pytest.fixture(name="batch")
def _batch() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def weight_by_hand(model: nn.Module, image: Tensor, utility) -> tuple[Tensor, Tensor]:
    """A [C, S] and w = g - HA/2 by the full Hessian, one row at a time."""
    a = model.target(image).detach()
    g = torch.autograd.functional.jacobian(lambda x: utility(4 * model.head(x)[0]), a).flatten()
    h = torch.autograd.functional.hessian(lambda x: utility(4 * model.head(x)[0]), a).reshape(a.numel(), a.numel())
    w = g - h @ a.flatten() / 2
    return a[0].flatten(1), w.view_as(a)[0].flatten(1)


def pixel(score: str, z: Tensor, c: int) -> Tensor:
    log_p = z.log_softmax(0)[c]
    return {"logit": z[c], "probability": log_p.exp(), "log_probability": log_p, "rest": z[c] + log_p}[score]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", ["own", "shared", "each", "weights"])
def test_segmentation_is_a_sum_over_pixels(score, kind, dense, batch):
    generator = torch.Generator().manual_seed(4)
    masks = {
        "own": None,
        "shared": torch.rand(8, 8, generator=generator) > 0.5,
        "each": torch.rand(3, 8, 8, generator=generator) > 0.5,
        "weights": torch.rand(3, 8, 8, generator=generator),
    }
    mask, classes = masks[kind], [2, 0, 1]
    z = dense(batch)["out"]
    result = Explainer(dense, "target", "shapleycam-h", SegmentationScore(mask=mask, score=score))(batch, classes)
    assert result.raw.abs().max() > 0.01
    for i, c in enumerate(classes):
        if mask is None:
            weights = (z[i].argmax(0) == c).double()
            assert 0 < weights.sum() < 64
        else:
            weights = (mask if mask.ndim == 2 else mask[i]).double()
        a, w = weight_by_hand(dense, batch[i : i + 1], lambda y, w=weights, c=c: (pixel(score, y, c) * w).sum())
        torch.testing.assert_close(result.raw[i].flatten(), (a * w).sum(0), rtol=1e-8, atol=1e-10)


def test_segmentation_of_one_pixel_is_the_utility_of_the_same_name():
    z = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([0, 1, 6, 3, 3])
    for score in SCORES:
        found = SegmentationScore(score=score, mask=torch.ones(1, 1))(z[:, :, None, None], targets)
        torch.testing.assert_close(found, UTILITIES[score].value(z, targets))


def test_segmentation_without_a_class_takes_the_largest_one(dense, batch):
    z = dense(batch)["out"]
    classes = [int(z[i].argmax(0).flatten().mode().values) for i in range(3)]
    free, fixed = SegmentationScore(), SegmentationScore(category=1)
    explain = lambda utility, *targets: Explainer(dense, "target", utility=utility)(batch, *targets)
    result = explain(free)
    assert result.targets is None
    torch.testing.assert_close(result.raw, explain(free, classes).raw)
    torch.testing.assert_close(explain(fixed).raw, explain(free, 1).raw)
    both = explain(free, torch.tensor([[c, 1] for c in classes]))
    torch.testing.assert_close(both.raw, torch.stack((result.raw, explain(fixed).raw), 1))


@pytest.mark.parametrize("method", ["scorecam", "ablationcam"])
def test_a_mask_per_image_follows_its_image(method, dense, batch):
    """The perturbation methods ask the utility about rows of other images' number and order."""
    masks = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(4)) > 0.5
    together = Explainer(dense, "target", method, SegmentationScore(mask=masks), chunk=5)(batch, [2, 0, 1])
    for i, c in enumerate([2, 0, 1]):
        alone = Explainer(dense, "target", method, SegmentationScore(mask=masks[i]))(batch[i : i + 1], c)
        torch.testing.assert_close(together.raw[i], alone.raw[0])


def test_a_mask_does_not_follow_a_mirrored_image(dense, batch):
    explainer = Explainer(dense, "target", utility=SegmentationScore(mask=torch.eye(8)))
    with pytest.raises(InputError, match=r"mirror=False"):
        smoothed(explainer, batch, 1)
    assert smoothed(explainer, batch, 1, mirror=False).finite.all()
    assert smoothed(Explainer(dense, "target", utility=SegmentationScore()), batch, 1).finite.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "loss"}, "Unknown score 'loss'"),
        ({"mask": torch.zeros(8, 8)}, "not all 0"),
        ({"mask": torch.tensor([[1.0, float("nan")]])}, "finite"),
        ({"mask": torch.ones(8)}, r"shape \(8,\)"),
        ({"mask": [[1]]}, "got list"),
    ],
)
def test_a_bad_segmentation_is_refused_at_once(options, message):
    with pytest.raises(InputError, match=message):
        SegmentationScore(**options)


def test_a_segmentation_that_does_not_fit_is_refused(dense, batch):
    for mask, targets, message in [
        (torch.ones(4, 4), 1, r"mask has shape \(4, 4\)"),
        (torch.ones(5, 8, 8), 1, r"mask has shape \(5, 8, 8\)"),
        (None, 4, "class .* is out of range"),
    ]:
        with pytest.raises(InputError, match=message):
            Explainer(dense, "target", utility=SegmentationScore(mask=mask))(batch, targets)
    classifier = Split(nn.Conv2d(3, 6, 1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())).eval()
    with pytest.raises(InputError, match="needs logits"):
        Explainer(classifier, "target", utility=SegmentationScore())(torch.randn(2, 3, 8, 8))


def found(boxes, labels, scores):
    return {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}


def test_boxes_by_hand():
    detections = [
        # 50 % and 100 % of the box of label 1, the latter under another label; nothing near the second box
        found([[0.0, 0.0, 4.0, 2.0], [0.0, 0.0, 4.0, 4.0], [9.0, 9.0, 9.0, 9.0]], [1, 2, 3], [0.5, 0.25, 0.125]),
        found([[1.0, 1.0, 3.0, 3.0]], [7], [0.75]),
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)},
    ]
    boxes = [
        torch.tensor([[0.0, 0.0, 4.0, 4.0], [9.0, 9.0, 9.0, 9.0]]),
        torch.tensor([[1.0, 1.0, 3.0, 3.0], [1.0, 1.0, 3.0, 4.0]]),
        torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
    ]
    labels = [torch.tensor([1, 3]), torch.tensor([7, 7]), torch.tensor([1])]
    strict = BoxScore(boxes, labels)
    second = 1 + 0.75 + 2 / 3 + 0.75
    assert strict(detections, None).tolist() == pytest.approx([0.0, second, 0.0])  # 50 % is not more than 50 %
    assert BoxScore(boxes, labels, 0.4)(detections, None).tolist() == pytest.approx([1.0, second, 0.0])
    assert BoxScore(boxes, labels, 0.4, any_label=True)(detections, None).tolist() == pytest.approx([0.0, second, 0.0])
    picked = strict.rows(torch.tensor([1, 1, 0]))
    assert picked([detections[1], detections[1], detections[0]], None).tolist() == pytest.approx([second, second, 0.0])
    kept = BoxScore.of_detections(detections, score=0.5)
    assert [len(b) for b in kept.boxes] == [1, 1, 0] and kept(detections, None).tolist() == pytest.approx([1.5, 1.75, 0.0])


@pytest.mark.parametrize(
    ("boxes", "labels", "threshold", "message"),
    [
        (torch.zeros(1, 4), torch.zeros(1), 0.5, "lists of tensors"),
        ([], [], 0.5, "lists of tensors"),
        ([torch.zeros(1, 4)], [torch.zeros(2)], 0.5, "image 0 has boxes"),
        ([torch.zeros(1, 5)], [torch.zeros(1)], 0.5, "image 0 has boxes"),
        ([torch.tensor([[3.0, 0.0, 1.0, 1.0]])], [torch.ones(1)], 0.5, "inside out"),
        ([torch.tensor([[float("nan")] * 4])], [torch.ones(1)], 0.5, "inside out"),
        ([[[0, 0, 1, 1]]], [torch.ones(1)], 0.5, "must be tensors"),
        ([torch.zeros(1, 4)], [torch.zeros(1)], 1.0, "iou_threshold"),
    ],
)
def test_bad_boxes_are_refused_at_once(boxes, labels, threshold, message):
    with pytest.raises(InputError, match=message):
        BoxScore(boxes, labels, threshold)


def test_boxes_of_another_batch_are_refused():
    score = BoxScore([torch.zeros(1, 4)], [torch.zeros(1)])
    with pytest.raises(InputError, match="boxes of 1 images"):
        score([found([[0.0] * 4], [1], [1.0])] * 2, None)
    with pytest.raises(InputError, match="boxes of 1 images"):
        score.rows(torch.tensor([0, 1]))
    with pytest.raises(InputError, match="list of mappings"):
        score(torch.zeros(1, 4), None)


@pytest.mark.parametrize("each", [False, True])
def test_embedding_similarity_is_the_cosine(each, batch):
    torch.manual_seed(3)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    model = Split(nn.Conv2d(3, 6, 3), head).double().eval()
    concept = torch.randn((3, 5) if each else (5,), generator=torch.Generator().manual_seed(1))
    for engine in ("closed_form", "reverse_over_reverse"):
        result = Explainer(model, "target", "shapleycam-h", EmbeddingSimilarity(concept), engine=engine)(batch)
        for i in range(3):
            c = (concept[i] if each else concept).double()
            a = model.target(batch[i : i + 1]).detach()
            cosine = lambda x, c=c: (e := head(x)[0]) @ c / (e.norm() * c.norm())
            g = torch.autograd.functional.jacobian(cosine, a)
            h = torch.autograd.functional.hessian(cosine, a).reshape(a.numel(), a.numel())
            w = g - (h @ a.flatten()).view_as(a) / 2
            assert (h @ a.flatten()).norm() > 0.01 * g.norm()
            torch.testing.assert_close(result.raw[i], (a * w).sum(1)[0], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    "concept", [torch.zeros(5), torch.ones(1, 2, 3), torch.ones(3).long(), [1.0], torch.full((2,), torch.inf)]
)
def test_a_bad_concept_is_refused_at_once(concept):
    with pytest.raises(InputError, match="concept"):
        EmbeddingSimilarity(concept)


def test_a_concept_of_another_size_is_refused(batch):
    model = Split(nn.Conv2d(3, 6, 3), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))).double().eval()
    with pytest.raises(InputError, match=r"concept \(4,\); the model returned \(2, 5\)"):
        Explainer(model, "target", utility=EmbeddingSimilarity(torch.ones(4)))(batch)


@pytest.mark.parametrize("name", ["image_embeds", "pooler_output"])
@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_embeddings_of_encoders(name, kind):
    embedding = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    outputs = kind(**{"last_hidden_state": torch.ones(2, 5, 2), name: embedding})
    torch.testing.assert_close(EmbeddingSimilarity(torch.tensor([1.0, 0.0]))(outputs, None), torch.tensor([0.6, 0.0]))
