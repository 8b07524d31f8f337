"""Operators that torch differentiates once only, and what runs in their place behind the target layer.

Their substitutes compute the same values and have every derivative, so that a Hessian-vector product can pass through them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import roi_align


class TwiceDifferentiable(TorchFunctionMode):
    """Where gradients are on: attention as plain products and softmax, and the substitutes of RoIAlign and hard sigmoid.

    Fused attention has no double backward. Torch's own switch (``sdpa_kernel``) is global to the process and would change the
    user's other threads; this mode is local to the thread and leaves the trunk's fused attention alone.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return math_attention(*args, **kwargs)
        if func is F.hardsigmoid:
            return hardsigmoid(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # Runs with this mode off. Asked for its weights, it takes the decomposed road by itself.
            wanted = inspect.signature(func).bind(*args, **kwargs)
            asked = wanted.arguments.get("need_weights", True)
            wanted.arguments["need_weights"] = True
            attended, weights = func(*wanted.args, **wanted.kwargs)
            return attended, weights if asked else None
        if getattr(func, "_qualified_op_name", None) == roi_align.NAME:
            return roi_align.roi_align(*args, **kwargs)
        return func(*args, **kwargs)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    out = F.relu6(input + 3) / 6
    return input.copy_(out) if inplace else out


def math_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # The decomposed operator takes an additive mask only.
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return out
