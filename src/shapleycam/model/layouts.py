"""Layouts: where the channels and the positions of a target layer's output are.

Every layout gives the same strided view [N, C, S] of the activations, without a copy; the kernels read that view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import LayerError

#: kind -> number of dimensions, channel dimension
KINDS: dict[str, tuple[int, int]] = {
    "NCHW": (4, 1),
    "NHWC": (4, 3),
    "NTC": (3, 2),
    "NCL": (3, 1),
    "NCDHW": (5, 1),
    "NDHWC": (5, 4),
}

#: How many leading tokens may be no positions: none, a class token, two (distilled), or registers with and without the class.
PREFIXES = (0, 1, 2, 4, 5)

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.conv._ConvNd)


@dataclass(frozen=True, slots=True)
class Layout:
    """How to read a layer's output as positions times channels.

    Attributes:
        kind: "NCHW", "NHWC", "NTC" (tokens), "NCL" (one spatial dimension), "NCDHW" or "NDHWC".
        grid: the spatial shape of the map, (h, w), (d, h, w) or (l,); its product is S.
        prefix: how many leading tokens are not positions (class token, distillation token, registers); "NTC" only.
    """

    kind: str
    grid: tuple[int, ...]
    prefix: int = 0

    @property
    def channels_dim(self) -> int:
        """The dimension of the layer's output that holds the channels."""
        return KINDS[self.kind][1]

    def view(self, activations: Tensor) -> Tensor:
        """The strided [N, C, S] view of a tensor in this layout; prefix tokens are skipped, nothing is copied."""
        if self.kind == "NTC":
            return activations[:, self.prefix :].transpose(1, 2)
        if self.channels_dim != 1:
            activations = activations.movedim(-1, 1)
        return activations.flatten(2)


@dataclass(frozen=True, slots=True)
class Transformed(Layout):
    """The output of a reshape transform that is no mere rearrangement; ``kind`` is "custom"."""

    transform: Callable[[Tensor], Tensor] | None = None

    @property
    def channels_dim(self) -> int:
        raise LayerError(
            "This method changes channels of the layer's own output, and the reshape transform computes with it instead of "
            "moving it: which channel is which cannot be told. Choose a gradient method or another layer."
        )

    def view(self, activations: Tensor) -> Tensor:
        assert self.transform is not None
        return self.transform(activations).flatten(2)


class ReshapeTransform:
    """A function from a layer's output to [N, C, *grid], as pytorch-grad-cam's ``reshape_transform``, read as a layout.

    It is tried on numbered elements: one that only moves them (drops the class token, puts the channels first) is recognised
    and becomes a plain :class:`Layout`, which costs no copy. Any other is applied to activations, gradients and
    Hessian-vector products alike.

    Args:
        function: takes [N, ...] with any N.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self._known: dict[tuple[int, ...], Layout] = {}

    def layout(self, shape: Sequence[int], name: str) -> Layout:
        """The layout of an output of shape ``shape``.

        Raises:
            LayerError: the function fails on that shape, or does not return [N, C, *grid].
        """
        each = tuple(shape[1:])
        if each not in self._known:
            self._known[each] = self._study(each, name)
        return self._known[each]

    def _study(self, each: tuple[int, ...], name: str) -> Layout:
        size = math.prod(each)
        # Of both signs and without zero, so that no function but a rearrangement leaves them as they are. float32 counts
        # exactly up to 2 ** 24, and there are quarters.
        index = torch.arange(size, dtype=torch.float32 if size <= 1 << 22 else torch.float64).reshape(1, *each)
        index = index - (size // 2 - 0.25)
        try:
            moved = self.function(index)
        except Exception as error:
            raise LayerError(
                f"The reshape transform fails on the output of layer {name!r}, one image of which is {each}: {error}. It must "
                "turn [N, ...] into [N, C, *grid]; without one the layout is found automatically."
            ) from error
        if not isinstance(moved, Tensor) or moved.ndim < 3 or moved.shape[0] != 1:
            got = tuple(moved.shape) if isinstance(moved, Tensor) else type(moved).__name__
            raise LayerError(
                f"The reshape transform must return [N, C, *grid]; for one image of layer {name!r} it returned {got}."
            )
        grid = tuple(moved.shape[2:])
        for kind, (ndim, _) in KINDS.items():
            if ndim != len(each) + 1:
                continue
            plain = Layout(kind, grid, max(each[0] - math.prod(grid), 0) if kind == "NTC" else 0)
            if torch.equal(plain.view(index), moved.flatten(2)):
                return plain
        return Transformed("custom", grid, 0, self.function)


def resolve_layout(
    shape: Sequence[int],
    image_shape: Sequence[int],
    *,
    name: str,
    wanted: str | Layout | ReshapeTransform = "auto",
    module: nn.Module | None = None,
    prefix: int | None = None,
    patch: tuple[int, ...] | None = None,
    strict: bool = False,
) -> Layout:
    """The layout of a layer's output of shape ``shape`` for images of shape ``image_shape`` [N, channels, H, W].

    The evidence, in order: the caller's wish; which dimensions have the images' aspect ratio; the kind of module.
    For tokens: the model's patch size and number of prefix tokens.

    Args:
        shape: the layer's output shape, batch first.
        image_shape: the images' shape, [N, channels, *spatial].
        name: the layer's name, for messages.
        wanted: "auto", a kind, a complete Layout, or a ReshapeTransform.
        module: the target layer, whose own channel count breaks ties.
        prefix: how many leading tokens the model declares, if it does.
        patch: the model's patch size, if it has a patch embedding.
        strict: take the images' aspect ratio only, and not the module's word where no dimensions have it.

    Raises:
        LayerError: the output has no positions, the wish does not fit the shape, or the shape is ambiguous.
    """
    shape, space = tuple(shape), tuple(image_shape[2:])
    if isinstance(wanted, ReshapeTransform):
        return wanted.layout(shape, name)
    if isinstance(wanted, Layout):
        _check_layout(wanted, shape, name)
        return wanted
    if wanted != "auto":
        if wanted not in KINDS:
            raise LayerError(f"Unknown layout {wanted!r}: expected 'auto', a Layout, or one of {', '.join(KINDS)}.")
        if KINDS[wanted][0] != len(shape):
            raise LayerError(
                f"Layout {wanted!r} needs {KINDS[wanted][0]} dimensions, but layer {name!r} returned shape {shape}."
            )
        kinds: list[str] = [wanted]
    else:
        kinds = [kind for kind, (ndim, _) in KINDS.items() if ndim == len(shape)]
    if not kinds:
        raise LayerError(
            f"Layer {name!r} returned shape {shape}, which has no positions to map. Choose an earlier layer whose output is "
            "[N, C, H, W], [N, H, W, C] or [N, tokens, C]."
        )
    found = [layout for kind in kinds if (layout := _fit(kind, shape, space, prefix, patch, strict=wanted == "auto"))]
    if len(found) > 1:
        found = [layout for layout in found if _channels_agree(module, shape[layout.channels_dim])] or found
    if len(found) > 1 and isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)):
        # h = w = channels: these two kinds of module have the channels second, always.
        found = [layout for layout in found if layout.channels_dim == 1]
    if not found and wanted == "auto" and len(shape) == len(image_shape) and not strict:
        # Strides that differ by dimension (audio, text lines) break the aspect test: let the module's own word decide.
        loose = [layout for kind in kinds if (layout := _fit(kind, shape, space, prefix, patch, strict=False))]
        found = [layout for layout in loose if _channels_agree(module, shape[layout.channels_dim])]
    if len(found) != 1:
        options = ", ".join(repr(kind) for kind in kinds)
        extra = (
            " For tokens give the grid and the number of prefix tokens: layout=Layout('NTC', grid=(h, w), prefix=n)."
            if len(shape) == 3
            else ""
        )
        raise LayerError(
            f"Cannot tell where the channels of layer {name!r} are: output shape {shape} for images of {space}. "
            f"Say so with layout= (one of {options}).{extra}"
        )
    return found[0]


def _check_layout(layout: Layout, shape: tuple[int, ...], name: str) -> None:
    if layout.kind not in KINDS or KINDS[layout.kind][0] != len(shape):
        raise LayerError(f"{layout} does not fit layer {name!r}, whose output has shape {shape}.")
    positions = shape[1] - layout.prefix if layout.kind == "NTC" else math.prod(_spatial(layout.kind, shape))
    if positions != math.prod(layout.grid):
        raise LayerError(
            f"{layout} has {math.prod(layout.grid)} positions, but layer {name!r} with output shape {shape} has {positions}."
        )


def _spatial(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:-1] if KINDS[kind][1] != 1 else shape[2:]


def _fit(
    kind: str,
    shape: tuple[int, ...],
    space: tuple[int, ...],
    prefix: int | None,
    patch: tuple[int, ...] | None,
    strict: bool,
) -> Layout | None:
    if kind == "NTC":
        return _fit_tokens(shape[1], space, prefix, patch)
    grid = _spatial(kind, shape)
    if not strict:
        return Layout(kind, grid)
    if len(grid) != len(space) or any(g > s for g, s in zip(grid, space, strict=True)):
        return None
    # The same stride in every dimension, up to one position of rounding or padding.
    for i in range(1, len(grid)):
        expected = grid[0] * space[i] / space[0]
        back = grid[i] * space[0] / space[i]
        if abs(expected - grid[i]) > 1 and abs(back - grid[0]) > 1:
            return None
    return Layout(kind, grid)


def _fit_tokens(tokens: int, space: tuple[int, ...], prefix: int | None, patch: tuple[int, ...] | None) -> Layout | None:
    prefixes = (prefix,) if prefix is not None else PREFIXES
    if patch is not None and len(patch) == len(space):
        # Floor for models that crop, ceiling for models that pad to whole patches.
        for grid in (
            tuple(s // p for s, p in zip(space, patch, strict=True)),
            tuple(-(-s // p) for s, p in zip(space, patch, strict=True)),
        ):
            left = tokens - math.prod(grid)
            if math.prod(grid) > 0 and (left == prefix or (prefix is None and left in prefixes)):
                return Layout("NTC", grid, left)
    if len(space) != 2:
        return None
    for skipped in prefixes:
        rows = math.sqrt((tokens - skipped) * space[0] / space[1]) if tokens > skipped else 0.0
        h = round(rows)
        if h > 0 and (tokens - skipped) % h == 0 and abs(h - rows) < 1e-6:
            return Layout("NTC", (h, (tokens - skipped) // h), skipped)
    return None


def _channels_agree(module: nn.Module | None, channels: int) -> bool:
    """Whether the last parametrised layer inside ``module`` says that its output has this many channels."""
    if module is None:
        return False
    said: int | None = None
    for part in module.modules():
        if isinstance(part, nn.modules.conv._ConvNd):
            said = part.out_channels
        elif isinstance(part, _NORMS):
            said = part.num_channels if isinstance(part, nn.GroupNorm) else int(part.num_features)  # type: ignore[arg-type]
        elif isinstance(part, nn.LayerNorm):
            said = int(part.normalized_shape[-1])
        elif isinstance(part, nn.Linear):
            said = part.out_features
    return said == channels
