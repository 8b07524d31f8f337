"""One forward pass with every module watched: which module ran when, and the shape of what it returned."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import InputError, ModelStateError
from ..utilities.outputs import logits_of
from .inputs import Inputs
from .layouts import shown

_PASSIVE = (
    nn.Identity,
    nn.Flatten,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AvgPoolNd,
)

#: Which memory a tensor had while it was alive: the storage's number, offset, shape.
Place = tuple[int, int, tuple[int, ...]]


class _Form(NamedTuple):
    """A map while the pass goes on: what torch allocates between the activations and keeps would hold their memory apart."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor | None) -> Any:
        """Vectors stay as they are."""
        if tensor is None or tensor.ndim < 3:
            return tensor
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def tensor(self) -> Tensor:
        """On the meta device."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@dataclass(slots=True)
class Record:
    """One module call during the survey.

    Attributes:
        name, module: who ran.
        output: what it returned. Vectors are kept; of maps only the shape is (a tensor on the meta device), because all maps
            of a forward pass together are many times what the pass itself holds.
        input: its first tensor, kept likewise.
        passive: it only passed its input on.
        place, source: where the output and the input were: equal ones were the same values in the same shape.
    """

    name: str
    module: nn.Module
    output: Tensor
    input: Tensor | None
    passive: bool
    place: Place = (0, 0, ())
    source: Place | None = None


@dataclass(slots=True)
class Survey:
    """What one small forward pass showed.

    Attributes:
        records: every module call that returned one floating tensor (or a tuple with one map), in order of completion.
        outputs: what the model returned, without a graph.
        logits: the logits in it, if there are any.
        end: where the logits were.
        stem: the convolution that reads the images directly, if there is one.
        images: what the model was run on; None if no further question is going to be asked.
        notes: doubts about the choice of a layer, for the user.
        inputs: what the model was run with, if there was more than images.
    """

    records: list[Record] = field(default_factory=list)
    outputs: Any = None
    logits: Tensor | None = None
    end: Place | None = None
    stem: nn.modules.conv._ConvNd | None = None
    images: Tensor | None = None
    notes: list[str] = field(default_factory=list)
    inputs: Inputs | None = None

    def run(self, model: nn.Module, images: Tensor) -> Any:
        """What the model returns for other images beside the same further arguments."""
        return self.of(images).run(model)

    def of(self, images: Tensor) -> Inputs:
        """Other images beside the same further arguments."""
        return Inputs(images) if self.inputs is None else self.inputs.with_images(images)


def survey(
    model: nn.Module,
    images: Tensor,
    gradients: bool,
    inputs: Inputs | None = None,
    read: Callable[[Any], Tensor | None] = logits_of,
) -> Survey:
    """Run ``model`` once, without gradients, with every module watched. It holds what the forward pass holds.

    Args:
        model: the user's model; its hooks are as before when this returns or raises.
        images: a small batch, [N, channels, *spatial].
        gradients: keep the images, so that ``find_layer`` can ask which layers every position of which matters.
        inputs: the images with what the model takes besides.
        read: the logits in the outputs.

    Raises:
        InputError: the images do not have the rank, channels, dtype or device that the first convolution needs.
        ModelStateError: the model does not accept hooks.
    """
    found, owner = Survey(inputs=inputs), threading.get_ident()
    # A clone taken here is no inference tensor, even where the images are.
    watched = images.detach().clone()
    alive: dict[int, tuple[StorageWeakRef, int]] = {}  # an address is not given out again while somebody refers to it
    numbers = itertools.count()

    def before(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == owner and args and args[0] is watched:
            assert isinstance(module, nn.modules.conv._ConvNd)
            check_stem(module, images)
            found.stem = module

    def place(tensor: Tensor) -> Place:
        for address in [address for address, (reference, _) in alive.items() if reference.expired()]:
            del alive[address]
        reference = StorageWeakRef(tensor.untyped_storage())
        if reference.cdata not in alive:
            alive[reference.cdata] = reference, next(numbers)
        return alive[reference.cdata][1], int(tensor.storage_offset()), tuple(tensor.shape)

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = map_of(output)
            if threading.get_ident() != owner or output is None:
                return
            source = args[0] if args and isinstance(args[0], Tensor) else None
            alias = source is not None and source.data_ptr() == output.data_ptr() and source.numel() == output.numel()
            leaf = next(module.children(), None) is None
            passive = leaf and (isinstance(module, _PASSIVE) or (alias and not isinstance(module, nn.Sequential)))
            passive = passive or type(module).__name__ in ("SelectAdaptivePool2d", "Permute")
            from_ = None if source is None else place(source)
            found.records.append(Record(name, module, _Form.of(output), _Form.of(source), passive, place(output), from_))

        return hook

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        watch(stack, model, after)
        for module in model.modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                stack.callback(module.register_forward_pre_hook(before).remove)
        found.outputs = found.run(model, watched)
    for record in found.records:
        if isinstance(record.output, _Form):
            record.output = record.output.tensor()
        if isinstance(record.input, _Form):
            record.input = record.input.tensor()
    found.logits = read(found.outputs)
    found.end = None if found.logits is None else place(found.logits)
    found.images = watched if gradients else None
    return found


def watch(stack: ExitStack, model: nn.Module, hook: Any) -> None:
    """Register ``hook(name)`` as a forward hook of every module for as long as ``stack`` is open.

    Raises:
        ModelStateError: a part of the model does not accept hooks.
    """
    try:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(hook(name)).remove)
    except RuntimeError as error:
        raise ModelStateError(
            f"{type(model).__name__} has a part that does not accept hooks ({error}). Pass the original model, "
            "not a scripted or traced one."
        ) from error


def map_of(output: Any) -> Tensor | None:
    """The floating tensor a module returned, alone or as the only map in a tuple (as blocks of Hugging Face's do); or None."""
    if isinstance(output, tuple):
        maps = [part for part in output if isinstance(part, Tensor) and part.is_floating_point() and part.ndim >= 3]
        output = maps[0] if len(maps) == 1 else None
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def check_stem(module: nn.modules.conv._ConvNd, images: Tensor) -> None:
    """Check the images against the convolution that reads them.

    Args:
        module: the convolution.
        images: what it is about to read.

    Raises:
        InputError: wrong rank, channels, device or dtype.
    """
    weight, channels = module.weight, module.in_channels
    rank = weight.ndim
    if images.ndim != rank:
        hint = " Add a batch dimension: images[None]." if images.ndim == rank - 1 else ""
        raise InputError(f"images must have {rank} dimensions for this model, got shape {shown(images.shape)}.{hint}")
    if images.shape[1] != channels:
        hint = " The channels come second: images.movedim(-1, 1)." if images.shape[-1] == channels else ""
        raise InputError(f"images must have {channels} channels for this model, got shape {shown(images.shape)}.{hint}")
    if images.device != weight.device:
        raise InputError(f"images are on {images.device}, the model is on {weight.device}: images.to({str(weight.device)!r}).")
    if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
        raise InputError(f"images are {images.dtype}, the model is {weight.dtype}: images.to({weight.dtype}), or use autocast.")
