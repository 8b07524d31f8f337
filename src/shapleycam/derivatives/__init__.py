"""Derivatives of the utility in the activations, one engine per file.

Every engine runs the model forward, stops gradients before the target layer, and answers a :class:`Request` with
:class:`Derivatives`. ``closed_form`` serves heads verified to be pool-and-linear; ``reverse_over_reverse`` and
``forward_over_reverse`` are exact for any head, the former through the features (``features``) where classes outnumber them;
``midpoint`` is approximate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from .autograd import activations_only, forward_over_reverse
from .closed_form import closed_form
from .features import reverse_over_reverse
from .midpoint import midpoint
from .terms import Derivatives, Request, Terms

#: The engines that a user can name.
ENGINES: Mapping[str, Callable[[Request], Derivatives]] = MappingProxyType(
    {
        "closed_form": closed_form,
        "reverse_over_reverse": reverse_over_reverse,
        "forward_over_reverse": forward_over_reverse,
        "midpoint": midpoint,
    }
)

__all__ = ["ENGINES", "Derivatives", "Request", "Terms", "activations_only"]
