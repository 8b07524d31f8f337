"""Finds the target layer and learns the shape of the head behind it, from one small forward pass.

``survey`` runs the model once on one or two images with a hook on every module. It tells which module ran when and what it
returned; that answers which layer to explain (``layer="auto"``), where its channels are, which classifier follows it, and
whether anything behind it writes into its output.
"""

from __future__ import annotations

import difflib
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, LayerError, ModelStateError
from ..utilities.named import Utility, evaluate
from ..utilities.outputs import logits_of
from .double_backward import TwiceDifferentiable
from .layouts import PREFIXES, Layout, ReshapeTransform, resolve_layout

LayerSpec = str | nn.Module
_PASSIVE = (
    nn.Identity,
    nn.Flatten,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AvgPoolNd,
)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(slots=True)
class Record:
    """One module call during the survey: its name, what it returned, and whether it only passed its input on."""

    name: str
    module: nn.Module
    output: Tensor
    input: Tensor | None
    passive: bool


@dataclass(slots=True)
class Survey:
    """What one small forward pass showed.

    Attributes:
        records: every module call that returned one floating tensor (or a tuple with one map), in order of completion.
        outputs: what the model returned.
        logits: the logits in it, if there are any.
        stem: the convolution that reads the images directly, if there is one.
    """

    records: list[Record] = field(default_factory=list)
    outputs: Any = None
    logits: Tensor | None = None
    stem: nn.modules.conv._ConvNd | None = None


def survey(model: nn.Module, images: Tensor, gradients: bool, read: Callable[[Any], Tensor | None] = logits_of) -> Survey:
    """Run ``model`` once with every module watched.

    Args:
        model: the user's model; its hooks are as before when this returns or raises.
        images: a small batch.
        gradients: keep the graph, so that ``find_layer`` can ask which layers every position of which matters.
        read: the logits in the outputs.

    Raises:
        InputError: the images do not have the rank, channels, dtype or device that the first convolution needs.
        ModelStateError: the model does not accept hooks.
    """
    found, owner = Survey(), threading.get_ident()
    watched = images

    def before(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == owner and args and args[0] is watched:
            assert isinstance(module, nn.modules.conv._ConvNd)
            check_stem(module, images)
            found.stem = module

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, tuple):  # blocks of Hugging Face's transformers: (hidden states, attentions or None)
                maps = [part for part in output if isinstance(part, Tensor) and part.is_floating_point() and part.ndim >= 3]
                output = maps[0] if len(maps) == 1 else None
            if threading.get_ident() == owner and isinstance(output, Tensor) and output.is_floating_point():
                source = args[0] if args and isinstance(args[0], Tensor) else None
                alias = source is not None and source.data_ptr() == output.data_ptr() and source.numel() == output.numel()
                leaf = next(module.children(), None) is None
                passive = leaf and (isinstance(module, _PASSIVE) or (alias and not isinstance(module, nn.Sequential)))
                passive = passive or type(module).__name__ in ("SelectAdaptivePool2d", "Permute")
                found.records.append(Record(name, module, output, source, passive))

        return hook

    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(gradients))
        stack.enter_context(TwiceDifferentiable())
        # A clone taken here is no inference tensor, even where the images are.
        watched = images.detach().clone().requires_grad_(gradients)
        try:
            for name, module in model.named_modules():
                if isinstance(module, nn.modules.conv._ConvNd):
                    stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
        except RuntimeError as error:
            raise ModelStateError(
                f"{type(model).__name__} has a part that does not accept hooks ({error}). Pass the original model, "
                "not a scripted one."
            ) from error
        found.outputs = model(watched)
    found.logits = read(found.outputs)
    return found


def check_stem(module: nn.modules.conv._ConvNd, images: Tensor) -> None:
    """Check the images against the convolution that reads them.

    Raises:
        InputError: wrong rank, channels, device or dtype.
    """
    rank, channels = module.weight.ndim, module.in_channels
    if images.ndim != rank:
        hint = " Add a batch dimension: images[None]." if images.ndim == rank - 1 else ""
        raise InputError(f"images must have {rank} dimensions for this model, got shape {tuple(images.shape)}.{hint}")
    if images.shape[1] != channels:
        hint = " The channels come second: images.movedim(-1, 1)." if images.shape[-1] == channels else ""
        raise InputError(f"images must have {channels} channels for this model, got shape {tuple(images.shape)}.{hint}")
    if images.device != module.weight.device:
        raise InputError(
            f"images are on {images.device}, the model is on {module.weight.device}: images.to({str(module.weight.device)!r})."
        )
    if images.dtype != module.weight.dtype and not torch.is_autocast_enabled(images.device.type):
        raise InputError(
            f"images are {images.dtype}, the model is {module.weight.dtype}: images.to({module.weight.dtype}), or use autocast."
        )


def named_layers(model: nn.Module, wanted: LayerSpec | Sequence[LayerSpec]) -> list[tuple[str, nn.Module]]:
    """(name, module) of each layer the caller named, as a module, a dotted name ("layer4.2", "layer4[-1]") or a list.

    Raises:
        LayerError: no such layer (the nearest names are suggested), a module from elsewhere, or one named twice.
    """
    specs: Iterable[Any] = wanted if isinstance(wanted, (list, tuple)) else [wanted]
    modules = dict(model.named_modules())
    found: list[tuple[str, nn.Module]] = []
    for spec in specs:
        if isinstance(spec, nn.Module):
            name = next((name for name, module in modules.items() if module is spec), None)
            if name is None:
                raise LayerError(
                    f"The layer {type(spec).__name__} given is not part of the model {type(model).__name__}. "
                    "Take it from the very model that is explained (a copy or a compiled model has other modules)."
                )
            found.append((name, spec))
        elif isinstance(spec, str):
            found.append(_by_name(modules, spec))
        else:
            raise LayerError(f"layer must be 'auto', a module, a dotted name or a list of them, got {spec!r}.")
    if not found:
        raise LayerError("layer is an empty list: name at least one layer, or use layer='auto'.")
    if len({id(module) for _, module in found}) != len(found):
        raise LayerError(f"A layer is named twice in {[name for name, _ in found]}: name each layer once.")
    return found


def _by_name(modules: dict[str, nn.Module], spec: str) -> tuple[str, nn.Module]:
    if spec in modules:
        return spec, modules[spec]
    dotted = spec.replace("[", ".").replace("]", "")
    parts = dotted.split(".")
    module, name = modules[""], ""
    for part in parts:
        children = dict(module.named_children())
        if (
            part.lstrip("-").isdigit()
            and part not in children
            and -len(children) <= int(part) < len(children)
            and str(int(part)) == part
        ):
            part = list(children)[int(part)]
        if part not in children:
            near = difflib.get_close_matches(dotted, modules, n=4, cutoff=0.5) or [n for n in modules if n][-4:]
            raise LayerError(f"No layer {spec!r} in {type(modules['']).__name__}. Nearest: {', '.join(map(repr, near))}.")
        module, name = children[part], f"{name}.{part}".lstrip(".")
    return name, module


def token_facts(model: nn.Module) -> tuple[int | None, tuple[int, ...] | None]:
    """What a model says of its tokens: how many leading ones are not patches, and the patch size."""
    prefix = getattr(model, "num_prefix_tokens", None)
    if not isinstance(prefix, int):
        # torchvision's VisionTransformer keeps its class token as a parameter.
        prefix = 1 if isinstance(getattr(model, "class_token", None), Tensor) else None
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and module.stride == module.kernel_size and module.stride[0] > 1:
            return prefix, tuple(module.stride)
    return prefix, None


def find_layer(
    model: nn.Module, seen: Survey, image_shape: Sequence[int], utility: Utility, wanted: str | Layout | ReshapeTransform
) -> tuple[str, nn.Module]:
    """The target layer of ``layer="auto"``: the last layer with positions all of which still matter to the utility.

    For a convolutional network that is the input of the final pooling; for a transformer with a class token it is the
    input of the last attention, because behind it the class token no longer looks at the patches.

    Raises:
        LayerError: nothing fits; the message lists the candidates with their shapes.
    """
    prefix, patch = token_facts(model)
    runs = Counter(id(record.module) for record in seen.records)
    # An activation that several places share has no map of its own; windows folded into the batch are parts of maps.
    records = [
        r
        for r in seen.records
        if runs[id(r.module)] == 1 and r.output.ndim >= 3 and r.output.shape[0] == image_shape[0]
        if not r.passive and r.module is not model and r.output is not seen.logits
    ]

    def spatial(strict: bool) -> list[tuple[Record, Layout]]:
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
                    strict=strict,
                )
            except LayerError:
                continue
            if math.prod(layout.grid) > 1:
                found.append((r, layout))
        return found

    candidates = spatial(strict=True)
    if not any(layout.kind == "NTC" for _, layout in candidates):
        # Beside tokens, four dimensions without the images' aspect ratio are attention heads, and not uneven strides.
        candidates = spatial(strict=False)
    readable, candidates = candidates, _feature_maps(candidates)
    shares = _positions_that_matter(seen, utility, candidates)
    for i in reversed(range(len(candidates))):
        if shares[i] >= 0.5:
            chosen = candidates[i][0]
            _check_tokens_behind(seen, utility, chosen, records, readable, prefix)
            same = [r for r, _ in candidates if r.output is chosen.output or r.output.data_ptr() == chosen.output.data_ptr()]
            # Containers return the tensor of their last child: name the outermost.
            outermost = min((r for r in same if r.output.shape == chosen.output.shape), key=lambda r: r.name.count("."))
            return outermost.name, outermost.module
    listing = "\n".join(f"  {r.name}: {tuple(r.output.shape)}" for r, _ in candidates[-12:]) or "  (none)"
    dead = " No gradient reaches any: does the model detach them, or is its classifier all zeros, as before training?"
    dead = "" if any(shares) else dead
    raise LayerError(
        f"layer='auto' found no layer of {type(model).__name__} whose positions all lead to the target.{dead} Name one with "
        f"layer=. Candidates with positions, last first to run at the bottom:\n{listing}"
    )


def _feature_maps(candidates: list[tuple[Record, Layout]]) -> list[tuple[Record, Layout]]:
    """The candidates without the projections inside transformer blocks: queries, keys and values, the layers of the MLP."""
    maps = [
        (r, layout) for r, layout in candidates if layout.kind != "NTC" or not isinstance(r.module, nn.Linear)
    ] or candidates
    if not maps or maps[-1][1].kind != "NTC":
        return maps
    width = maps[-1][0].output.shape[-1]
    return [(r, layout) for r, layout in maps if layout.kind != "NTC" or r.output.shape[-1] == width]


def _check_tokens_behind(
    seen: Survey,
    utility: Utility,
    chosen: Record,
    records: Sequence[Record],
    readable: Sequence[tuple[Record, Layout]],
    prefix: int | None,
) -> None:
    """Raise LayerError if a layer behind the chosen one has as many tokens as a grid seen elsewhere in the model.

    That grid is a guess (of a video transformer, say, which convolves inside its blocks), so it is the caller's to confirm.
    """
    grids = {layout.grid for _, layout in readable}
    read = {id(record) for record, _ in readable}
    order = [id(record) for record in records]
    unread: list[tuple[Record, Layout]] = []
    for record in records[order.index(id(chosen)) + 1 :]:
        if record.output.ndim == 3 and id(record) not in read and not isinstance(record.module, nn.Linear):
            for grid in grids:
                left = record.output.shape[1] - math.prod(grid)
                if left in ((prefix,) if prefix is not None else PREFIXES):
                    unread.append((record, Layout("NTC", grid, left)))
    shares = _positions_that_matter(seen, utility, unread)
    for (record, layout), share in reversed(list(zip(unread, shares, strict=True))):
        if share >= 0.5:
            raise LayerError(
                f"layer='auto' cannot read the tokens of layer {record.name!r}, shape {tuple(record.output.shape)}. If they "
                f"are a grid of {layout.grid} behind {layout.prefix} others, say so: layer={record.name!r}, layout={layout!r}."
            )


def _positions_that_matter(seen: Survey, utility: Utility, candidates: Sequence[tuple[Record, Layout]]) -> list[float]:
    """For each candidate the share of its positions that the utility's gradient reaches."""
    if not candidates:
        return []
    batch = candidates[-1][0].output.shape[0]
    targets = seen.logits.detach().argmax(1) if seen.logits is not None and seen.logits.ndim == 2 else None
    with torch.enable_grad():
        value = evaluate(utility, seen.outputs, seen.logits, targets, batch)
        if not value.requires_grad or not any(r.output.requires_grad for r, _ in candidates):
            return [0.0] * len(candidates)
        # A constant map, a position embedding say, has no gradient to ask for.
        live = [i for i, (r, _) in enumerate(candidates) if r.output.requires_grad]
        outputs = [candidates[i][0].output for i in live]
        gradients = torch.autograd.grad(value.sum(), outputs, allow_unused=True, retain_graph=True)  # for another question
    shares = [0.0] * len(candidates)
    for i, gradient in zip(live, gradients, strict=True):
        if gradient is not None:
            shares[i] = (candidates[i][1].view(gradient) != 0).any(1).float().mean().item()
    return shares


def final_linear(seen: Survey, layers: Sequence[tuple[str, nn.Module]]) -> tuple[nn.Linear | None, str]:
    """The linear layer whose output is the logits and which runs once, behind the target layer; or None and the reason."""
    if seen.logits is None or seen.logits.ndim != 2:
        return None, "the model does not return logits [N, K]"
    done = [i for i, r in enumerate(seen.records) if any(r.module is module for _, module in layers)]
    for i, record in enumerate(seen.records):
        if isinstance(record.module, nn.Linear) and same_tensor(record.output, seen.logits):
            if not done or i < max(done):
                return None, f"the classifier {record.name!r} does not run behind the target layer"
            if sum(r.module is record.module for r in seen.records) > 1:
                return None, f"the classifier {record.name!r} runs more than once"
            if record.input is None or record.input.ndim != 2:
                return None, f"the classifier {record.name!r} does not read one vector per image"
            return record.module, record.name
    return None, "the logits are not the output of a linear layer"


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory in the same shape."""
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)


def affine_error(linear: nn.Linear, view: Tensor, logits: Tensor) -> float:
    """Relative error of ``W·mean_s(A) + b`` as a prediction of the logits, in float64."""
    mean = view.detach().double().mean(2)
    if mean.shape[1] != linear.in_features:
        return float("inf")
    predicted = mean @ linear.weight.detach().double().T
    actual = logits.detach().double()
    if linear.bias is not None:
        actual = actual - linear.bias.detach().double()
    if actual.shape != predicted.shape:
        return float("inf")
    return float((actual - predicted).norm() / predicted.norm().clamp_min(1e-300))


def affine_tolerance(dtype: torch.dtype) -> float:
    """The relative error up to which a head counts as pool-and-linear; float32 leaves room for TF32 products."""
    return _TOLERANCE.get(dtype, 1e-3)
