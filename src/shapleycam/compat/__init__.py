"""A drop-in for pytorch-grad-cam: change ``pytorch_grad_cam`` to ``shapleycam.compat`` in the imports and keep the code.

    from shapleycam.compat import GradCAM, ShapleyCAM
    from shapleycam.compat.utils.image import show_cam_on_image
    from shapleycam.compat.utils.model_targets import ClassifierOutputTarget

Targets, reshape transforms and test-time augmentations of pytorch-grad-cam itself are accepted too. Its methods that are not
here (FullGrad, SESS, …) come from pytorch-grad-cam where that is installed; without it the name can still be imported, and
raises when it is used. Needs NumPy (``pip install 'shapleycam[compat]'``).
"""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import InputError
from . import utils
from .cams import (
    AblationCAM,
    AumannShapleyCAM,
    BaseCAM,
    EigenCAM,
    EigenGradCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    RandomCAM,
    ScoreCAM,
    ShapleyCAM,
    XGradCAM,
)
from .utils.image import deprocess_image, preprocess_image, show_cam_on_image
from .utils.model_targets import (
    BinaryClassifierOutputTarget,
    ClassifierOutputReST,
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget,
    FasterRCNNBoxScoreTarget,
    FinerWeightedTarget,
    RawScoresOutputTarget,
    SemanticSegmentationTarget,
    SoftmaxOutputTarget,
)
from .utils.reshape_transforms import fasterrcnn_reshape_transform, swinT_reshape_transform, vit_reshape_transform

__all__ = [
    "AblationCAM",
    "AumannShapleyCAM",
    "BaseCAM",
    "BinaryClassifierOutputTarget",
    "ClassifierOutputReST",
    "ClassifierOutputSoftmaxTarget",
    "ClassifierOutputTarget",
    "EigenCAM",
    "EigenGradCAM",
    "FasterRCNNBoxScoreTarget",
    "FinerWeightedTarget",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "RandomCAM",
    "RawScoresOutputTarget",
    "ScoreCAM",
    "SemanticSegmentationTarget",
    "ShapleyCAM",
    "SoftmaxOutputTarget",
    "XGradCAM",
    "deprocess_image",
    "fasterrcnn_reshape_transform",
    "preprocess_image",
    "show_cam_on_image",
    "swinT_reshape_transform",
    "utils",
    "vit_reshape_transform",
]

#: What pytorch-grad-cam 1.5.7 has besides.
ELSEWHERE = (
    "AblationLayer",
    "AblationLayerFasterRCNN",
    "AblationLayerVit",
    "DeepFeatureFactorization",
    "FEM",
    "FinerCAM",
    "FullGrad",
    "GuidedBackpropReLUModel",
    "KPCA_CAM",
    "RefineCAM",
    "SESS",
    "SegEigenCAM",
    "run_dff_on_image",
)


def __getattr__(name: str) -> Any:
    if name not in ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("pytorch_grad_cam"), name)
    except ImportError:
        return _absent(name)


def _absent(name: str) -> type:
    """Stands for a name that cannot be had, so that an import line that names it among others still works."""

    def refuse(self: object, *arguments: object, **options: object) -> None:
        raise InputError(f"{name} is not part of shapleycam: install grad-cam, from which it is then taken.")

    return type(name, (), {"__init__": refuse, "__doc__": f"{name} of pytorch-grad-cam, which is not installed."})
