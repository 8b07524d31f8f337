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
    """The graph with its first inputs bound to tensors, which become its buffers; they are no inputs any more."""
    root = nn.Module()
    graph = fx.Graph()
    copied: dict[fx.Node, Any] = {}
    nodes = list(module.graph.nodes)
    for node, tensor in zip(nodes, tensors, strict=False):
        root.register_buffer(node.name, tensor.detach(), persistent=False)
    for index, node in enumerate(nodes):
        copied[node] = graph.get_attr(node.name) if index < len(tensors) else graph.node_copy(node, copied.__getitem__)
    for name, tensor in (*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)):
        root.register_buffer(name, tensor.detach(), persistent=False)
    for name, attribute in vars(module).items():
        if isinstance(attribute, Tensor):
            setattr(root, name, attribute)
    return fx.GraphModule(root, graph)
