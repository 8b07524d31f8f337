"""The helpers that pytorch-grad-cam keeps under ``pytorch_grad_cam.utils``."""

from . import image, model_targets, reshape_transforms

__all__ = ["image", "model_targets", "reshape_transforms"]
