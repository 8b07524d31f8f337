"""Reading and writing pictures: the public name of :mod:`shapleycam.data.images`."""

from .data.images import INTERPOLATIONS, Preprocess, read_image, to_picture, to_tensor

__all__ = ["INTERPOLATIONS", "Preprocess", "read_image", "to_picture", "to_tensor"]
