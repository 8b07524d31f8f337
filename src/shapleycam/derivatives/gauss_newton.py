"""The exact second order behind a head whose logits are piecewise linear in the activations, in one pass back per class.

Convolutions, linear layers, batch norm, ReLU, max pooling and sums have no curvature of their own: all of it is the utility's.
With the head's Jacobian J the Hessian is then ``JᵀU''J`` (the Gauss-Newton product, elsewhere an approximation), so that
``g = Jᵀu'``, ``HA = JᵀU''(JA)`` and ``g - HA/2 = Jᵀ(u' - U''(JA)/2)``: the forward pass carries ``JA`` in forward mode, and
one reverse pass gives the weight, where reverse over reverse needs three.

Whether the head is such a one is read off its graph in every call, and the two passes are held against each other:
``⟨r, JA⟩ = ⟨Jᵀr, A⟩``, which fails where something in the head is seen by one of them only.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

from ..errors import DerivativeError, ShapleyCamError
from . import features
from .autograd import ConstantsStay, dual_level, explain, still
from .closed_form import logit_derivatives
from .terms import Derivatives, Request, Terms

#: Operators that are linear in all that they read, or pick, clip or fold it at kinks.
_STRAIGHT = frozenset(
    f"{name}Backward{number}"
    for name in (
        *("Add", "Sub", "Neg", "Sum", "Mean", "Cat", "Stack", "Relu", "LeakyRelu", "Hardtanh", "Threshold", "Abs", "Clamp"),
        *("ClampMin", "ClampMax", "Amax", "Amin", "Max", "Min", "Maximum", "Minimum", "ConstantPadNd", "NativeDropout"),
        *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "AvgPool2D", "AvgPool3D"),
        *("AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "MkldnnAdaptiveAvgPool2D", "UpsampleNearest2D", "UpsampleBilinear2D"),
        *("View", "UnsafeView", "ReshapeAlias", "Alias", "AsStrided", "Expand", "T", "Transpose", "Permute", "Squeeze"),
        *("Unsqueeze", "Slice", "Select", "Clone", "ToCopy", "FwPrimal", "MakeDual", "Split", "SplitWithSizes", "Unbind"),
    )
    for number in range(4)
) | {
    "torch::autograd::Identity",
    "torch::autograd::AccumulateGrad",
    "torch::autograd::CopyBackwards",
}
#: Products, which are linear while one factor alone depends on the activations; of a quotient the first.
_PRODUCTS = frozenset(
    f"{name}Backward{number}"
    for name in ("Mul", "Div", "Mm", "Bmm", "Addmm", "Baddbmm", "Convolution", "MkldnnConvolution", "MkldnnLinear")
    for number in range(4)
) | {"_WeighBackward"}
#: With the statistics it was given; those of the batch are curved.
_NORMS = frozenset({"NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"})
#: Relative errors up to which the two passes count as adjoint.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def gauss_newton(request: Request) -> Derivatives:
    """Gradient and Hessian-vector product, or the weight alone, of a head that is piecewise linear.

    Raises:
        DerivativeError: several target layers; no path to the logits; a utility that is given more than the logits; an operator
            of the head that is not known to be piecewise linear, has no forward-mode derivative, or is seen by one of the two
            passes only.
        Outdated: an operator that was not there before writes into the target layer's output.
    """
    if request.order < 2 or features.serves(request):
        found = features.reverse_over_reverse(request)
        found.engine = "gauss_newton"
        return found
    if len(request.layers) != 1:
        raise DerivativeError(f"Engine gauss_newton needs one target layer, got {len(request.layers)}. Use engine='auto'.")
    [(name, module)] = request.layers
    level, directions = ExitStack(), []

    def tangent(activations: Tensor) -> Tensor:
        # Behind the trunk, so that other threads wait for the head alone.
        level.enter_context(dual_level("gauss_newton"))
        level.enter_context(_ByWeights())
        layout = request.layout_of(name, module, activations, request.inputs.images)
        directions.append(request.direction(layout, activations))
        return directions[0]

    try:
        with torch.inference_mode(False), request.capture(gradients=True, tangent=tangent) as capture:
            try:
                outputs = capture.run(request.inputs)
                logits = _logits(request, outputs)
                z, product = forward_ad.unpack_dual(logits)
            finally:
                level.close()
            product = torch.zeros_like(z) if product is None else product.detach()
            found = request.start(capture, outputs, "gauss_newton")
            still(request, capture)
        [leaf], [term] = [captured.activations for captured in capture.layers], found.terms
        assert leaf is not None
        certify(z, leaf)
        # The reverse passes come after the dual level, or they would carry tangents too.
        _fill(request, found, term, leaf, z, product, directions[0])
    except RuntimeError as error:
        explain(error, "gauss_newton", request.writes)
        if isinstance(error, (ShapleyCamError, torch.OutOfMemoryError)):
            raise
        # What forward mode lacks shows in many ways: batch norm's tangents of bfloat16 are float32, say.
        raise DerivativeError(
            f"Engine gauss_newton: this head fails in forward mode ({str(error).splitlines()[0]}). Use engine='auto'."
        ) from error
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


class _ByWeights(ConstantsStay):
    """Linear layers and convolutions as :class:`_Weigh`.

    Torch's own forward mode copies the transposed weight of a linear layer, and records a graph of the tangents.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_grad_enabled() and (func is F.linear or func in _GRADIENTS):
            bound = _bound(func, *args, **(kwargs or {}))
            if bound is not None:
                return _Weigh.apply(*bound)
        return super().__torch_function__(func, types, args, kwargs)


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
    if not request.utility.sees_logits_only(outputs, logits):
        raise DerivativeError(
            f"Engine gauss_newton needs a utility of the logits alone, and {request.utility.name!r} is given more. Use "
            "engine='auto'."
        )
    return logits


def certify(z: Tensor, leaf: Tensor) -> None:
    """See by the graph that ``z`` is piecewise linear in ``leaf``.

    Raises:
        DerivativeError: names an operator between them that is not known to be so.
    """
    reaches = _reaching(z, leaf)
    for node, inputs in reaches.items():
        name = node.name()
        if name in _PRODUCTS:
            fine = sum(inputs) == 1 and (not name.startswith("DivBackward") or inputs[0])
        elif name in _NORMS:
            fine = inputs[0] and sum(inputs) == 1 and not getattr(node, "_saved_training", True)
        else:
            fine = name in _STRAIGHT
        if not fine:
            raise DerivativeError(
                f"Engine gauss_newton needs logits that are piecewise linear in the activations, and the head has {name}, "
                "which is curved, or not known not to be. Use engine='auto'."
            )


def _reaching(z: Tensor, leaf: Tensor) -> dict[Any, list[bool]]:
    """The nodes of the graph from which the leaf is reached, and by which of their inputs."""
    order, known, waiting = [], set(), [(z.grad_fn, False)]
    while waiting:
        node, done = waiting.pop()
        if node is None or (node in known and not done):
            continue
        if done:
            order.append(node)
            continue
        known.add(node)
        waiting.append((node, True))
        waiting.extend((following, False) for following, _ in node.next_functions)
    found: dict[Any, list[bool]] = {}
    for node in order:  # what a node reads stands before it
        if getattr(node, "variable", None) is leaf:
            found[node] = []
            continue
        inputs = [following in found for following, _ in node.next_functions]
        if any(inputs):
            found[node] = inputs
    return found


def _fill(
    request: Request, found: Derivatives, term: Terms, leaf: Tensor, z: Tensor, product: Tensor, direction: Tensor
) -> None:
    assert found.targets is not None
    # A softmax of half-precision logits loses the digits that the curvature lives in.
    wide = z.detach() if z.dtype in (torch.float32, torch.float64) else z.detach().float()
    first, second = logit_derivatives(request.utility, wide, product.to(wide.dtype), found.targets, 2)
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
        if i == 0:
            _check_adjoint(found, row, product, back, direction)


def _check_adjoint(found: Derivatives, row: Tensor, product: Tensor, back: Tensor, direction: Tensor) -> None:
    """Hold ``⟨r, JA⟩`` against ``⟨Jᵀr, A⟩``, over the batch, whose images may see one another.

    On an accelerator all images are marked where they differ, as looking would wait.

    Raises:
        DerivativeError: they differ, on a CPU.
    """
    wide = torch.promote_types(back.dtype, torch.float32)
    forward, reverse = row.to(wide) * product.to(wide), back.to(wide) * direction.to(wide)
    size = forward.abs().sum() + reverse.abs().sum()
    off = (forward.sum() - reverse.sum()).abs() > _TOLERANCE.get(back.dtype, 1e-3) * size
    if back.device.type != "cpu":
        found.mark(torch.where(off, float("nan"), 0.0).expand(row.shape[0]))
    elif bool(off):
        raise DerivativeError(
            "Engine gauss_newton: forward and reverse mode see different heads (a hook on a tensor, or a function whose own "
            "derivatives differ). Use engine='auto'."
        )
