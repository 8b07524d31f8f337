"""Insertion and deletion: the public name of :mod:`shapleycam.evaluate.metrics.curves`."""

from ..evaluate.metrics.curves import *  # noqa: F403
