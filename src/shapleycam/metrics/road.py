"""ROAD: the public name of :mod:`shapleycam.evaluate.metrics.road`."""

from ..evaluate.metrics.road import *  # noqa: F403
