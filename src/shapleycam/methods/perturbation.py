"""Channel weights without derivatives: ScoreCAM and AblationCAM, which ask the model instead.

Both try every channel of every image, so the work is thousands of forward passes. It is laid out as one long list of
(image, channel) pairs that is cut into chunks of bounded memory, whatever the batch; the scores stay on the device. Channels
that are zero everywhere are not tried one by one: what the model says of them is known.

Facts of both formulas are those of pytorch-grad-cam 1.5.7, against which they are tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..derivatives import Terms
from ..errors import InputError, ShapleyCamError
from ..model.head import Head, rows_per_pass
from ..model.inputs import Inputs
from ..model.pooled_linear import PooledLinear, tolerance
from ..utilities.named import Utility, evaluate
from .onednn import PackedConvolutions
from .table import Method, get_method

#: AblationCAM as pytorch-grad-cam 1.5.7 computes it where an image's activations have a minimum other than 0. It then sets
#: the channel to ``min - 1e7 (1 + c mod 32)``: far below anything the head has seen, and further for each channel of its
#: batch of 32, because every fill lowers the minimum the next one starts from. Use ``Explainer(method=ABLATION_FLOOR)`` to
#: reproduce such a map; ``"ablationcam"`` sets the channel to zero, as the paper does (Desai and Ramaswamy, WACV 2020).
ABLATION_FLOOR: Method = replace(
    get_method("ablationcam"),
    name="ablationcam-floor",
    source="ablation_floor",
    formula="α_c = (U(A) - U(A with A_c = min A - 1e7·(1 + c mod 32))) / U(A), 0 in place of it where min A = 0; Σ_c α_c·A",
)

# What one chunk may take, in bytes of the tensor that is altered. On a CPU small chunks stay in the cache and below the size
# from which every allocation asks the system for fresh pages (measured: 4 images of 224 are up to twice as fast as 16).
_IMAGE_BYTES = {"cpu": 5 << 19, "other": 128 << 20}
_LOGIT_BYTES = {"cpu": 8 << 20, "other": 256 << 20}


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """What one forward pass showed, and what is to be asked of the model.

    Attributes:
        model, layer: the user's model and the (name, module) of one target layer.
        pooled: the pool-and-linear head, where it was verified and may be used.
        utility: the utility whose change is the score.
        inputs: images, floating [N, channels, *spatial], and what the model takes besides.
        term: the layer's activations, as a view [N, C, S], and their layout.
        outputs, logits: of the forward pass.
        targets: int64 [N, M], or None for a utility without classes (M = 1).
        chunk: rows per pass; None for a number that fits the memory bounds above.
        draw: ``(activations, M) -> [N, M, C]``, random numbers in [-1, 1).
    """

    model: nn.Module
    layer: tuple[str, nn.Module]
    pooled: PooledLinear | None
    utility: Utility
    inputs: Inputs
    term: Terms
    outputs: Any
    logits: Tensor | None
    targets: Tensor | None
    chunk: int | None
    draw: Callable[[Tensor, int], Tensor]

    @property
    def classes(self) -> int:
        """M, the number of classes per image."""
        return 1 if self.targets is None else self.targets.shape[1]

    def score(self, outputs: Any, rows: Tensor | None = None, logits: Tensor | None = None) -> Tensor:
        """U of outputs [B, ...] for every class [B, M].

        ``rows`` [B] says whose image each row is (None: row i is image i); ``logits`` are given where they are at hand.
        """
        utility = self.utility if rows is None else self.utility.rows(rows)
        batch = self.inputs.images.shape[0] if rows is None else rows.shape[0]
        logits = self.utility.logits_of(outputs) if logits is None else logits
        columns: list[Tensor | None] = [None]
        if self.targets is not None:
            targets = self.targets if rows is None else self.targets[rows]
            columns = [targets[:, m] for m in range(targets.shape[1])]
        try:
            return torch.stack([evaluate(utility, outputs, logits, column, batch) for column in columns], 1)
        except (RuntimeError, ValueError, IndexError) as error:
            if utility.named or isinstance(error, (ShapleyCamError, torch.OutOfMemoryError)):
                raise
            raise InputError(
                f"The utility {utility.name!r} failed on {batch} rows, which are altered versions of the batch's "
                f"{self.inputs.images.shape[0]} images: {error}. If it holds something per image, give it a method rows(rows) "
                "that returns the same utility for those images (int64 [B]); shapleycam.objectives has examples."
            ) from error


def score_weights(shown: ForwardPass) -> Tensor:
    """ScoreCAM's weights (Wang et al., CVPR workshops 2020): ``softmax over c of U(x · M_c)``.

    ``M_c`` is the channel resized to the image (linear, corners aligned) and scaled to [0, 1] by ``(m - min) / (max - min +
    1e-8)``. It masks the normalised image.

    Returns:
        [N, M, C], in the utility's dtype, on the images' device.
    """
    images, term = shown.inputs.images, shown.term
    maps = term.activations.unflatten(2, term.layout.grid)  # [N, C, *grid]
    if len(term.layout.grid) != images.ndim - 2:
        raise InputError(
            f"ScoreCAM resizes the activations to the image, but layer {shown.layer[0]!r} has a map of "
            f"{len(term.layout.grid)} dimensions for images of {images.ndim - 2}. Choose another layer or method."
        )
    live = (term.activations != 0).any(2)  # [N, C]
    # The mask of a dead channel is zero: one black image stands for all of them.
    stand_in = ~live & ((~live).cumsum(1) == 1)
    size, mode = images.shape[2:], ("linear", "bilinear", "trilinear")[images.ndim - 3]
    run = _Runner(shown.model, shown.inputs)

    def ask(n: Tensor, c: Tensor) -> Tensor:
        masks = F.interpolate(maps[n, c][:, None].to(images.dtype), size, mode=mode, align_corners=True)
        flat = masks.flatten(1)
        low, high = flat.amin(1), flat.amax(1)
        shape = (-1,) + (1,) * (images.ndim - 1)
        masks = (masks - low.view(shape)) / (high - low + 1e-8).view(shape)
        return shown.score(run(images[n] * masks, n), n)

    scores = _ask_all(ask, live | stand_in, rows_per_pass(images[0], shown.chunk, _IMAGE_BYTES), shown.classes)  # [N, C, M]
    dead = scores.masked_fill(~stand_in[:, :, None], 0).sum(1, keepdim=True)
    scores = torch.where(live[:, :, None], scores, dead)
    return _marked(scores.softmax(1).transpose(1, 2), shown)


def ablation_weights(shown: ForwardPass, *, floor: bool = False) -> Tensor:
    """AblationCAM's weights (Desai and Ramaswamy, WACV 2020): ``(U(A) - U(A with channel c set to zero)) / U(A)``.

    For a pool-and-linear head the altered logits are ``z + W[:, c] (fill - mean A_c)``; elsewhere the head, and only the
    head, runs on the altered activations.

    Args:
        shown: the forward pass.
        floor: fill as pytorch-grad-cam does; see :data:`ABLATION_FLOOR`.

    Returns:
        [N, M, C], in the utility's dtype (float64 in closed form), on the images' device. An image whose U(A) is 0 has weights
        of Inf or NaN, which make its map NaN.
    """
    fill = _floor(shown.term.activations) if floor else None
    if shown.pooled is not None and (means := _verified_means(shown, shown.pooled.linear)) is not None:
        return _ablate_linear(shown, shown.pooled.linear, means, fill)
    head = Head(shown.model, shown.layer, shown.inputs)
    channels_dim = shown.term.layout.channels_dim
    whole = head.activations
    live = (whole != 0).movedim(channels_dim, 1).flatten(2).any(2)
    base = shown.score(head.outputs)

    def ask(n: Tensor, c: Tensor) -> Tensor:
        altered = whole[n]  # a copy
        picked = altered.movedim(channels_dim, 1)
        picked[torch.arange(n.shape[0], device=n.device), c] = (
            0.0 if fill is None else fill[n, c].view((-1,) + (1,) * (picked.ndim - 2)).to(picked.dtype)
        )
        return shown.score(head(altered, n), n)

    rows = rows_per_pass(whole[0], shown.chunk)
    # Setting a dead channel to zero changes nothing.
    tried = live if fill is None else torch.ones_like(live)
    scores = _ask_all(ask, tried, rows, shown.classes)
    scores = torch.where(tried[:, :, None], scores, base[:, None])
    return _marked(((base[:, None] - scores) / base[:, None]).transpose(1, 2), shown)


def _marked(alpha: Tensor, shown: ForwardPass) -> Tensor:
    """NaN for an image with NaN or Inf in its activations: a model may swallow either, its map must not."""
    return alpha + nan_mark(shown.term.activations)[:, None, None].to(alpha.dtype)


def _ask_all(ask: Callable[[Tensor, Tensor], Tensor], wanted: Tensor, rows: int, classes: int) -> Tensor:
    """``ask(n, c) -> [B, M]`` for every pair that ``wanted`` [N, C] names, ``rows`` at a time: [N, C, M], 0 elsewhere."""
    pairs = wanted.nonzero()
    found = [ask(part[:, 0], part[:, 1]) for part in pairs.split(rows)]
    if not found:
        return torch.zeros(*wanted.shape, classes, device=wanted.device)
    scores = torch.cat(found)
    out = scores.new_zeros(*wanted.shape, classes)
    out[pairs[:, 0], pairs[:, 1]] = scores
    return out


class _Runner:
    """The model on masked images; on a CPU with the channels last in memory and packed weights, which is quicker."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._model, self._inputs = model, inputs
        images = inputs.images
        self._last = images.ndim == 4 and images.device.type == "cpu"
        self._packed = PackedConvolutions() if self._last and PackedConvolutions.available() else nullcontext()

    def __call__(self, images: Tensor, rows: Tensor) -> Any:
        if self._last:
            try:
                with self._packed:
                    last = images.contiguous(memory_format=torch.channels_last)
                    return self._inputs.beside(last, rows).run(self._model)
            except RuntimeError as error:
                if "view size is not compatible" not in str(error):
                    raise
                self._last = False  # a model that views its activations needs the channels first
        return self._inputs.beside(images.contiguous(), rows).run(self._model)


def _floor(activations: Tensor) -> Tensor:
    """pytorch-grad-cam's fill per image and channel [N, C]."""
    low = activations.flatten(1).amin(1, keepdim=True).double()
    steps = torch.arange(activations.shape[1], device=low.device) % 32 + 1
    return torch.where(low == 0, 0.0, low - 1e7 * steps)


def _verified_means(shown: ForwardPass, linear: nn.Linear) -> Tensor | None:
    """mean_s(A) [N, C] in float64, or None where the classifier no longer explains the logits (the model was edited)."""
    z = shown.logits
    plain = shown.utility.named or (isinstance(shown.outputs, Tensor) and shown.utility.output == "auto")
    if z is None or z.ndim != 2 or not plain:
        return None  # a user's utility may want more of the outputs than the logits
    means = shown.term.activations.mean(2, dtype=torch.float64)
    if z.shape[1] != linear.out_features or means.shape[1] != linear.in_features:
        return None
    predicted = means @ linear.weight.T.double()
    if linear.bias is not None:
        predicted = predicted + linear.bias.double()
    error = (predicted - z).norm(dim=1) / predicted.norm(dim=1)
    # Images with NaN say nothing about the head; their maps are NaN either way.
    return means if bool((error.nan_to_num(0.0) <= tolerance(shown.term.activations.dtype)).all()) else None


def _ablate_linear(shown: ForwardPass, linear: nn.Linear, means: Tensor, fill: Tensor | None) -> Tensor:
    assert shown.logits is not None
    columns = linear.weight.T.double()  # [C, K]
    # The difference of two utilities loses digits; these few products can be afforded in float64.
    z = shown.logits.double()
    step = -means if fill is None else fill - means
    base = shown.score(z, None, z)

    def ask(n: Tensor, c: Tensor) -> Tensor:
        altered = torch.addcmul(z[n], step[n, c][:, None], columns[c])
        return shown.score(altered, n, altered)

    everything = torch.ones_like(means, dtype=torch.bool)
    scores = _ask_all(ask, everything, rows_per_pass(z[0], shown.chunk, _LOGIT_BYTES), shown.classes)
    return _marked(((base[:, None] - scores) / base[:, None]).transpose(1, 2), shown)


def nan_mark(activations: Tensor) -> Tensor:
    """[N]: NaN for an image with NaN or Inf in its activations [N, C, S], else 0."""
    wide = torch.promote_types(activations.dtype, torch.float32)
    return (activations * 0).sum((1, 2), dtype=wide) if activations.numel() else activations.new_zeros(activations.shape[0])


#: Where channel weights come from that need no derivative, by :attr:`Method.source`.
SOURCES: Mapping[str, Callable[[ForwardPass], Tensor]] = MappingProxyType(
    {
        "random": lambda shown: shown.draw(shown.term.activations, shown.classes),
        "score": score_weights,
        "ablation": ablation_weights,
        "ablation_floor": partial(ablation_weights, floor=True),
    }
)


def check_chunk(chunk: Any) -> int | None:
    """``chunk`` if it is None or a positive int.

    Raises:
        InputError: it is neither.
    """
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise InputError(f"chunk must be None or a positive number of rows per pass, got {chunk!r}.")
    return chunk
