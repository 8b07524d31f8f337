"""Targets: from the model's output for one image to the scalar that is explained.

A target is any callable. The three of the classifiers are recognised, here and from pytorch-grad-cam alike, and then the
utilities ``logit``, ``probability`` and ``rest`` of the explainer serve, whole batches at a time.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class ClassifierOutputTarget:
    """The logit of a class: output [K] to a scalar, or [N, K] to [N]."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output[..., self.category]


class ClassifierOutputSoftmaxTarget:
    """The softmax probability of a class: output [K] to a scalar, or [N, K] to [N]."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output.softmax(-1)[..., self.category]


class ClassifierOutputReST:
    """The logit plus the log-probability of a class (arXiv 2501.06261): output [K] to a scalar, or [N, K] to [N]."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output[..., self.category] + model_output.log_softmax(-1)[..., self.category]


class BinaryClassifierOutputTarget:
    """The only output of a binary classifier: as it is for category 1, negated for category 0."""

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output if self.category == 1 else -model_output


class SoftmaxOutputTarget:
    """All softmax probabilities; not a scalar, so for metrics rather than maps."""

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output.softmax(-1)


class RawScoresOutputTarget:
    """The output as it is; a scalar only where the model returns one number per image."""

    def __call__(self, model_output: Tensor) -> Tensor:
        return model_output


class SemanticSegmentationTarget:
    """The sum of a class's scores over the pixels of a mask: output [K, H, W] to a scalar.

    Args:
        category: the class.
        mask: [H, W], a NumPy array or a tensor; weights of the pixels, as a rule 0 and 1.
    """

    def __init__(self, category: int, mask: Any) -> None:
        self.category = category
        self.mask = torch.as_tensor(mask)

    def __call__(self, model_output: Tensor) -> Tensor:
        return (model_output[self.category] * self.mask.to(model_output.device)).sum()


class FasterRCNNBoxScoreTarget:
    """How well given boxes are found again: over the boxes, overlap plus score of the best detection.

    A box counts if its best overlap (intersection over union) is above the threshold and has the box's label.

    Args:
        labels: one per box.
        bounding_boxes: [B, 4] as x1, y1, x2, y2 in pixels, a NumPy array, a tensor or a list.
        iou_threshold: the overlap that a box must exceed.
    """

    def __init__(self, labels: Sequence[int], bounding_boxes: Any, iou_threshold: float = 0.5) -> None:
        self.labels = labels
        self.bounding_boxes = bounding_boxes
        self.iou_threshold = iou_threshold

    def __call__(self, model_outputs: Mapping[str, Tensor]) -> Tensor:
        found = model_outputs["boxes"]
        total = found.new_zeros(1)
        if len(found) == 0:
            return total
        for wanted, label in zip(self.bounding_boxes, self.labels, strict=False):
            overlaps = _overlap(torch.as_tensor(wanted, device=found.device, dtype=found.dtype), found)
            best = overlaps.argmax()
            if overlaps[best] > self.iou_threshold and model_outputs["labels"][best] == label:
                total = total + overlaps[best] + model_outputs["scores"][best]
        return total


class FinerWeightedTarget:
    """The logit of a class less those of rivals, weighted by the rivals' probabilities (Finer-CAM, arXiv 2501.11309)."""

    def __init__(self, main_category: int, comparison_categories: Sequence[int], alpha: float) -> None:
        self.main_category = main_category
        self.comparison_categories = comparison_categories
        self.alpha = alpha

    def __call__(self, model_output: Tensor) -> Tensor:
        rivals = list(self.comparison_categories)
        weights = model_output.softmax(-1)[..., rivals]
        margins = model_output[..., self.main_category, None] - self.alpha * model_output[..., rivals]
        return (weights * margins).sum(-1) / (weights.sum(-1) + 1e-9)


def _overlap(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of one box [4] with boxes [B, 4]."""
    corner = torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])
    shared = corner.clamp_min(0).prod(1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return shared / (area - shared)


_UTILITIES = {
    "ClassifierOutputTarget": "logit",
    "ClassifierOutputSoftmaxTarget": "probability",
    "ClassifierOutputReST": "rest",
}
_MODULES = (__name__, "pytorch_grad_cam.utils.model_targets")


def utility_of(target: Any) -> str | None:
    """The named utility that a target is, or None: of a subclass nothing is known, nor of a category that is no index."""
    kind = type(target)
    if kind.__module__ not in _MODULES:
        return None
    category = getattr(target, "category", None)
    counts = isinstance(category, numbers.Integral) and not isinstance(category, bool) and int(category) >= 0
    return _UTILITIES.get(kind.__name__) if counts else None
