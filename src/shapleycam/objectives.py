"""Utilities for models that do not classify: the public name of :mod:`shapleycam.utilities.tasks`."""

from .utilities.tasks import SCORES, BoxScore, EmbeddingSimilarity, SegmentationScore

__all__ = ["SCORES", "BoxScore", "EmbeddingSimilarity", "SegmentationScore"]
