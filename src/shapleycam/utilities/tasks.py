"""Utilities for models that do not classify: segmentation, detection, embeddings.

Each is a callable that :class:`shapleycam.Explainer` takes as ``utility=``. What is held per image (masks, boxes, concepts) is
held for the batch that is explained, and is picked row by row (``rows``) where the explainer looks at other rows than that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .outputs import logits_of

#: What a pixel or a class may score, from logits [N, K, ...] and one class per image: as the utilities of the same names.
SCORES = ("logit", "probability", "log_probability", "rest")


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


class SegmentationScore:
    """The sum over some pixels of one class's score: ``U = Σ_{s in mask} u(z_{:, s}, c)``.

    For models that return logits [N, K, h, w] (or [N, K, d, h, w]), bare or under "out", as torchvision's segmentation models
    do. With ``score="logit"`` and a mask it is pytorch-grad-cam's ``SemanticSegmentationTarget``; its Hessian is then zero
    over a head without curvature, so the default is ReST, pixel by pixel.

    Args:
        category: the class, for calls without targets; targets given to the explainer come first. Without either it is, per
            image, the class that the model gives to most pixels.
        mask: bool or floating weights in the logits' size, [h, w] or [1, h, w] for all images, or [N, h, w] (for volumes
            [1, d, h, w] or [N, d, h, w]); None for the pixels of which the model itself says that they are of this class.
        score: "logit", "probability", "log_probability" or "rest".

    Raises:
        InputError: an unknown score, or a mask of the wrong kind, empty, or not finite.
    """

    reads_logits = True

    def __init__(self, category: int | None = None, mask: Tensor | None = None, score: str = "rest") -> None:
        if score not in SCORES:
            raise InputError(f"Unknown score {score!r}: expected one of {', '.join(SCORES)}.")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim < 2 or mask.is_complex():
                got = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise InputError(f"mask must be a real tensor [h, w] or [N, h, w], got {got}.")
            if not bool(mask.any()) or not bool(torch.isfinite(mask).all()):
                raise InputError("mask must hold finite weights that are not all 0: there would be nothing to explain.")
        self.category, self.mask, self.score = category, mask, score

    @property
    def tied_to_places(self) -> bool:
        """Whether it names places in the image, which do not move when the image is mirrored."""
        return self.mask is not None

    def rows(self, rows: Tensor) -> SegmentationScore:
        """The same for other rows of the batch; see :meth:`shapleycam.Utility.rows`."""
        if self.mask is None or self.mask.ndim == 2 or self.mask.shape[0] == 1:
            return self
        other = copy.copy(self)
        other.mask = self.mask[rows.to(self.mask.device)]
        return other

    def __call__(self, outputs: Any, targets: Tensor | None) -> Tensor:
        """U [N] of a model's outputs; ``targets`` int64 [N] or None.

        Raises:
            InputError: a class is out of range, or the mask does not fit the logits.
        """
        z = logits_of(outputs)
        if z is None or z.ndim < 4:
            got = type(outputs).__name__ if z is None else f"a tensor of shape {tuple(z.shape)}"
            raise InputError(f"SegmentationScore needs logits [N, K, h, w], bare or under 'out'; the model returned {got}.")
        places = z.shape[2:]
        said = z.detach().argmax(1)  # [N, *places]
        targets = self._classes(z, said) if targets is None else targets
        if targets.device.type == "cpu" and bool(((targets < 0) | (targets >= z.shape[1])).any()):
            raise InputError(f"class {targets.tolist()} is out of range: the model has {z.shape[1]} classes, counted from 0.")
        index = targets.clamp(0, z.shape[1] - 1).view(-1, 1, *[1] * len(places)).expand(-1, 1, *places)
        value = self._pixels(_wide(z), index)
        weights = said == index[:, 0] if self.mask is None else self._weights(z)
        return (value * weights.to(value.dtype)).flatten(1).sum(1)

    def _classes(self, z: Tensor, said: Tensor) -> Tensor:
        if self.category is not None:
            return torch.full((z.shape[0],), self.category, device=z.device)
        flat = said.flatten(1)
        counts = torch.zeros(z.shape[:2], device=z.device).scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
        return counts.argmax(1)

    def _weights(self, z: Tensor) -> Tensor:
        assert self.mask is not None
        shape, places = tuple(self.mask.shape), tuple(z.shape[2:])
        if shape not in (places[-2:] if len(places) == 2 else (), (1, *places), (z.shape[0], *places)):
            raise InputError(f"mask has shape {shape}, but the logits are of {z.shape[0]} images with {places} pixels.")
        return self.mask.to(z.device)

    def _pixels(self, z: Tensor, index: Tensor) -> Tensor:
        if self.score == "logit":
            return z.gather(1, index)[:, 0]
        if self.score == "probability":
            return z.softmax(1).gather(1, index)[:, 0]
        log_p = z.log_softmax(1).gather(1, index)[:, 0]
        return log_p if self.score == "log_probability" else log_p + z.gather(1, index)[:, 0]


class BoxScore:
    """How well a detector still finds given boxes: ``U = Σ_b IoU(b, d_b) + score(d_b)``.

    For models that return one mapping per image with "boxes" [D, 4] (x1, y1, x2, y2), "labels" [D] and "scores" [D], as
    torchvision's detectors do. ``d_b`` is, among the detections of b's label, the one that overlaps box b most, if by more than
    the threshold. U is 0 where nothing counts.

    Which detection answers a box is a choice, and so are non-maximum suppression and the top proposals: derivatives of both
    orders are those of the choice as made, at these activations. The regions that a two-stage detector pools are constants, as
    in its training, and so is their effect on the second derivative. A detector resizes and pads its images; for a map that
    is aligned with the image, give it sizes that need no padding.

    Args:
        boxes: per image, [B, 4] in the image's pixels.
        labels: per image, int [B].
        iou_threshold: overlap above which a detection counts, in [0, 1).
        any_label: take the detection that overlaps most whatever its label, and count it only if the label is b's: this is
            pytorch-grad-cam's ``FasterRCNNBoxScoreTarget``. A detector that finds one box under two labels then may score 0.

    Raises:
        InputError: boxes and labels do not match, or a value is out of range.
    """

    tied_to_places = True

    def __init__(
        self, boxes: Sequence[Tensor], labels: Sequence[Tensor], iou_threshold: float = 0.5, *, any_label: bool = False
    ) -> None:
        if not 0 <= iou_threshold < 1:
            raise InputError(f"iou_threshold must be in [0, 1), got {iou_threshold!r}.")
        if isinstance(boxes, Tensor) or isinstance(labels, Tensor) or len(boxes) != len(labels) or not len(boxes):
            raise InputError(
                "boxes and labels must be lists of tensors, one each per image: boxes [B, 4] and labels [B]. For one image: "
                "BoxScore([boxes], [labels])."
            )
        for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            if not isinstance(box, Tensor) or not isinstance(label, Tensor):
                raise InputError(f"boxes and labels of image {i} must be tensors, got {type(box).__name__}.")
            if box.ndim != 2 or box.shape[1] != 4 or label.shape != box.shape[:1]:
                raise InputError(
                    f"image {i} has boxes {tuple(box.shape)} and labels {tuple(label.shape)}: need [B, 4] and [B]."
                )
            if not bool((box[:, 2:] >= box[:, :2]).all()):
                raise InputError(f"a box of image {i} is inside out: boxes are (x1, y1, x2, y2) with x2 >= x1 and y2 >= y1.")
        self.boxes, self.labels = list(boxes), list(labels)
        self.iou_threshold, self.any_label = iou_threshold, any_label

    @classmethod
    def of_detections(cls, detections: Sequence[Any], score: float = 0.5, iou_threshold: float = 0.5) -> BoxScore:
        """The boxes a detector has found with at least this score, from what it returned for the batch."""
        kept = [found["scores"] >= score for found in detections]
        boxes = [found["boxes"][keep].detach() for found, keep in zip(detections, kept, strict=True)]
        return cls(boxes, [found["labels"][keep] for found, keep in zip(detections, kept, strict=True)], iou_threshold)

    def rows(self, rows: Tensor) -> BoxScore:
        """The same for other rows of the batch; see :meth:`shapleycam.Utility.rows`."""
        index = rows.tolist()
        if len(self.boxes) <= max(index, default=0):
            raise InputError(f"BoxScore holds the boxes of {len(self.boxes)} images, the batch has more.")
        other = copy.copy(self)
        other.boxes, other.labels = [self.boxes[i] for i in index], [self.labels[i] for i in index]
        return other

    def __call__(self, outputs: Any, targets: Tensor | None) -> Tensor:
        """U [N] of a detector's outputs; ``targets`` are not used: the labels are with the boxes.

        Raises:
            InputError: the outputs are no detections, or of another number of images.
        """
        if not isinstance(outputs, (list, tuple)) or not all(isinstance(o, dict) and "boxes" in o for o in outputs):
            raise InputError(f"BoxScore needs a list of mappings with boxes, labels and scores, got {type(outputs).__name__}.")
        if len(outputs) != len(self.boxes):
            raise InputError(f"BoxScore holds the boxes of {len(self.boxes)} images, the batch has {len(outputs)}.")
        return torch.stack([self._one(*each) for each in zip(outputs, self.boxes, self.labels, strict=True)])

    def _one(self, found: Any, boxes: Tensor, labels: Tensor) -> Tensor:
        scores: Tensor = found["scores"]
        nothing = scores.sum() * 0  # keeps the path to the layer: a score of 0 with a gradient of 0
        if scores.shape[0] == 0 or boxes.shape[0] == 0:
            return nothing
        overlap = _iou(boxes.to(found["boxes"]), found["boxes"])  # [B, D]
        same = found["labels"][None] == labels.to(scores.device)[:, None]
        best = (overlap if self.any_label else torch.where(same, overlap, -1.0)).detach().argmax(1, keepdim=True)
        iou = overlap.gather(1, best)[:, 0]
        counts = (iou.detach() > self.iou_threshold) & same.gather(1, best)[:, 0]
        return torch.where(counts, iou + scores[best[:, 0]], 0.0).sum() + nothing


def _iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes [B, 4] and [D, 4]: [B, D]. (The core does not import torchvision.)"""
    corner = torch.maximum(one[:, None, :2], other[None, :, :2])
    sides = (torch.minimum(one[:, None, 2:], other[None, :, 2:]) - corner).clamp_min(0)
    shared = sides.prod(2)
    area = [(b[:, 2:] - b[:, :2]).prod(1) for b in (one, other)]
    # Two boxes without area share nothing, and their union of 0 must not make NaN of that.
    overlap: Tensor = shared / (area[0][:, None] + area[1][None] - shared).clamp_min(torch.finfo(one.dtype).tiny)
    return overlap


def _embedding_of(outputs: Any) -> Tensor | None:
    for name in ("image_embeds", "pooler_output"):
        found = outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found
    return logits_of(outputs)


class EmbeddingSimilarity:
    """Cosine similarity of the model's embedding to a concept: ``U = e·c / (|e| |c|)``.

    For models that return embeddings [N, D], bare or under "image_embeds" or "pooler_output" as Hugging Face's encoders and
    CLIP do. It shows what in an image resembles another image (or a text, with an encoder of
    both), as pytorch-grad-cam's tutorial on embeddings does.

    Args:
        concept: floating [D] for all images, or [N, D], one per image.

    Raises:
        InputError: the concept has another rank, is not floating, is not finite, or is zero.
    """

    reads_logits = True

    def __init__(self, concept: Tensor) -> None:
        if not isinstance(concept, Tensor) or concept.ndim not in (1, 2) or not concept.is_floating_point():
            got = f"{concept.dtype} {tuple(concept.shape)}" if isinstance(concept, Tensor) else type(concept).__name__
            raise InputError(f"concept must be a floating tensor [D] or [N, D], got {got}.")
        norms = concept.detach().norm(dim=-1)
        if not bool((torch.isfinite(norms) & (norms > 0)).all()):
            raise InputError("concept must be finite and not zero: a direction is needed.")
        self.concept = concept.detach()

    def rows(self, rows: Tensor) -> EmbeddingSimilarity:
        """The same for other rows of the batch; see :meth:`shapleycam.Utility.rows`."""
        if self.concept.ndim == 1:
            return self
        other = copy.copy(self)
        other.concept = self.concept[rows.to(self.concept.device)]
        return other

    def __call__(self, outputs: Any, targets: Tensor | None) -> Tensor:
        """U [N] of embeddings [N, D]; ``targets`` are not used.

        Raises:
            InputError: the outputs are no embeddings of the concept's size.
        """
        embedding = _embedding_of(outputs)
        shape = None if embedding is None else tuple(embedding.shape)
        fits = shape is not None and len(shape) == 2 and shape[1] == self.concept.shape[-1]
        if embedding is None or not fits or (self.concept.ndim == 2 and self.concept.shape[0] != embedding.shape[0]):
            raise InputError(f"EmbeddingSimilarity holds a concept {tuple(self.concept.shape)}; the model returned {shape}.")
        return torch.cosine_similarity(_wide(embedding), self.concept.to(embedding.device, _wide(embedding).dtype), dim=1)
