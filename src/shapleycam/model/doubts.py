"""What a study can tell of maps that would come out empty or meaningless, in words for the user."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import LayerError
from ..utilities.named import Utility
from .layers import find_layer
from .layouts import Layout
from .reach import Question, share
from .survey import Survey


def doubts(
    model: nn.Module,
    seen: Survey,
    layers: Sequence[tuple[str, nn.Module]],
    layouts: Sequence[Layout],
    utility: Utility,
    targets: Tensor | None = None,
    chosen: bool = False,
) -> list[str]:
    """What is doubtful about explaining ``utility`` at these layers; empty if nothing is. Costs a forward pass per named layer.

    Args:
        model: the user's model.
        seen: its survey, made with ``gradients=True``.
        layers: (name, module) of the target layers.
        layouts: how their outputs are read.
        utility: the utility, for the surveyed images.
        targets: the classes of the surveyed images, int64 [N]; None for the predicted ones.
        chosen: ``find_layer`` chose the layer and has asked for itself.

    Raises:
        DerivativeError: an operator behind a layer has no derivative.
    """
    notes = list(seen.notes)
    one = seen.logits is not None and seen.logits.ndim == 2 and seen.logits.shape[1] == 1
    if one and utility.named and utility.name != "logit":
        notes.append(
            f"The model returns one logit per image, and utility {utility.name!r} is made of a softmax over classes, which is "
            "1 for a single one. Use utility='logit', or for the probability of a sigmoid your own: "
            "utility=lambda z, c: z[:, 0].sigmoid()."
        )
    assert seen.images is not None
    question = Question(model, seen, utility, targets)
    for (name, _), layout in zip(layers, layouts, strict=True):
        if math.prod(layout.grid) == 1:
            hint = _better(question, name)
            notes.append(f"Layer {name!r} has a single position, so its map is one number and its heatmap is all zeros.{hint}")
        elif not chosen and sum(record.name == name for record in seen.records) == 1:
            answer = question.gradients(name, {name: layout})
            gradient = None if answer is None else answer.gradients.get(name)
            # Without any gradient the derivative engine says so.
            if gradient is not None and share(layout, gradient) == 0.0:
                notes.append(_empty(question, name, layout, gradient))
    return notes


def _empty(question: Question, name: str, layout: Layout, gradient: Tensor) -> str:
    if layout.kind == "NTC" and bool(gradient.any()):
        return (
            f"The target reads none of the positions of layer {name!r}, only its class token or other tokens beside the "
            f"positions: the map is all zeros. Choose a layer before the last attention.{_better(question, name)}"
        )
    if not question.utility.named:
        return (
            f"Utility {question.utility.name!r} does not change with layer {name!r} for the images studied (a class that no "
            "pixel is predicted to have, a box that is not found): the map is all zeros. Choose another target or a mask."
        )
    return (
        f"The gradient of utility {question.utility.name!r} is zero everywhere in layer {name!r} for the images studied (a "
        "saturated softmax, activations that are switched off): the map is all zeros. Use utility='logit' or another layer."
    )


def _better(question: Question, name: str) -> str:
    seen = question.seen
    assert seen.images is not None
    try:
        # A survey of its own notes: doubts about this other layer are not about the user's.
        other = Survey(seen.records, seen.outputs, seen.logits, seen.end, seen.stem, seen.images, inputs=seen.inputs)
        found, _ = find_layer(question.model, other, seen.images.shape, question.utility, "auto", question.targets)
    except LayerError:
        return ""
    return "" if found == name else f" layer='auto' would take {found!r}."
