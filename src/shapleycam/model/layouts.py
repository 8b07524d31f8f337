"""Layouts: where the channels and the positions of a target layer's output are.

Every layout gives the same strided view [N, C, S] of the activations, without a copy; the kernels read that view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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


def shown(shape: Sequence[int]) -> str:
    """A shape for a message. Some of the images are studied, not all, so the first dimension is just N."""
    return f"({', '.join(['N', *map(str, shape[1:])])})"


_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.conv._ConvNd)


@dataclass(frozen=True, slots=True)
class Layout:
    """How to read a layer's output as positions times channels.

    Attributes:
        kind: "NCHW", "NHWC", "NTC" (tokens), "NCL" (one spatial dimension), "NCDHW" or "NDHWC".
        grid: the spatial shape of the map, (h, w), (d, h, w) or (l,); its product is S.
        prefix: how many leading tokens are not positions (class token, distillation token, registers); "NTC" only.
        suffix: how many trailing tokens are not positions (the detection tokens of YOLOS); "NTC" only.
        time_axis: the dimension of the images that d is along, for a grid (d, h, w): 2 in [N, channels, D, H, W] as for
            convolutions, 1 in [N, T, channels, H, W] as Hugging Face's video models take their clips.
    """

    kind: str
    grid: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0
    time_axis: int = 2

    @property
    def channels_dim(self) -> int:
        """The dimension of the layer's output that holds the channels."""
        return KINDS[self.kind][1]

    def view(self, activations: Tensor) -> Tensor:
        """The strided [N, C, S] view of a tensor in this layout; other tokens are skipped, nothing is copied."""
        if self.kind == "NTC":
            return activations[:, self.prefix : activations.shape[1] - self.suffix].transpose(1, 2)
        if self.channels_dim != 1:
            activations = activations.movedim(-1, 1)
        return activations.flatten(2)

    def grid_of(self, activations: Tensor) -> tuple[int, ...]:
        """The spatial shape of an output of any size in this layout, which is none of tokens."""
        return _spatial(self.kind, tuple(activations.shape))

    def space(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """The spatial shape of images [N, ...] that the grid covers: (h, w), (d, h, w) or (l,)."""
        if self.time_axis == 1 and len(image_shape) == 5:
            return (image_shape[1], *image_shape[3:])
        return tuple(image_shape[2:])


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
        return Transformed("custom", grid, transform=self.function)


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
    suffix: int | None = None,
    channels_second: bool = False,
) -> Layout:
    """The layout of a layer's output of shape ``shape`` for images of shape ``image_shape`` [N, channels, H, W].

    The evidence, in order: the caller's wish; which dimensions have the images' aspect ratio; the kind of module.
    For tokens: the model's patch size and number of prefix tokens. For one spatial dimension every shape has the images'
    "aspect ratio", so the kind of module comes first there. Images [N, T, channels, H, W] of up to four channels and more
    than four frames are read as such, unless a convolution says otherwise.

    Args:
        shape: the layer's output shape, batch first.
        image_shape: the images' shape, [N, channels, *spatial].
        name: the layer's name, for messages.
        wanted: "auto", a kind, a complete Layout, or a ReshapeTransform.
        module: the target layer, whose own channel count breaks ties.
        prefix: how many leading tokens the model declares, if it does.
        patch: the model's patch size, if it has a patch embedding.
        strict: take the images' aspect ratio only, and not the module's word where no dimensions have it.
        suffix: how many trailing tokens the model declares, if it does.
        channels_second: a convolution reads the images directly, so their second dimension is the channels, whatever its size.

    Raises:
        LayerError: the output has no positions, the wish does not fit the shape, or the shape is ambiguous.
    """
    shape, time_axis = tuple(shape), 2 if channels_second else _time_axis(image_shape)
    space = Layout("", (), time_axis=time_axis).space(image_shape)
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
                f"Layout {wanted!r} needs {KINDS[wanted][0]} dimensions, but layer {name!r} returned shape {shown(shape)}."
            )
        kinds: list[str] = [wanted]
    else:
        kinds = [kind for kind, (ndim, _) in KINDS.items() if ndim == len(shape)]
    if not kinds:
        raise LayerError(
            f"Layer {name!r} returned shape {shown(shape)}, which has no positions to map. Choose an earlier layer whose "
            "output is [N, C, H, W], [N, H, W, C] or [N, tokens, C]."
        )
    tokens = Tokens(prefix, patch, suffix)
    fits = {
        strictly: [layout for kind in kinds if (layout := _fit(kind, shape, space, tokens, strictly))]
        for strictly in (True, False)
    }
    found = fits[wanted == "auto"]
    if wanted == "auto" and len(space) == 1 and len(shape) == 3:
        found = [Layout(kind, grid) for kind, grid in _one_dimension(module, shape, space[0])]
    if len(found) > 1:
        found = [layout for layout in found if _channels_agree(module, shape[layout.channels_dim])] or found
    if len(found) > 1 and isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)):
        # h = w = channels: these two kinds of module have the channels second, always.
        found = [layout for layout in found if layout.channels_dim == 1]
    if not found and wanted == "auto" and len(shape) == len(image_shape) and len(space) > 1 and not strict:
        # Strides that differ by dimension (audio, text lines, time) break the aspect test: let the module's own word decide,
        # or that a layer has no more positions along a dimension than the images have.
        found = [layout for layout in fits[False] if _channels_agree(module, shape[layout.channels_dim])]
        if not found:
            within = [all(g <= s for g, s in zip(layout.grid, space, strict=True)) for layout in fits[False]]
            found = [layout for layout, fit in zip(fits[False], within, strict=True) if fit]
    if len(found) != 1:
        options = ", ".join(repr(kind) for kind in kinds)
        grid = {1: "(t,)", 2: "(h, w)", 3: "(d, h, w)"}.get(len(space), "(...)")
        extra = (
            f" For tokens give the grid and how many tokens before and behind it are no positions: "
            f"layout=Layout('NTC', grid={grid}, prefix=n, suffix=m)."
            if len(shape) == 3
            else ""
        )
        raise LayerError(
            f"Cannot tell where the channels of layer {name!r} are: output shape {shown(shape)} for images of {space}. "
            f"Say so with layout= (one of {options}).{extra}"
        )
    return found[0] if time_axis == 2 else replace(found[0], time_axis=time_axis)


def _time_axis(image_shape: Sequence[int]) -> int:
    """Where the frames are: in the place of the channels if there are too many for channels, and those come behind them."""
    return 1 if len(image_shape) == 5 and image_shape[1] > 4 >= image_shape[2] else 2


def _check_layout(layout: Layout, shape: tuple[int, ...], name: str) -> None:
    if layout.kind not in KINDS or KINDS[layout.kind][0] != len(shape):
        raise LayerError(f"{layout} does not fit layer {name!r}, whose output has shape {shown(shape)}.")
    positions = shape[1] - layout.prefix - layout.suffix if layout.kind == "NTC" else math.prod(_spatial(layout.kind, shape))
    if positions != math.prod(layout.grid):
        raise LayerError(
            f"{layout} has {math.prod(layout.grid)} positions, but layer {name!r} with output shape {shown(shape)} has "
            f"{positions}."
        )


def _spatial(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:-1] if KINDS[kind][1] != 1 else shape[2:]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a model says of its tokens: how many before and behind the patches are none, and the patch size."""

    prefix: int | None = None
    patch: tuple[int, ...] | None = None
    suffix: int | None = None


def _fit(kind: str, shape: tuple[int, ...], space: tuple[int, ...], tokens: Tokens, strict: bool) -> Layout | None:
    if kind == "NTC":
        suffix = tokens.suffix or 0
        found = _fit_tokens(shape[1] - suffix, space, tokens.prefix, tokens.patch)
        return found and replace(found, suffix=suffix)
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


def _one_dimension(module: nn.Module | None, shape: tuple[int, ...], length: int) -> list[tuple[str, tuple[int, ...]]]:
    """The kinds and grids that an output of three dimensions may have for images of one spatial dimension.

    Convolutions and their norms have the channels second, other layers last. That is believed of a module of torch, whatever
    the sizes; of one that somebody wrote (a convolution, then a transposition) where the sizes bear it out.
    """
    options: dict[int, tuple[str, tuple[int, ...]]] = {1: ("NCL", (shape[2],)), 2: ("NTC", (shape[1],))}
    dim, channels = _said(module)
    if channels is not None:
        agree = [place for place in options if shape[place] == channels]
        torchs = isinstance(module, nn.Sequential) or type(module).__module__.startswith("torch.nn.")
        if len(agree) == 1 or (len(agree) == 2 and torchs and dim is not None):
            return [options[agree[0] if len(agree) == 1 else 1 if dim == 1 else 2]]
    if isinstance(module, (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.Upsample)):
        return [options[1]]
    return [option for option in options.values() if option[1][0] <= length]


def _channels_agree(module: nn.Module | None, channels: int) -> bool:
    """Whether the last parametrised layer inside ``module`` says that its output has this many channels."""
    return _said(module)[1] == channels


def _said(module: nn.Module | None) -> tuple[int | None, int | None]:
    """What the last parametrised layer inside ``module`` says of its output: the channels' dimension (-1: last), and number."""
    said: tuple[int | None, int | None] = (None, None)
    for part in module.modules() if module is not None else ():
        if isinstance(part, nn.modules.conv._ConvNd):
            said = 1, part.out_channels
        elif isinstance(part, _NORMS):
            said = 1, part.num_channels if isinstance(part, nn.GroupNorm) else int(part.num_features)  # type: ignore[arg-type]
        elif isinstance(part, nn.LayerNorm):
            said = -1, int(part.normalized_shape[-1])
        elif isinstance(part, nn.Linear):
            said = -1, part.out_features
        elif isinstance(part, nn.RNNBase):
            said = -1, (part.proj_size or part.hidden_size) * (2 if part.bidirectional else 1)
    return said
