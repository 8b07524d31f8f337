"""What is done to an ONNX model behind PyTorch's exporter."""

from __future__ import annotations

import re
from typing import Any

from ...errors import ExportError
from ...optional import need
from ..metadata import Metadata


def tidy(model: Any, metadata: Metadata) -> None:
    """Clean a ModelProto, name its free dimensions, and share its weights, in place."""
    _clean(model)
    _name_dimensions(model, metadata)
    _share_weights(model.graph)
    _store_turned(model.graph)


def _clean(model: Any) -> None:
    """Take out what the exporter notes of every node for debugging: half of a small file, with the paths of the sources."""
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        for kind in ("input", "output", "value_info", "initializer"):
            for value in getattr(graph, kind, ()):
                del value.metadata_props[:]
        del graph.metadata_props[:]


def _name_dimensions(model: Any, metadata: Metadata) -> None:
    """Call the free dimensions what the metadata call them; the exporter has numbered symbols and sums of them.

    Raises:
        ExportError: a dimension that is to be free is a number.
    """
    for value, port in zip((*model.graph.input, *model.graph.output), (*metadata.inputs, *metadata.outputs), strict=True):
        for dimension, size in zip(value.type.tensor_type.shape.dim, port.shape, strict=True):
            if isinstance(size, str) and dimension.HasField("dim_value"):
                raise ExportError(
                    f"The dimension {size!r} of {port.name!r} is to be free, and the model's graph has fixed it to "
                    f"{dimension.dim_value}."
                )
    names = {}
    for value, port in zip(model.graph.input, metadata.inputs, strict=True):
        for dimension, size in zip(value.type.tensor_type.shape.dim, port.shape, strict=True):
            if isinstance(size, str) and dimension.dim_param:
                names[dimension.dim_param] = size
    if not names:
        return
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = symbol.sub(lambda match: names[match[1]], dimension.dim_param)
    for value, port in zip(model.graph.output, metadata.outputs, strict=True):
        for dimension, size in zip(value.type.tensor_type.shape.dim, port.shape, strict=True):
            if isinstance(size, str):
                dimension.dim_param = size


def _share_weights(graph: Any) -> None:
    """Multiply by a matrix itself where PyTorch has repeated it for every row of a batch.

    PyTorch repeats it by a stride of zero, ONNX runtimes by copies: a vision transformer's would take a gigabyte.
    """
    made = {output: node for node in graph.node for output in node.output}
    ranks = {each.name: len(each.dims) for each in graph.initializer}
    ranks |= {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input)
        if value.type.tensor_type.HasField("shape")
    }

    def repeated(name: str) -> tuple[str, bool] | None:
        """The matrix that a tensor repeats, and whether it is turned."""
        node, turned = made.get(name), False
        while node is not None and node.op_type == "Transpose" and list(node.attribute[0].ints) == [0, 2, 1]:
            node, turned = made.get(node.input[0]), not turned
        known = node is not None and node.op_type == "Expand" and ranks.get(node.input[0]) == 2
        return (str(node.input[0]), turned) if node is not None and known else None

    nodes = []
    for node in graph.node:
        found = repeated(node.input[1]) if node.op_type == "MatMul" else None
        if found is not None:
            source, turned = found
            node.input[1] = f"{node.name}_turned" if turned else source
            if turned:
                turn = type(node)(
                    op_type="Transpose", name=f"{node.name}_turned", input=[source], output=[f"{node.name}_turned"]
                )
                turn.attribute.add(name="perm", type=7, ints=[1, 0])  # 7: INTS
                nodes.append(turn)
        nodes.append(node)
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):  # what nothing reads any more
        if any(output in read for output in node.output):
            read.update(node.input)
            kept.append(node)
            # What a graph inside a node reads is no input of the node.
            inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
            for each in inner:
                read.update(name for part in each.node for name in part.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    weights = [each for each in graph.initializer if each.name in read]
    if len(weights) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(weights)


def _store_turned(graph: Any) -> None:
    """Store the transpose of a square matrix beside it, where a graph multiplies by both, as derivatives do.

    OpenVINO 2026.4 takes one for the other where both come from one constant of that shape.
    """
    helper = need("onnx.numpy_helper", "export")
    square = {each.name: each for each in graph.initializer if len(each.dims) == 2 and each.dims[0] == each.dims[1]}
    other: dict[str, str] = {}  # matrix -> its transpose, both ways
    same: dict[str, str] = {}  # output of a transposition that is left out -> what it is
    nodes = []
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = same.get(name, name)
        turns = node.op_type == "Transpose" and list(node.attribute[0].ints) == [1, 0]
        if not turns or node.input[0] not in square:
            nodes.append(node)
            continue
        source = node.input[0]
        if source not in other:
            turned = helper.from_array(helper.to_array(square[source]).T.copy(), node.output[0])
            graph.initializer.append(turned)
            square[turned.name] = turned
            other |= {source: turned.name, turned.name: source}
        if other[source] != node.output[0]:
            same[node.output[0]] = other[source]
    del graph.node[:]
    graph.node.extend(nodes)
    for value in [each for each in graph.value_info if each.name in same or each.name in square]:
        graph.value_info.remove(value)
