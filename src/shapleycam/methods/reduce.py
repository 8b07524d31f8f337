"""From activations and weights to signed maps: the one place where a method's ``pooling`` is read."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..derivatives import Terms
from .eigen import principal_map
from .table import Method


def reduce(method: Method, term: Terms, alpha: Tensor | None, classes: int, backend: str) -> tuple[Tensor, str]:
    """One layer's signed maps, before the final ReLU.

    Args:
        method: an entry of the table.
        term: the layer's activations and, for a method with derivatives, its terms.
        alpha: [N, M, C], the channel weights of a method whose source is no derivative; else None.
        classes: M.
        backend: "auto", or the one that must serve.

    Returns:
        The maps [N, M, S], float32 (float64 for float64 activations), and the name of the backend that made them.
    """
    a = term.attributed
    if method.pooling == "principal":
        maps = torch.stack([principal_map(part) for part in shares(method, term, alpha, backend)], 1)
        return maps.expand(-1, classes, -1), "torch"
    if method.linear:
        # Where the weight is constant over the positions, one read of A serves every class.
        alpha = term.constant(method.order)
    if alpha is not None:
        served = ops.select("channel_weighted_sum", a, alpha, backend=backend)
        return ops.channel_weighted_sum(a, alpha, backend=served), served
    found, served = [], "torch"
    for g, h in term.pairs(method.order):
        g, h = g.expand_as(a), None if h is None else h.expand_as(a)
        served = ops.select("weighted_reduce", a, g, h, pooling=method.pooling, backend=backend)
        found.append(ops.weighted_reduce(a, g, h, method.pooling, backend=served))
    return torch.stack(found, 1), served


def shares(method: Method, term: Terms, alpha: Tensor | None, backend: str) -> list[Tensor]:
    """A - baseline times the method's weights, [N, C, S] per class, whose sum over the channels would be the map.

    One entry for all classes where the weight does not depend on the class.
    """
    a = term.attributed
    if alpha is not None:
        return [a * alpha[:, m, :, None].to(a.dtype) for m in range(alpha.shape[1])]
    if method.source == "none":
        return [a]
    if method.pooling == "principal":
        return [a * w for w in term.attribution_weights(method.order)]
    # A map is a sum over the channels, so a channel alone, as an image of one channel, is its share.
    alone = a.flatten(0, 1)[:, None]
    found = []
    for g, h in term.pairs(method.order):
        parts = [None if t is None else t.expand_as(a).flatten(0, 1)[:, None] for t in (g, h)]
        assert parts[0] is not None
        share = ops.weighted_reduce(alone, parts[0], parts[1], method.pooling, backend=backend)
        found.append(share.unflatten(0, tuple(a.shape[:2])))
    return found
