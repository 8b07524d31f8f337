"""Programs of all other heads: reverse over reverse, or quadrature, traced to a graph of plain operators.

The derivatives are taken while tracing, of the head alone and with respect to the target layer's output: what remains is a
function of tensors, which runs, compiles and exports like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_unflatten

from ..derivatives.path import background
from ..errors import ExportError, ShapleyCamError
from ..model.layouts import Transformed
from ..ops import reference
from ..utilities.named import evaluate
from .base import Explained, Program, Recipe
from .folding import bind
from .graph import TRACING, ModelGraph, any_strides, place_of, plainly, said, tensors_of
from .sizes import counterexamples
from .substitutes import Smooth


class TracedProgram(Program):
    """A trunk and the derivatives of a head, both flat graphs over the weights of the user's model.

    With several classes per image the head runs once for each, all of them together.

    Args:
        model: as for :class:`Program`.
        recipe: as there.
        graph: of the model.
        frozen: hold the weights as they are now, and not the model.

    Attributes:
        doubtful: sizes of images for which something does not hold that held while the derivatives were traced, with what that
            is. Most of it is about memory layouts and the choice of kernels, which change no value: whether this is such,
            the comparison at these sizes tells.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, graph: ModelGraph, frozen: bool = False) -> None:
        super().__init__(None if frozen else model, recipe)
        trunk, (derivatives, self.doubtful) = graph.trunk.module, _derivatives(recipe, graph)
        self._given = recipe.targets != "predicted"
        self._by_row = _by_row(graph)
        results: Any = derivatives.graph.output_node().args[0]
        self._classes = int(results[0].meta["val"].shape[1])
        self._trunk_weights, self._head_weights = graph.trunk.weights, graph.head.weights
        if frozen:
            trunk = bind(trunk, tensors_of(model, graph.constants, self._trunk_weights))
            derivatives = bind(derivatives, tensors_of(model, graph.constants, self._head_weights))
            self._trunk_weights = self._head_weights = ()
        else:
            for name, tensor in graph.constants.items():
                self.register_buffer(name, tensor, persistent=False)
        self.trunk, self.derivatives = trunk, derivatives

    def explain(self, images: Tensor, targets: Tensor | None) -> Explained:
        """As :meth:`Program.explain`; autocast, which would cast some of the operators and not what they meet, is left out."""
        if not torch.is_autocast_enabled(images.device.type):
            return super().explain(images, targets)
        with plainly(images.device):
            return super().explain(images, targets)

    def _tensors(self, names: Sequence[str]) -> list[Tensor]:
        """The weights as they are now; a parameter that was replaced is followed."""
        if self.model is None:
            return []
        return tensors_of(self.model, self._buffers, names)

    def _maps(self, images: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        inputs = self.trunk(*self._tensors(self._trunk_weights), images)
        classes = 1
        count = images.shape[0]
        if self.targets == "all":
            classes = self._classes
            targets = torch.arange(classes, device=images.device).expand(count, -1)
        elif targets is not None:
            classes = targets.shape[1]
        rows: list[Tensor] = []
        if self._given:
            # [M, N] in one row: the inputs are repeated class by class.
            rows = [targets.T.reshape(-1) if targets is not None else images.new_full((count,), -1, dtype=torch.int64)]
            if targets is not None and targets.shape[1] != 1:
                inputs = [
                    each.unsqueeze(0).expand(classes, *each.shape).flatten(0, 1) if by_row else each
                    for each, by_row in zip(inputs, self._by_row, strict=True)
                ]
        logits, chosen, weight, *hvp = self.derivatives(*self._tensors(self._head_weights), *inputs, *rows)
        a = self.layout.view(inputs[0])
        if self._named_baseline != "zero":
            a = a - background(self.baseline if self.baseline is not None else self._named_baseline, a)
        views = [self.layout.view(each) for each in (weight, *hvp)]
        raw = reference.weighted_reduce(a, views[0], views[1] if hvp else None, self.method.pooling)
        known = (chosen >= 0) & (chosen < logits.shape[1])
        raw = torch.where(known[:, None], raw, float("nan"))
        shape = (-1, count)
        maps = raw.view(*shape, raw.shape[1]).transpose(0, 1)
        return logits[:count], chosen.view(shape).T, maps, self.layout.grid_of(inputs[0]) if self.least else self.layout.grid


def _by_row(graph: ModelGraph) -> tuple[bool, ...]:
    """Which of (A, *sides) have a row for every image, or several; another may have one for every row of the image."""
    count: Any = graph.trunk.inputs[0].shape[0]

    def of(first: Any) -> bool:
        return isinstance(first, torch.SymInt) and count.node.expr in first.node.expr.free_symbols

    return tuple(bool(fake.ndim) and of(fake.shape[0]) for fake in graph.head.inputs)


def _start(a: Tensor, recipe: Recipe) -> Tensor:
    """The baseline as an output of the layer; tokens that are no positions stay as they are."""
    layout = recipe.layout
    if isinstance(layout, Transformed):
        if not recipe.path.from_zero:
            raise ExportError("A program with a reshape transform that computes has baseline='zero' only.")
        return torch.zeros_like(a)
    view = layout.view(a)
    flat = background(recipe.path.baseline, view).expand_as(view)
    if layout.kind == "NTC":
        last = a.shape[1] - layout.suffix
        return torch.cat((a[:, : layout.prefix], flat.transpose(1, 2), a[:, last:]), 1)
    base: Tensor = flat.reshape(*flat.shape[:2], *layout.grid_of(a))
    return base if layout.channels_dim == 1 else base.movedim(1, -1)


class _Free(TorchDispatchMode):
    """Sees which operator fixes a size that is to be free; whoever called it is told by :meth:`check`, when C++ is left.

    Args:
        mode: of the fake tensors.
        batch: their number of images.
        size: height and width of the images, where these are free.
    """

    def __init__(self, mode: FakeTensorMode, batch: torch.SymInt, size: Sequence[torch.SymInt]) -> None:
        super().__init__()
        assert mode.shape_env is not None
        self._shapes, self._batch, self._size = mode.shape_env, batch, size
        #: Whom the tracer's rules are of.
        self.operators: list[Any] = [None] * len(self._shapes.guards)
        self._running: Any = None
        self._fixed_by: Any = None
        self._fixes_batch = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "prim":  # by which composite operators look around
            self._see(self._running or func)
        return result

    def running(self, operator: Any) -> None:
        """``operator`` of the model is about to run, or, where it is None, those of the derivatives are."""
        if self._running is not None:
            self._see(self._running)
        self._running = operator

    def _see(self, operator: Any) -> None:
        self.operators += [operator] * (len(self._shapes.guards) - len(self.operators))
        if self._fixed_by is None and any(map(self._fixed, (self._batch, *self._size))):
            self._fixed_by, self._fixes_batch = operator, self._fixed(self._batch)

    def _fixed(self, size: torch.SymInt) -> bool:
        return bool(self._shapes.replace(size.node._expr).is_number)

    def check(self, layer: str, error: Exception | None = None) -> None:
        """Raise ExportError where a size is fixed by now; ``error`` is what came of it."""
        if self._fixed_by is None:
            return
        if self._fixes_batch:
            raise ExportError(
                f"The derivatives of the head behind {layer!r} are for one number of images, as {self._fixed_by} fixes it. A "
                "program takes any number: explain a layer behind that operator, or write it with others in the model. The "
                "explainer itself works."
            ) from error
        raise ExportError(
            f"dynamic_size=True is not to be had: the derivatives of the head behind {layer!r} are for one size of the images, "
            f"as {self._fixed_by} fixes it. Explain a layer behind that operator, or leave out dynamic_size=True."
        ) from error


def _derivatives(recipe: Recipe, graph: ModelGraph) -> tuple[fx.GraphModule, dict[tuple[int, int], str]]:
    """(weights, A, sides, classes where they are given) -> (logits, classes, g or the path's integral, HA at order 2).

    Beside it, the sizes of images for which it is doubtful, with the reason.
    """
    head, utility = graph.head, recipe.utility
    count = len(head.weights)
    rule, second = recipe.rule, recipe.method.order == 2
    by_row = _by_row(graph)
    given = recipe.targets != "predicted"
    fakes = list(head.fakes)
    mode = detect_fake_mode(fakes)
    batch = next(fake.shape[0] for fake, many in zip(head.inputs, by_row, strict=True) if many)
    assert mode is not None and isinstance(batch, torch.SymInt)
    size = graph.trunk.inputs[0].shape[2:] if recipe.least else ()
    free = _Free(mode, batch, [side for side in size if isinstance(side, torch.SymInt)])

    def run(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Any, Tensor]:
        leaves = Smooth(head.module, free.running).run(*weights, *inputs)
        free.running(None)
        outputs = tree_unflatten(list(leaves), graph.spec)
        logits = utility.logits_of(outputs)
        if logits is None or logits.ndim != 2:
            raise ExportError(
                f"A program returns logits [N, K], and the model returns "
                f"{type(outputs).__name__ if logits is None else tuple(logits.shape)}. Say where they are with output=."
            )
        return outputs, logits

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        weights, inputs = tensors[:count], tensors[count : count + len(by_row)]
        asked = tensors[-1] if given else None
        a, sides = inputs[0], inputs[1:]
        rows, copies = a, 1
        if rule is not None:
            base = _start(a, recipe)
            rows = torch.cat([a, *(base + t * (a - base) for t in rule[0])])
            copies = len(rule[0]) + 1
        beside = [torch.cat([side] * copies) if many else side for side, many in zip(sides, by_row[1:], strict=True)]

        with torch.enable_grad(), free:
            rows = rows.detach().requires_grad_(True)
            outputs, logits = run(weights, (rows, *beside))
            z = logits[: a.shape[0]].detach()
            chosen = z.argmax(1)
            if asked is not None:
                chosen = torch.where(asked == -1, chosen, asked)
            safe = torch.cat([chosen.clamp(0, z.shape[1] - 1)] * copies)
            u = evaluate(utility, outputs, logits, safe, rows.shape[0])
            (g,) = torch.autograd.grad(u.sum(), rows, create_graph=second and rule is None)
            if rule is not None:
                parts = g.unflatten(0, (copies, -1)).unbind(0)[1:]
                return z, chosen, torch.stack([share * part for share, part in zip(rule[1], parts, strict=True)]).sum(0)
            if not second:
                return z, chosen, g
            direction = a if recipe.path.from_zero else a - _start(a, recipe)
            if not g.requires_grad:
                return z, chosen, g
            (hvp,) = torch.autograd.grad(g, rows, direction.detach(), allow_unused=True)
        return (z, chosen, g.detach()) if hvp is None else (z, chosen, g.detach(), hvp)

    mode.cache_enabled = False  # with a symbolic batch its entries cost more than they save
    with TRACING, torch.no_grad(), mode:
        if given:
            fakes.append(torch.full((head.fakes[count].shape[0],), -1, dtype=torch.int64, device=head.fakes[count].device))
        try:
            made = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
            free.check(recipe.layer)
        except (ShapleyCamError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever an operator's derivative or a user's utility raises on tensors without values
            free.check(recipe.layer, error)
            raise ExportError(
                f"The derivatives of the head behind {recipe.layer!r} cannot be traced{place_of(error)}: {said(error)}"
            ) from error
    any_strides(made.graph).eliminate_dead_code()
    made.recompile()
    doubtful = counterexamples(graph.trunk.inputs[0], recipe.least, operators=free.operators) if recipe.least else {}
    return made, doubtful
