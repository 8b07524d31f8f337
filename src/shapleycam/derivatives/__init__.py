"""Derivatives of the utility in the activations, one engine per file.

Every engine runs the model forward, stops gradients before the target layer, and answers a :class:`Request` with
:class:`Derivatives`. ``closed_form`` serves heads verified to be pool-and-linear; ``reverse_over_reverse`` and
``forward_over_reverse`` are exact for any head, the former through the features (``features``) where classes outnumber them;
``gauss_newton`` is the shorter way for heads that are seen to be piecewise linear, where it is asked for.
``quadrature`` integrates the gradient along the path from a baseline in place of the second order; ``midpoint`` is its
one-node case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from .autograd import activations_only, forward_over_reverse
from .closed_form import closed_form
from .features import reverse_over_reverse
from .gauss_newton import gauss_newton
from .quadrature import midpoint, quadrature
from .terms import Derivatives, Request, Terms

#: The engines that a user can name.
ENGINES: Mapping[str, Callable[[Request], Derivatives]] = MappingProxyType(
    {
        "closed_form": closed_form,
        "gauss_newton": gauss_newton,
        "reverse_over_reverse": reverse_over_reverse,
        "forward_over_reverse": forward_over_reverse,
        "quadrature": quadrature,
        "midpoint": midpoint,
    }
)

#: Those that integrate along the path from the baseline.
PATH_ENGINES = ("quadrature", "midpoint")

__all__ = ["ENGINES", "PATH_ENGINES", "Derivatives", "Request", "Terms", "activations_only"]
