"""The method table: every attribution method is one entry, not one class.

An entry says which derivatives a method needs, where its weight comes from, and how weight and activations become a map. With
``w = gradient - hvp / 2`` for the second-order rows and ``w = gradient`` for the first-order ones, the formulas are those
of arXiv 2501.06261, section 4, under the names the paper uses.

Naming trap: in the authors' public code the class ``ShapleyCAM`` is the paper's ShapleyCAM-E, and ``ShapleyCAM_mean``
is the paper's ShapleyCAM.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import InputError


@dataclass(frozen=True, slots=True)
class Method:
    """One entry of the method table.

    Attributes:
        name: the key, lower case ("shapleycam-h").
        title: the name as the literature writes it ("ShapleyCAM-H").
        order: the highest derivative it needs: 2 (gradient and Hessian-vector product), 1 (gradient) or 0.
        pooling: how weight and activations become a map: a row of :func:`shapleycam.ops.weighted_reduce`; "channels" for
            channel weights and :func:`shapleycam.ops.channel_weighted_sum`; or "principal", the first principal component
            (:mod:`shapleycam.methods.eigen`) of the weighted activations. See :mod:`shapleycam.methods.reduce`.
        formula: the map before the final ReLU.
        source: where the weight comes from: "derivative" (w at order 2, g at order 1); "none" (1 everywhere); or a key of
            :data:`shapleycam.methods.perturbation.SOURCES` ("random", "score", "ablation").
    """

    name: str
    title: str
    order: int
    pooling: str
    formula: str
    source: str = "derivative"

    @property
    def linear(self) -> bool:
        """Whether the map is ``sum_c mean_s(w) A`` as soon as the weight is constant over the positions."""
        return self.pooling in ("mean", "elementwise")


_ROWS = (
    Method("shapleycam", "ShapleyCAM", 2, "mean", "Σ_c mean_s(w)·A"),
    Method("shapleycam-h", "ShapleyCAM-H", 2, "elementwise", "Σ_c w·A"),
    Method("shapleycam-e", "ShapleyCAM-E", 2, "elementwise_relu", "Σ_c max(w·A, 0)"),
    Method("shapleycam-x", "ShapleyCAM-X", 2, "activation", "α_c = Σ_s w·A / (Σ_s A + 1e-7); Σ_c α_c·A"),
    Method("gradcam", "GradCAM", 1, "mean", "Σ_c mean_s(g)·A"),
    Method("hirescam", "HiResCAM", 1, "elementwise", "Σ_c g·A"),
    Method("gradcam-e", "GradCAM-E", 1, "elementwise_relu", "Σ_c max(g·A, 0)"),
    Method("xgradcam", "XGradCAM", 1, "activation", "α_c = Σ_s g·A / (Σ_s A + 1e-7); Σ_c α_c·A"),
    Method("layercam", "LayerCAM", 1, "positive_gradient", "Σ_c max(g, 0)·A"),
    Method(
        "gradcam++",
        "GradCAM++",
        1,
        "plusplus",
        "α_c = Σ_s max(g, 0)·g² / (2g² + g³·Σ_s A + 1e-6), 0 where g = 0; Σ_c α_c·A",
    ),
    Method("randomcam", "RandomCAM", 0, "channels", "α_c ~ Uniform(-1, 1), seeded; Σ_c α_c·A", "random"),
    Method(
        "scorecam",
        "ScoreCAM",
        0,
        "channels",
        "α_c = softmax_c U(image · A_c resized and scaled to [0, 1]); Σ_c α_c·A",
        "score",
    ),
    Method("ablationcam", "AblationCAM", 0, "channels", "α_c = (U(A) - U(A with A_c = 0)) / U(A); Σ_c α_c·A", "ablation"),
    Method("eigencam", "EigenCAM", 0, "principal", "first principal component of A over the positions", "none"),
    Method("eigengradcam", "EigenGradCAM", 1, "principal", "first principal component of g·A over the positions"),
)

#: Every method by name: those of the paper's table, then those that pytorch-grad-cam's users know besides.
METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})

#: The names of the methods in the table of arXiv 2501.06261.
PAPER_METHODS = (
    "shapleycam",
    "shapleycam-h",
    "shapleycam-e",
    "shapleycam-x",
    "gradcam",
    "hirescam",
    "gradcam-e",
    "xgradcam",
    "layercam",
    "gradcam++",
    "randomcam",
)


def get_method(name: str | Method) -> Method:
    """The method called ``name`` (case does not matter).

    Raises:
        InputError: there is no such method; the message suggests the nearest names.
    """
    if isinstance(name, Method):
        return name
    row = METHODS.get(str(name).lower())
    if row is None:
        near = difflib.get_close_matches(str(name).lower(), METHODS, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise InputError(f"Unknown method {name!r}. {hint}The methods are: {', '.join(METHODS)}.")
    return row
