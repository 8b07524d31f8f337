"""What a model is called with: a batch of images, and what else it may want beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import InputError


@dataclass(frozen=True, slots=True)
class Whole:
    """An extra argument that belongs to no image and is never cut, though its first dimension may equal the batch.

    Six prompts beside six images are such a case: ``explainer(images, args=(Whole(prompts),))``. The model gets ``value``.
    """

    value: Any


@dataclass(frozen=True, slots=True)
class Inputs:
    """One call of a model: images, and optional further arguments.

    Attributes:
        images: floating [N, channels, *spatial].
        args, kwargs: further arguments of the model. Tensors in them whose first dimension is N, also inside lists, tuples
            and mappings, belong to the images row by row; all others, and those in :class:`Whole`, are the same for all.
        images_as: the keyword under which the model takes the images; None for its first positional argument.
    """

    images: Tensor
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    images_as: str | None = None

    @property
    def extra(self) -> bool:
        """Whether there is anything beside the images."""
        return bool(self.args or self.kwargs)

    def run(self, model: nn.Module) -> Any:
        """What the model returns for them.

        A model compiled in place (``model.compile()``) runs as it was before: its graphs would skip hooks.
        """
        compiled = getattr(model, "_compiled_call_impl", None) is not None
        call: Callable[..., Any] = model._call_impl if compiled else model
        if not self.extra:  # nearly every model
            return call(self.images) if self.images_as is None else call(**{self.images_as: self.images})
        args, kwargs = tree_map(_bare, (self.args, dict(self.kwargs)))
        if self.images_as is None:
            return call(self.images, *args, **kwargs)
        return call(*args, **{self.images_as: self.images}, **kwargs)

    def with_images(self, images: Tensor) -> Inputs:
        """The same arguments beside other images, one for each of these."""
        return replace(self, images=images)

    def rows(self, index: Tensor | slice) -> Inputs:
        """The images ``index`` (a slice, or int64 [B], in any order and number) with what belongs to them."""
        return self.beside(self.images[index], index)

    def beside(self, images: Tensor, index: Tensor | slice) -> Inputs:
        """Other images [B, ...] in the place of those that ``index`` names, with what belongs to the named ones."""
        if not self.extra:
            return replace(self, images=images)
        batch = self.images.shape[0]

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != batch:
                return value
            return value[index.to(value.device) if isinstance(index, Tensor) else index]

        args, kwargs = tree_map(cut, (self.args, dict(self.kwargs)))
        return replace(self, images=images, args=args, kwargs=kwargs)


_NONE: Mapping[str, Any] = MappingProxyType({})


def _bare(value: Any) -> Any:
    return value.value if isinstance(value, Whole) else value


def as_inputs(images: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, images_as: str | None) -> Inputs:
    """A call's inputs, checked on the host.

    Raises:
        InputError: the images are no floating tensor [N, channels, *spatial] with N at least 1, or args and kwargs are no
            sequence and no mapping, or name the images a second time.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"images must be a torch.Tensor, got {type(images).__name__}. Use torch.from_numpy or torch.stack.")
    if not images.is_floating_point():
        raise InputError(
            f"images must be floating and normalised as the model expects, got {images.dtype}. For 0..255 pixels: "
            "images.float() / 255, then subtract the mean and divide by the standard deviation."
        )
    if images.ndim < 3:
        raise InputError(f"images must be [N, channels, *spatial], got shape {tuple(images.shape)}.")
    if images.numel() == 0:
        raise InputError(f"images is an empty batch, shape {tuple(images.shape)}: pass at least one image.")
    if not isinstance(args, (tuple, list)):
        raise InputError(f"args must be a tuple of the model's further arguments, got {type(args).__name__}: args=(value,).")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputError(f"kwargs must be a mapping of the model's keyword arguments, got {type(kwargs).__name__}.")
    if kwargs and images_as in kwargs:
        raise InputError(f"kwargs holds {images_as!r}, which images_as names as the images: pass them as the first argument.")
    return Inputs(images, tuple(args), dict(kwargs) if kwargs else _NONE, images_as)
