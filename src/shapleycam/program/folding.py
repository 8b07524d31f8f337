"""Batch normalisations in evaluation mode, folded into the convolutions that feed them; and weights bound to a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding)


def fold_batch_norms(
    graph: fx.Graph, names: dict[fx.Node, str], weights: Mapping[str, Tensor], constants: dict[str, Tensor]
) -> int:
    """Fold what can be folded exactly; returns how many.

    A convolution takes its normalisation in where nothing else reads its output (the target layer's output is read by the
    explanation) and all numbers are weights. The products are made in float64.

    Args:
        graph: functional; it is changed.
        names: its placeholders that are weights; the folded ones are added.
        weights: all weights by name, "model." before those of the model.
        constants: where the folded weights are put.
    """
    known = {**{name.removeprefix("model."): tensor for name, tensor in weights.items()}, **constants}
    first = next(iter(graph.nodes))
    folded = 0
    for norm in graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default):
        conv, scale, shift, mean, variance, _, eps = norm.args
        if conv.target not in _CONVOLUTIONS or len(conv.users) != 1 or any(user.args[1] != 0 for user in norm.users):
            continue
        kernel, bias = conv.args[1], conv.args[2] if len(conv.args) > 2 else None
        numbers = [node for node in (kernel, bias, scale, shift, mean, variance) if node is not None]
        if any(node not in names or names[node] not in known for node in numbers):
            continue

        def value(node: fx.Node | None, otherwise: float) -> Tensor:
            like = known[names[mean]].double()  # noqa: B023
            return torch.full_like(like, otherwise) if node is None else known[names[node]].detach().double()

        factor = value(scale, 1.0) / torch.sqrt(value(variance, 1.0) + eps)
        old = known[names[kernel]].detach()
        made = {
            "kernel": old.double() * factor.view(-1, *[1] * (old.ndim - 1)),
            "bias": (value(bias, 0.0) - value(mean, 0.0)) * factor + value(shift, 0.0),
        }
        placed: dict[str, fx.Node] = {}
        for part, tensor in made.items():
            with graph.inserting_before(first):
                node = graph.placeholder(f"folded_{folded}_{part}")
            constants[node.name] = tensor.to(old.dtype)
            names[node] = node.name
            like = kernel.meta["val"]
            node.meta["val"] = like if part == "kernel" else like.detach().flatten(1)[:, 0]
            placed[part] = node
        conv.args = (conv.args[0], placed["kernel"], placed["bias"], *conv.args[3:])
        for user in list(norm.users):
            user.replace_all_uses_with(conv)
            graph.erase_node(user)
        graph.erase_node(norm)
        folded += 1
    return folded


def bind(module: fx.GraphModule, tensors: Sequence[Tensor]) -> fx.GraphModule:
    """The graph with its first inputs bound to tensors, and all that follows from these alone computed once.

    Both become buffers of the graph that is returned, which takes the other inputs.
    """
    root = nn.Module()
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    known: dict[fx.Node, Any] = {}
    needed: dict[fx.Node, fx.Node] = {}

    def placed(node: fx.Node) -> fx.Node:
        """The node in the new graph; a known tensor that something reads becomes a buffer."""
        if node not in known:
            return copied[node]
        if node not in needed:
            root.register_buffer(node.name, known[node], persistent=False)
            needed[node] = graph.get_attr(node.name)
        return needed[node]

    nodes = list(module.graph.nodes)
    known.update({node: tensor.detach() for node, tensor in zip(nodes, tensors, strict=False)})
    for node in nodes[len(tensors) :]:
        if node.op == "get_attr" and isinstance(tensor := getattr(module, str(node.target), None), Tensor):
            known[node] = tensor.detach()
        elif node.op == "call_function" and node.all_input_nodes and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            copied[node] = graph.node_copy(node, placed)
    for name, child in module.named_children():
        root.add_module(name, child)
    return fx.GraphModule(root, graph)
