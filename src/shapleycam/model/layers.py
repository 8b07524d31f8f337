"""Finds the target layer of ``layer="auto"`` and learns the shape of the head behind it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import LayerError
from ..utilities.named import Utility
from .layouts import PREFIXES, Layout, ReshapeTransform, resolve_layout, shown
from .named import LayerSpec, named_layers, token_facts, token_suffix
from .reach import Answer, Question, share
from .survey import Record, Survey, check_stem, survey

__all__ = [
    "LayerSpec",
    "Record",
    "Survey",
    "check_stem",
    "find_layer",
    "named_layers",
    "survey",
    "token_facts",
    "token_suffix",
]

#: How many of the last candidates the first question about gradients is about; each next one is about four times as many.
_WINDOW = 4
#: How many other layers may be tried in the place of one that is only a part of what the head reads; two forward passes each.
_TRIES = 4

Candidate = tuple[Record, Layout]


def find_layer(
    model: nn.Module,
    seen: Survey,
    image_shape: Sequence[int],
    utility: Utility,
    wanted: str | Layout | ReshapeTransform,
    targets: Tensor | None = None,
) -> tuple[str, nn.Module]:
    """The target layer of ``layer="auto"``: the last layer with positions all of which still matter to the utility.

    For a convolutional network that is the input of the final pooling; for a transformer with a class token it is the
    input of the last attention, because behind it the class token no longer looks at the patches. A layer beside which
    something else leads from the images to the utility is taken only where no other is found, and ``seen.notes`` says so.

    Args:
        model: the user's model.
        seen: its survey, made with ``gradients=True``.
        image_shape: the shape of the surveyed images.
        utility: the utility, for the surveyed images.
        wanted: the layout the user asked for.
        targets: the classes of the surveyed images, int64 [N]; None for the predicted ones.

    Raises:
        LayerError: nothing fits; the message lists the candidates with their shapes.
        DerivativeError: an operator of the model has no derivative.
    """
    question = Question(model, seen, utility, targets)
    prefix, _ = token_facts(model)
    records = [r for r in _maps(model, seen) if r.output.shape[0] == image_shape[0]]
    candidates = readable = _with_layout(model, records, image_shape, wanted, strict=True, stem=seen.stem is not None)
    if not any(layout.kind == "NTC" for _, layout in candidates):
        # Beside tokens, four dimensions without the images' aspect ratio are attention heads, and not uneven strides.
        candidates = readable = _with_layout(model, records, image_shape, wanted, strict=False, stem=seen.stem is not None)
    candidates = _before_the_logits(_feature_maps(candidates), seen)
    tokens = _tokens_of_unknown_grid(records, readable, prefix)
    size, found, answer = _WINDOW, None, None
    window = candidates
    while candidates:
        start = max(0, len(candidates) - size)
        window = candidates[start:]
        first = records.index(window[0][0])
        asked = {r.name: layout for r, layout in (*tokens, *window) if records.index(r) >= first}
        # From the images on only if nothing less says it: that graph is many times what the forward pass holds.
        answer = question.gradients(window[0][0].name if start else None, asked)
        found = _last_that_matters(question, window, answer)
        if start == 0 or (found is not None and (found[2] or size > _WINDOW)):
            break
        size *= 4
    gradients = {} if answer is None else answer.gradients
    if found is None:
        listing = "\n".join(f"  {r.name}: {shown(r.output.shape)}" for r, _ in candidates[-12:]) or "  (none)"
        raise LayerError(
            f"layer='auto' found no layer of {type(model).__name__} whose positions all lead to the target."
            f"{_why_no_gradient(question, candidates, gradients)} Name one with layer=. Candidates with positions, last first "
            f"to run at the bottom:\n{listing}"
        )
    _check_tokens_behind(found[0], records, tokens, gradients)
    chosen = _whole(question, found, window, records, gradients)
    same = [r for r, _ in candidates if r.place == chosen.place]
    # Containers return the tensor of their last child: name the outermost.
    outermost = min(same, key=lambda r: r.name.count("."))
    return outermost.name, outermost.module


def _maps(model: nn.Module, seen: Survey) -> list[Record]:
    """The records that may be maps, of modules that ran once: what several places share has no map of its own."""
    runs = Counter(id(record.module) for record in seen.records)
    return [
        r
        for r in seen.records
        if runs[id(r.module)] == 1 and r.output.ndim >= 3 and not r.passive and r.module is not model and r.place != seen.end
    ]


def _with_layout(
    model: nn.Module,
    records: Sequence[Record],
    image_shape: Sequence[int],
    wanted: str | Layout | ReshapeTransform,
    strict: bool,
    stem: bool,
) -> list[Candidate]:
    prefix, patch = token_facts(model)
    found = []
    for r in records:
        try:
            layout = resolve_layout(
                r.output.shape,
                image_shape,
                name=r.name,
                wanted=wanted,
                module=r.module,
                prefix=prefix,
                patch=patch,
                suffix=token_suffix(model),
                channels_second=stem,
                strict=strict,
            )
        except LayerError:
            continue
        if math.prod(layout.grid) > 1:
            found.append((r, layout))
    return found


def _feature_maps(candidates: list[Candidate]) -> list[Candidate]:
    """The candidates without the projections inside transformer blocks: queries, keys and values, the layers of the MLP."""
    maps = [
        (r, layout) for r, layout in candidates if layout.kind != "NTC" or not isinstance(r.module, nn.Linear)
    ] or candidates
    if not maps or maps[-1][1].kind != "NTC":
        return maps
    width = maps[-1][0].output.shape[-1]
    return [(r, layout) for r, layout in maps if layout.kind != "NTC" or r.output.shape[-1] == width]


def _before_the_logits(candidates: list[Candidate], seen: Survey) -> list[Candidate]:
    """The candidates without those that hold a map per class, as the last layers of a segmentation model do."""
    if seen.logits is None or seen.logits.ndim < 4:
        return candidates
    classes = seen.logits.shape[1]
    return [(r, layout) for r, layout in candidates if r.output.shape[layout.channels_dim] != classes] or candidates


def _last_that_matters(
    question: Question, candidates: Sequence[Candidate], answer: Answer | None
) -> tuple[Record, Layout, bool] | None:
    """The last candidate most positions of which matter, and whether the utility depends on the images through it alone."""
    for r, layout in reversed(candidates if answer is not None else ()):
        assert answer is not None
        if share(layout, answer.gradients.get(r.name)) >= 0.5:
            depends, alone = (True, True) if r.name in answer.pooled else question.alone(r.name)
            if depends:  # and is no constant, as a position embedding is
                return r, layout, alone
    return None


def _whole(
    question: Question,
    found: tuple[Record, Layout, bool],
    window: Sequence[Candidate],
    records: Sequence[Record],
    gradients: dict[str, Tensor],
) -> Record:
    """The layer found, or in the place of one that is only a part of what the head reads the last before it that is all."""
    chosen, layout, alone = found
    if alone:
        return chosen
    end = next(i for i, (r, _) in enumerate(window) if r is chosen)
    earlier = [(r, other) for r, other in window[:end] if other.grid == layout.grid]
    tried: set[object] = {chosen.place}
    for r, other in reversed(earlier):
        if r.place in tried or r.name.startswith(f"{chosen.name}.") or share(other, gradients.get(r.name)) < 0.5:
            continue
        if len(tried) > _TRIES:
            break
        tried.add(r.place)
        # In a transformer's last block the class token alone goes past the norm before the attention.
        tokens = layout.kind == "NTC" and other == layout and r.output.shape == chosen.output.shape
        if tokens and question.alone(chosen.name, (r.name, other))[1]:
            return chosen
        if question.alone(r.name)[1]:
            return r
    question.seen.notes.append(
        f"layer='auto' chose {chosen.name!r}, but that is only a part of what the target depends on: another branch or a skip "
        "connection leads past it, and no layer was found that is all of it. The map shows this part. Name a layer with "
        "layer=, the block in which the branches join, or several of them: layer=[...]."
    )
    return chosen


def _tokens_of_unknown_grid(records: Sequence[Record], readable: Sequence[Candidate], prefix: int | None) -> list[Candidate]:
    """The records with as many tokens as a grid seen elsewhere in the model, which nothing says is theirs."""
    grids = {layout.grid for _, layout in readable}
    read = {id(record) for record, _ in readable}
    found: list[Candidate] = []
    for record in records:
        if record.output.ndim == 3 and id(record) not in read and not isinstance(record.module, nn.Linear):
            for grid in grids:
                left = record.output.shape[1] - math.prod(grid)
                if left in ((prefix,) if prefix is not None else PREFIXES):
                    found.append((record, Layout("NTC", grid, left)))
    return found


def _check_tokens_behind(
    chosen: Record, records: Sequence[Record], tokens: Sequence[Candidate], gradients: dict[str, Tensor]
) -> None:
    """Raise LayerError if a layer behind the chosen one has as many tokens as a grid seen elsewhere in the model.

    That grid is a guess (of a video transformer, say, which convolves inside its blocks), so it is the caller's to confirm.
    """
    after = records.index(chosen)
    for record, layout in reversed(tokens):
        if records.index(record) > after and share(layout, gradients.get(record.name)) >= 0.5:
            raise LayerError(
                f"layer='auto' cannot read the tokens of layer {record.name!r}, shape {shown(record.output.shape)}. If they "
                f"are a grid of {layout.grid} behind {layout.prefix} others, say so: layer={record.name!r}, layout={layout!r}."
            )


def _why_no_gradient(question: Question, candidates: Sequence[Candidate], gradients: dict[str, Tensor]) -> str:
    """Why no candidate matters, where something can be said."""
    model, logits = question.model, question.seen.logits
    if not candidates:
        hidden = any(isinstance(part, torch.jit.ScriptModule) for part in model.modules())
        return " Its modules are scripted or traced and cannot be watched: pass the original model." if hidden else ""
    if not gradients:
        if any(".quantized" in type(part).__module__ for part in model.modules()):
            return " It is quantised, and quantised layers have no gradients: explain the model it was made from."
        return (
            " No gradient reaches any: between them and the target the model detaches its values, leaves torch (NumPy, another "
            "runtime), switches gradients off (torch.no_grad) or rounds. Explain a model without that, or use a method without "
            "derivatives and name the layer."
        )
    if any(bool(gradient.any()) for gradient in gradients.values()):
        return ""
    if logits is not None and logits.ndim == 2 and logits.shape[1] == 1 and question.utility.name in ONE_LOGIT:
        return f" Utility {question.utility.name!r} is a constant for its single logit: use utility='logit'."
    last = next((r.module for r in reversed(question.seen.records) if isinstance(r.module, nn.Linear)), None)
    if last is not None and not bool(last.weight.any()):
        return " No gradient reaches any: it has its classifier all zeros, as before training."
    if not question.utility.named:
        return (
            f" No gradient reaches any: for these images utility {question.utility.name!r} does not change with the outputs (a "
            "class that no pixel is predicted to have, a box that is not found), or the model detaches them."
        )
    return " Every gradient that reaches one is zero: are all activations behind them switched off, or the softmax saturated?"


#: Utilities that are constants of one logit, whose softmax is 1.
ONE_LOGIT = ("probability", "log_probability")
