"""The metrics as functions: the public name of :mod:`shapleycam.evaluate.metrics.functional`."""

from ..evaluate.metrics.functional import *  # noqa: F403
