"""Explanations that leave Python: one file for ONNX Runtime, OpenVINO, PyTorch or a C++ process.

:func:`export` writes an explainer as such a file, an *artefact*, and :func:`load` opens one::

    from shapleycam.export import export, load

    export(Explainer(model), images, "explained.onnx")
    load("explained.onnx").explain(images).maps
"""

from .artefact import Artefact, Result, load
from .check import Checks
from .make import export
from .metadata import Metadata, Port

__all__ = ["Artefact", "Checks", "Metadata", "Port", "Result", "export", "load"]
