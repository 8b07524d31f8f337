"""What the operators know of the named utilities: their gradients and curvatures in the logits.

With logits ``z`` [N, K], ``p = softmax(z)`` and the explained class ``c``, both live in the span of three vectors, ``e_c``,
``p`` and ``p * v`` (arXiv 2501.06261, section 4.2):

    ============== ============== ================== ================================================
    name           U              dU/dz              (d²U/dz²) v, with s = p·v
    ============== ============== ================== ================================================
    logit          z_c            e_c                0
    probability    p_c            p_c (e_c - p)      p_c [(v_c - s) e_c + (2s - v_c) p - p*v]
    log_probability ln p_c        e_c - p            s p - p*v
    rest           z_c + ln p_c   2 e_c - p          s p - p*v
    ============== ============== ================== ================================================

So a utility is a row of three coefficients, and a closed form needs the products of the head's weight with ``p`` and
``p * v`` once per image, whatever the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

#: Coefficients [N, M] on (e_c, p, p*v); a float stands for the same value everywhere.
Coefficients = tuple[Tensor | float, Tensor | float, Tensor | float]


@dataclass(frozen=True, slots=True)
class Row:
    """One named utility in the logits.

    Attributes:
        gradient: ``(p_c [N, M]) -> Coefficients`` of dU/dz.
        curvature: ``(p_c, v_c, s) -> Coefficients`` of (d²U/dz²)v, each [N, M] or [N, 1].
        curved: False where d²U/dz² vanishes.
    """

    gradient: Callable[[Tensor], Coefficients]
    curvature: Callable[[Tensor, Tensor, Tensor], Coefficients]
    curved: bool = True


def _no_curvature(p_c: Tensor, v_c: Tensor, s: Tensor) -> Coefficients:
    return 0.0, 0.0, 0.0


def _softmax_curvature(p_c: Tensor, v_c: Tensor, s: Tensor) -> Coefficients:
    return 0.0, s, -1.0


def _logit_gradient(p_c: Tensor) -> Coefficients:
    return 1.0, 0.0, 0.0


def _probability_gradient(p_c: Tensor) -> Coefficients:
    return p_c, -p_c, 0.0


def _probability_curvature(p_c: Tensor, v_c: Tensor, s: Tensor) -> Coefficients:
    return p_c * (v_c - s), p_c * (2 * s - v_c), -p_c


def _log_probability_gradient(p_c: Tensor) -> Coefficients:
    return 1.0, -1.0, 0.0


def _rest_gradient(p_c: Tensor) -> Coefficients:
    return 2.0, -1.0, 0.0


#: By name, in the order of the enum shapleycam_utility.
COEFFICIENTS: Mapping[str, Row] = MappingProxyType(
    {
        "logit": Row(_logit_gradient, _no_curvature, curved=False),
        "probability": Row(_probability_gradient, _probability_curvature),
        "log_probability": Row(_log_probability_gradient, _softmax_curvature),
        "rest": Row(_rest_gradient, _softmax_curvature),
    }
)
