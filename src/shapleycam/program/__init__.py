"""The road as a pure function: ``(images, targets) -> (logits, targets, raw, maps)``.

A program remembers what was learned about a model and learns nothing more: no locks, no studies, no choice of an engine, and
nothing but plain PyTorch operators behind the model, which ``torch.export`` takes as they are.

``pooled``: pool-and-linear heads, around the model as it is. ``traced``: all other heads, as a graph (``graph``,
``substitutes``) whose derivatives are taken once. ``build``: which of them, compared with the explainer.
``compiled``: the same through ``torch.compile``, with weights of its own (``folding``). ``captured``: by CUDA graphs.
"""

from .base import TARGETS, Explained, Program
from .build import TOLERANCE, build
from .captured import MOST_GRAPHS, Captured
from .compiled import Compilation, Compiled, Report, compile_program

__all__ = [
    "MOST_GRAPHS",
    "TARGETS",
    "TOLERANCE",
    "Captured",
    "Compilation",
    "Compiled",
    "Explained",
    "Program",
    "Report",
    "build",
    "compile_program",
]
