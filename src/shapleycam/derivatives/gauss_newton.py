"""The exact second order behind a head whose logits are piecewise linear in the activations, in one pass back per class.

Convolutions, linear layers, batch norm, ReLU, max pooling and sums have no curvature of their own: all of it is the utility's.
With the head's Jacobian J the Hessian is then ``JᵀU''J`` (the Gauss-Newton product, elsewhere an approximation), so that
``g = Jᵀu'``, ``HA = JᵀU''(JA)`` and ``g - HA/2 = Jᵀ(u' - U''(JA)/2)``: the forward pass carries ``JA`` in forward mode, and
one reverse pass gives the weight, where reverse over reverse needs three.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input
from torch.overrides import TorchFunctionMode

from ..errors import DerivativeError
from ..model.pooled_linear import Outdated
from . import features
from .autograd import DUAL_LEVEL, cut_off, explain, still
from .closed_form import logit_derivatives
from .terms import Derivatives, Request, Terms

#: What says nothing of a head: rearrangements, which may differ from call to call, dual numbers, and :class:`_Weigh`.
_PLAIN = frozenset(
    f"{name}Backward0"
    for name in (
        *("View", "UnsafeView", "ReshapeAlias", "Alias", "AsStrided", "Expand", "T", "Transpose", "Permute", "Squeeze"),
        *("Unsqueeze", "Slice", "Select", "Clone", "ToCopy", "FwPrimal", "MakeDual"),
    )
) | {"torch::autograd::Identity", "torch::autograd::AccumulateGrad", "torch::autograd::CopySlices", "_WeighBackward"}


def gauss_newton(request: Request) -> Derivatives:
    """Gradient and Hessian-vector product, or the weight alone, of a head that :func:`piecewise_linear` has verified.

    Raises:
        Outdated: the head has an operator that it did not have when it was verified.
        DerivativeError: no path to the logits, or an operator without a forward-mode derivative.
    """
    if request.order < 2 or features.serves(request):
        found = features.reverse_over_reverse(request)
        found.engine = "gauss_newton"
        return found
    [(name, module)] = request.layers

    by_weights = _ByWeights()

    def tangent(activations: Tensor) -> Tensor:
        by_weights.enter()
        return request.direction(request.layout_of(name, module, activations, request.inputs.images), activations)

    try:
        # The reverse pass comes after the dual level, or it would carry tangents too.
        fresh = torch.inference_mode(False)
        with fresh, DUAL_LEVEL, forward_ad.dual_level(), request.capture(gradients=True, tangent=tangent) as capture:
            try:
                outputs = capture.run(request.inputs)
            finally:
                by_weights.leave()
            logits = _logits(request, outputs)
            z, product = forward_ad.unpack_dual(logits)
            product = torch.zeros_like(z) if product is None else product.detach()
            found = request.start(capture, outputs, "gauss_newton")
            still(request, capture)
        new = operators(z) - request.operators
        if new:
            raise Outdated(f"the head has new operators: {', '.join(sorted(new))}")
        [leaf], [term] = [captured.activations for captured in capture.layers], found.terms
        assert leaf is not None
        _fill(request, term, leaf, z, product, found.targets)
    except RuntimeError as error:
        explain(error, "gauss_newton", request.writes)
        raise
    found.logits = z.detach()
    if isinstance(found.outputs, Tensor) and found.outputs.shape == z.shape:
        found.outputs = found.logits
    values = request.values(found.outputs, found.targets, found.logits) if request.with_baseline else []
    request.add_baseline(found, values)
    return found


_GRADIENTS = {F.conv1d: conv1d_input, F.conv2d: conv2d_input, F.conv3d: conv3d_input}


class _Weigh(torch.autograd.Function):
    """A linear layer or a convolution, differentiated in its input only, either way by one call of its own kind."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, function: Any, rest: tuple[Any, ...]) -> Tensor:
        out: Tensor = function(x, weight, bias, *rest)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.function, ctx.rest = inputs
        ctx.set_materialize_grads(False)  # a weight's tangent would be zeros of its size
        ctx.shape = x.shape
        ctx.save_for_backward(weight)
        ctx.save_for_forward(weight)

    @staticmethod
    def jvp(ctx: Any, carried: Tensor | None, *others: None) -> Tensor | None:
        if carried is None:
            return None
        (weight,) = ctx.saved_tensors
        # Torch's batch norm makes float32 tangents of half-precision values.
        moved: Tensor = ctx.function(carried.to(weight.dtype), weight, None, *ctx.rest)
        return moved

    @staticmethod
    def backward(ctx: Any, back: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:  # type: ignore[override]
        if back is None:
            return None, None, None, None, None
        (weight,) = ctx.saved_tensors
        if ctx.function is F.linear:
            found = torch.matmul(back, weight)
        else:
            found = _GRADIENTS[ctx.function](ctx.shape, weight, back, *ctx.rest)
        return found, None, None, None, None


class _ByWeights(TorchFunctionMode):
    """Linear layers and convolutions as :class:`_Weigh`.

    Torch's own forward mode copies the transposed weight of a linear layer, and records a graph of the tangents.
    """

    def __init__(self) -> None:
        super().__init__()
        self._entered = False

    def enter(self) -> None:
        """Behind the trunk, that is."""
        self._entered = True
        self.__enter__()

    def leave(self) -> None:
        """As ``__exit__``, and nothing where it was not entered."""
        if self._entered:
            self._entered = False
            self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear or func in _GRADIENTS:
            bound = _bound(func, *args, **(kwargs or {}))
            if bound is not None:
                return _Weigh.apply(*bound)
        return func(*args, **(kwargs or {}))


def _bound(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any) -> Any:
    """The arguments of :class:`_Weigh`; None where torch's own way is needed."""
    if named or any(isinstance(value, str) for value in rest):  # padding by name
        return None
    computed = (weight.grad_fn, None if bias is None else bias.grad_fn)  # may depend on the activations
    if any(computed) or weight.is_floating_point() is False or input.dtype != weight.dtype:
        return None
    if torch.is_autocast_enabled(input.device.type):
        return None
    return input, weight, bias, func, rest


def _logits(request: Request, outputs: Any) -> Tensor:
    logits = request.utility.logits_of(outputs)
    if logits is None or logits.ndim != 2 or not logits.requires_grad:
        raise DerivativeError(
            "Engine gauss_newton needs logits [N, K] that depend on the target layer. Choose a layer that they depend on, or "
            "engine='auto'."
        )
    return logits


def _fill(request: Request, term: Terms, leaf: Tensor, z: Tensor, product: Tensor, targets: Tensor | None) -> None:
    assert targets is not None
    # A softmax of half-precision logits loses the digits that the curvature lives in.
    wide = z.detach() if z.dtype in (torch.float32, torch.float64) else z.detach().float()
    first, second = logit_derivatives(request.utility, wide, product.to(wide.dtype), targets, 2)
    kept: list[list[Any]]
    if request.weights_only and second is not None:
        rows, kept = [first - second / 2], [term.position_weights]
    elif second is not None:
        rows, kept = [first, second], [term.gradients, term.hvps]
    else:
        rows, kept = [first], [term.gradients]
        term.hvps = [None] * first.shape[1]
    passes = [(row[:, m], into) for m in range(first.shape[1]) for row, into in zip(rows, kept, strict=True)]
    for i, (row, into) in enumerate(passes):
        (back,) = torch.autograd.grad(z, leaf, row.to(z.dtype), retain_graph=i < len(passes) - 1)
        into.append(term.layout.view(back.detach()))


def operators(tensor: Tensor) -> frozenset[str]:
    """The names of the operators that a tensor's graph goes back through."""
    waiting, known, names = [tensor.grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        names.add(node.name())
        waiting.extend(following for following, _ in node.next_functions)
    return frozenset(names) - _PLAIN


def piecewise_linear(request: Request) -> tuple[frozenset[str] | None, str]:
    """Try whether the logits are piecewise linear in the activations, and the utility a function of the logits alone.

    The second derivative along random directions must vanish exactly, at the activations of the images and at random ones of
    both signs and several times their size.

    Returns:
        (the operators of the head, in words what it is); None where it is not so.
    """
    if len(request.layers) != 1:
        return None, "there are several target layers"

    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)

    def scramble(_: int, found: Tensor) -> Tensor:
        return noise(found) * (4 * found.detach().abs().amax().nan_to_num(1.0).clamp(1.0, 1e3))

    names: frozenset[str] = frozenset()
    for replacement in (None, scramble):
        try:
            with request.capture(gradients=True, replace=replacement) as capture:
                outputs = capture.run(request.inputs)
                logits = _logits(request, outputs)
                if not request.utility.sees_logits_only(outputs, logits):
                    return None, f"utility {request.utility.name!r} is given more than the logits"
                [leaf] = [captured.activations for captured in capture.layers]
                assert leaf is not None
                with torch.enable_grad():
                    (gradient,) = torch.autograd.grad(logits, leaf, noise(logits), create_graph=True)
                    curvature = None
                    if gradient.requires_grad:
                        if cut_off(gradient):
                            return None, "an operator of the head can be differentiated once only"
                        (curvature,) = torch.autograd.grad(gradient, leaf, noise(leaf), allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, DerivativeError) as failure:
            return None, f"it could not be tried ({failure})"
        if curvature is not None and bool(curvature.any()):
            return None, "the logits are curved in the activations"
        names |= operators(logits)
    return names, "piecewise linear"
