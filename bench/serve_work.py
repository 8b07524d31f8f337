"""Decode, explain, encode: what every server of bench/serve.py does, and what the bare loop does."""

from __future__ import annotations

import torch
from torch import Tensor

from shapleycam import Explainer
from shapleycam.cli import keep_freed_memory
from shapleycam.models import load_classifier
from shapleycam.serve.pictures import decode, npy


class Work:
    """EfficientNet-Lite0 and its explainer, on one thread."""

    def __init__(self) -> None:
        keep_freed_memory()  # as the command line does: it makes this network faster, and is to be the same for all
        torch.set_num_threads(1)
        self.preprocess, model = (classifier := load_classifier()).preprocess, classifier.model
        self.explainer = Explainer(model)
        self.explainer.prepare(torch.zeros(1, 3, 224, 224))

    def decode(self, data: bytes) -> Tensor:
        """float32 [3, 224, 224]."""
        return self.preprocess.normalise(self.preprocess.view(decode(data, pixels=50_000_000)))

    def explain(self, images: Tensor) -> Tensor:
        """The signed maps [N, 7, 7]."""
        return self.explainer(images).raw

    def encode(self, maps: Tensor) -> bytes:
        """A NumPy file."""
        return npy(maps)
