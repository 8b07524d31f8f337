"""A model as one flat graph of PyTorch operators, cut at the target layer's output.

The graph comes from ``torch.export`` with a free batch, and without operators that write, so that a cut through it is exact:
the head is what depends on the layer's output, the trunk is all the rest that is needed. What the head reads of the trunk
besides that output (a skip connection around the layer) are the cut's sides.
"""

from __future__ import annotations

import copy
import re
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import TreeSpec, tree_flatten

from ..errors import ExportError, LayerError
from ..model.capture import replace_tensor, tensor_of
from ..model.inputs import Inputs
from .folding import fold_batch_norms

#: Torch's tracers are one for the whole process; two threads cannot trace at once.
TRACING = threading.Lock()
_EXAMPLE = 13
#: What the free dimensions of images are called.
SIZE = ("height", "width")

Copied = TypeVar("Copied")
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Part:
    """Some nodes of a graph as a function.

    Attributes:
        module: takes the tensors called ``weights``, then the part's own inputs; returns a tuple.
        weights: dotted names of the model's parameters and buffers, and keys of the graph's constants.
        fakes: fake tensors like all of its inputs, in that order, with the batch symbolic.
    """

    module: fx.GraphModule
    weights: tuple[str, ...]
    fakes: tuple[Tensor, ...]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The fakes of its own inputs."""
        return self.fakes[len(self.weights) :]


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """A model between its images, one layer's output, and its outputs.

    Attributes:
        trunk: images -> (A, *sides).
        head: (A, *sides) -> the tensors in the model's outputs, flat.
        whole: images -> (A, *the same).
        constants: tensors that the model holds outside of its parameters and buffers.
        spec: how the outputs are put together from their flat parts.
    """

    trunk: Part
    head: Part
    whole: Part
    constants: dict[str, Tensor]
    spec: TreeSpec


class _Tapped(nn.Module):
    """The model, which also returns the target layer's output; the head goes on with a copy of that."""

    def __init__(self, model: nn.Module, layer: str, images_as: str | None, tell: Callable[[TreeSpec], None]) -> None:
        super().__init__()
        self.model, self._layer, self._images_as = model, layer, images_as
        self._tell = tell  # torch.export takes back what a forward pass sets on its module

    def forward(self, images: Tensor) -> list[Any]:
        found: list[Tensor] = []

        def take(module: nn.Module, args: Any, output: Any) -> Any:
            tensor = tensor_of(output, self._layer)
            found.append(tensor.clone())
            return replace_tensor(output, tensor, found[-1].clone())

        handle = self.model.get_submodule(self._layer).register_forward_hook(take)
        try:
            outputs = Inputs(images, images_as=self._images_as).run(self.model)
        finally:
            handle.remove()
        if len(found) != 1:
            raise LayerError(f"Layer {self._layer!r} runs {len(found)} times in the graph of the model; it must run once.")
        leaves, spec = tree_flatten(outputs)
        if not all(isinstance(leaf, (Tensor, int, float, type(None))) for leaf in leaves):
            raise ExportError(f"The model returns {type(outputs).__name__} with parts that are no tensors.")
        self._tell(spec)
        return [found[0], *leaves]


def trace(
    model: nn.Module,
    layer: str,
    images: Tensor,
    images_as: str | None = None,
    *,
    fold: bool = False,
    least: tuple[int, ...] = (),
) -> ModelGraph:
    """The graph of a model in evaluation mode, for any number of images; the model is left as it is.

    With ``fold`` a batch normalisation goes into the convolution that alone feeds it: exact, and weights that are changed later
    are not followed. With ``least`` images of any height and width from there on; those given are best oblong, or what holds
    for squares is taken for granted.

    Raises:
        ExportError: the model has no such graph: control flow that depends on the images' values, say, or a number of images
            that it fixes. The message names the place.
    """
    specs: list[TreeSpec] = []
    tapped = _Tapped(shadow(model, type(model).__name__), layer, images_as, specs.append)
    # A number that no other size is likely to have: where the batch equals one, torch may take them for the same.
    example = images[:1].detach().expand(_EXAMPLE, *images.shape[1:]).contiguous()
    free = {0: torch.export.Dim("batch", min=1)}
    free |= {dim: torch.export.Dim(SIZE[dim - 2], min=low) for dim, low in enumerate(least, 2)}
    try:
        with TRACING, torch.no_grad():
            program = torch.export.export(
                tapped,
                (example,),
                dynamic_shapes=(free,),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=bool(least),
            ).run_decompositions({})
    except (ExportError, LayerError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch.export raises whatever the model does on tensors without values
        if least and (rule := rule_of(error)):
            raise one_size(rule) from error
        raise ExportError(
            f"{type(model).__name__} cannot be traced to a graph{place_of(error)}: {said(error)} A program needs a forward "
            "pass without decisions on the values of tensors, for any number of images (x.shape[0], not len(x))."
        ) from error
    with TRACING:  # what is done to the sizes of fake tensors lands with any tracer of the process
        return _cut(program, specs[-1], fold)


def tensors_of(model: nn.Module, constants: Mapping[str, Tensor | None], names: Sequence[str]) -> list[Tensor]:
    """A model's weights by their dotted names, and a graph's constants by their keys."""
    found = []
    for name in names:
        tensor = constants.get(name)
        if tensor is None:
            path, _, last = name.rpartition(".")
            tensor = getattr(model.get_submodule(path), last)
        found.append(tensor)
    return found


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Without autocast, whose casts would stay in what is traced."""
    with torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False):
        yield


def shadow(model: ModuleT, name: str) -> ModuleT:
    """A copy of the model's modules over the same tensors: tracing swaps them, which no other thread is to see.

    Args:
        model: any module.
        name: as for :func:`copied`.

    Raises:
        ExportError: as there.
    """
    return copied(model, name, "tracing", {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def copied(held: Copied, name: str, what: str, memo: Mapping[int, Any] | None = None) -> Copied:
    """A deep copy.

    Args:
        held: a model, or what holds one.
        name: of the model, for the message.
        what: is done with the copy, for the message.
        memo: of :func:`copy.deepcopy`.

    Raises:
        ExportError: it cannot be copied.
    """
    for left in reversed(range(5)):
        try:
            return copy.deepcopy(held, dict(memo or {}))
        except Exception as error:  # whatever the user's modules hold may raise
            if left and isinstance(error, RuntimeError) and "during iteration" in str(error):
                continue  # a thread that explains has set or taken its hook
            raise ExportError(
                f"{name} cannot be copied ({said(error)[:-1]}), and {what} works on a copy. Give what is in the way a "
                "__deepcopy__, or take it out of the model."
            ) from error
    raise AssertionError("unreachable")


def said(error: BaseException) -> str:
    """The first telling line of torch's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(".") + "."


def rule_of(error: BaseException) -> str:
    """What torch.export has found to hold for some sizes only, in its words; empty where the error is another."""
    lines = str(error)
    if single := re.search(r"Specializations unexpectedly required \((.+?)\)", lines):
        return f"one {single[1]}, as in the example"
    if lines.startswith("Cannot create Dim"):  # what torch stumbles over when it would propose multiples
        return f"multiples of some number ({said(error)[:-1]})"
    if "Constraints violated" not in lines:
        return ""
    found = re.search(r"generated guard (.+?)\.?$", lines, re.MULTILINE) or re.search(r"- (.+?)\.?$", lines, re.MULTILINE)
    rule = "" if found is None else found[1]
    for dimension, size in enumerate(SIZE, 2):
        rule = re.sub(rf"L\[[^()]*?\]\.size\(\)\[{dimension}\]", size, rule)
    return rule or said(error)


def one_size(rule: str) -> ExportError:
    """The error of a graph that holds for some sizes of the images only; ``rule`` says which, or what makes it so."""
    return ExportError(
        f"dynamic_size=True is not to be had: the graph of the model is for such sizes only: {rule}. Code that decides by the "
        "size (windows padded to a multiple, another road for large images) fixes it, or images so small that something has "
        "one row or column: leave out dynamic_size=True, or give larger images."
    )


def operator_of(error: BaseException) -> str:
    """Which operator of a graph an error came from, in words: " (in torch.ops.aten.view.default)"; or nothing."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        named = re.search(r"torch\.ops\.[\w.]+", frame.line or "") if frame.filename.startswith("<eval_with_key>") else None
        if named is not None:
            return f" (in {named[0]})"
    return ""


def place_of(error: BaseException) -> str:
    """Where the user's own code was, in words: the innermost line that is neither torch's nor this package's."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
    seen: BaseException | None = error
    while seen is not None:
        frames = [(f.filename, f.lineno, f.name, f.line or "") for f in traceback.extract_tb(seen.__traceback__)]
        # An operator of a graph remembers in torch's message where the model called it.
        told = re.findall(r'File "(.+?)", line (\d+), in (.+)\n +(.+)', str(seen))
        for filename, line, function, code in (*reversed(frames), *reversed(told)):
            if not filename.startswith(own):
                return f" (at {filename}:{line}, in {function}: {code.strip()})"
        seen = seen.__cause__ or seen.__context__
    return ""


# --------------------------------------------------------------------------------------------------------------- the cut


def _cut(program: torch.export.ExportedProgram, spec: TreeSpec, fold: bool) -> ModelGraph:
    graph, signature = program.graph, program.graph_signature
    kinds = {s.arg.name: s for s in signature.input_specs}
    constants: dict[str, Tensor] = {}
    names: dict[fx.Node, str] = {}
    images: fx.Node | None = None
    for node in graph.find_nodes(op="placeholder"):
        kind, target = kinds[node.name].kind, kinds[node.name].target
        if kind == InputKind.USER_INPUT:
            images = node
        elif kind in (InputKind.PARAMETER, InputKind.BUFFER) and target is not None:
            names[node] = target.removeprefix("model.")
        elif kind == InputKind.CONSTANT_TENSOR and target is not None:
            constants[f"constant_{len(constants)}"] = program.constants[target]
            names[node] = f"constant_{len(constants) - 1}"
        else:
            raise ExportError(f"The model's graph takes {node.name!r} ({kind.name}), which a program cannot hold.")
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    specs = signature.output_specs
    given = [r for r, s in zip(results, specs, strict=True) if s.kind == OutputKind.USER_OUTPUT]
    if len(given) < len(results):
        raise ExportError("The model writes into its parameters, buffers or images in every call, which a program does not do.")
    if fold:
        fold_batch_norms(graph, names, {**program.state_dict, **program.constants}, constants)
    tapped, *outputs = given
    assert images is not None and isinstance(tapped, fx.Node)
    copies = [user for user in tapped.users if user.target == torch.ops.aten.clone.default]
    behind: set[fx.Node] = set(copies)
    for node in graph.nodes:
        if node is not output and any(argument in behind for argument in node.all_input_nodes):
            behind.add(node)
    read = {n for node in (*behind, output) for n in node.all_input_nodes if n not in behind} - {tapped, *names}
    # What is made of sizes alone (the first state of a recurrent network) the head makes itself, for as many rows as it has.
    sides = [n for n in graph.nodes if n in read and isinstance(n.meta["val"], Tensor) and not _of_sizes(n)]
    batch = images.meta["val"].shape[0]
    if not any(str(n.meta["val"].shape[0]) == str(batch) for n in (tapped, *sides) if n.meta["val"].ndim):
        sides.append(images)  # whose number the head may want to know
    copies.append(tapped)
    if images not in sides and images in _wanted([tapped, *sides], [n for n in outputs if isinstance(n, fx.Node)]):
        # The head wants to know their size: one image has it, and is not repeated with the rows.
        with graph.inserting_after(images):
            one = graph.call_function(torch.ops.aten.select.int, (images, 0, 0))
        one.meta["val"] = images.meta["val"].select(0, 0)
        sides.append(one)
    graph_of = partial(_part, graph, names, copies, program.graph_module)
    whole, trunk = graph_of([images], given), graph_of([images], [tapped, *sides])
    head = graph_of([tapped, *sides], outputs)
    return ModelGraph(trunk, head, whole, constants, spec)


def _of_sizes(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    return node.target == torch.ops.aten.sym_size.int or all(map(_of_sizes, node.all_input_nodes))


def _sized(inputs: Sequence[fx.Node]) -> dict[str, tuple[fx.Node, int]]:
    """The free sizes of the inputs, as torch writes them, and where they are read."""
    return {
        str(size): (node, dim)
        for node in reversed(inputs)
        for dim, size in reversed(list(enumerate(node.meta["val"].shape)))
        if isinstance(size, torch.SymInt)
    }


def _size_of(node: fx.Node, sized: Mapping[str, tuple[fx.Node, int]]) -> tuple[fx.Node, int] | None:
    """Which input's which dimension the node is, if it is one."""
    value = node.meta.get("val")
    return sized.get(str(value)) if isinstance(value, torch.SymInt) else None


def _wanted(inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> set[fx.Node]:
    """What the results are made of, from the inputs and their sizes on."""
    sized, wanted, waiting = _sized(inputs), set[fx.Node](), list(results)
    while waiting:
        node = waiting.pop()
        if node not in wanted:
            wanted.add(node)
            waiting.extend(() if node in inputs or _size_of(node, sized) is not None else node.all_input_nodes)
    return wanted


def _part(
    graph: fx.Graph,
    names: dict[fx.Node, str],
    copies: Sequence[fx.Node],
    root: nn.Module,
    inputs: Sequence[fx.Node],
    results: Sequence[Any],
) -> Part:
    """The nodes between inputs and results as a function; ``copies`` are left out, as nothing in the graph writes."""
    sized = _sized(inputs)
    wanted = _wanted(inputs, [result for result in results if isinstance(result, fx.Node)])
    made = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    weights = [node for node in graph.nodes if node in wanted and node in names]
    for node in (*weights, *inputs):
        copied[node] = made.placeholder(node.name)
    for node in graph.nodes:
        if node not in wanted or node in copied:
            continue
        if node in copies:
            copied[node] = copied[node.all_input_nodes[0]]
        elif (known := _size_of(node, sized)) is not None:
            copied[node] = made.call_function(torch.ops.aten.sym_size.int, (copied[known[0]], known[1]))
        else:
            copied[node] = made.node_copy(node, copied.__getitem__)
    made.output(tuple(copied[result] if isinstance(result, fx.Node) else result for result in results))
    fakes = tuple(node.meta["val"].detach() for node in (*weights, *inputs))
    return Part(fx.GraphModule(root, any_strides(made)), tuple(names[node] for node in weights), fakes)


def any_strides(graph: fx.Graph) -> fx.Graph:
    """Make a graph independent of how its example lay in memory: images may be channels-last, rows may be repeated."""
    for operator in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        for node in graph.find_nodes(op="call_function", target=operator):
            node.target = torch.ops.aten.reshape.default
    return graph
