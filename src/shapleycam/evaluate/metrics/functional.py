"""Per-image parts of the ADCC evaluation (arXiv 2501.06261, section 5; Poppi et al., CVPR Workshops 2021), batched.

With the explained class c, the map M in [0, 1] at the size of the *normalised* input x, and the softmax probabilities p, p⁺,
p⁻ of c for x, x·M and x·(1 - M) (a masked pixel becomes the data set's mean):

    Average Drop                max(0, p - p⁺) / p                lower is better
    Coherency                   (Pearson(M, M′) + 1) / 2          higher is better; M′: the same method on x·M, for the same c
    Complexity                  mean |M|                          lower is better
    Increase in Confidence      1 if p⁺ > p, else 0               higher is better
    Average Drop in Deletion    max(0, p - p⁻) / p                higher is better

Everything here works in float64 on the tensors' device, without waiting for it, and needs torch alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...explainer import Explainer
from ...explanation import Explanation
from ...methods.table import PAPER_METHODS
from ...model.inputs import Inputs
from ...utilities.outputs import Output, flat, logits_of


def drop(p: Tensor, masked: Tensor) -> Tensor:
    """max(0, p - masked) / p per image, float64 [N]; 0 where p is 0: no confidence, so none to lose."""
    p, masked = p.double(), masked.double()
    return (p - masked).clamp(min=0) / torch.where(p == 0, 1.0, p)


def increase(p: Tensor, kept: Tensor) -> Tensor:
    """1 where kept > p, strictly, else 0; NaN where either is NaN. float64 [N]."""
    return (kept > p).double() + (kept.double() + p.double()) * 0


def complexity(maps: Tensor) -> Tensor:
    """mean |M| per image, float64 [N], of maps [N, *size]."""
    return maps.double().abs().flatten(1).mean(1)


def coherency(maps: Tensor, again: Tensor) -> Tensor:
    """(Pearson(M, M′) + 1) / 2 per image, float64 [N]; 0 where either map has NaN, Inf or no variance.

    Args:
        maps: M, [N, *size].
        again: M′, the maps of the masked images, of the same shape.

    Raises:
        InputError: the shapes differ.
    """
    if maps.shape != again.shape or maps.ndim < 2:
        raise InputError(f"The maps must have one shape [N, *size], got {tuple(maps.shape)} and {tuple(again.shape)}.")
    a, b = maps.double().flatten(1), again.double().flatten(1)
    # Told apart by its values: the mean of a constant map is off by a rounding, so its variance need not come out as 0.
    varied = (a != a[:, :1]).any(1) & (b != b[:, :1]).any(1)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    r = (a * b).sum(1) / (a.square().sum(1).sqrt() * b.square().sum(1).sqrt())
    good = varied & r.isfinite()
    return torch.where(good, (r.clamp(-1, 1) + 1) / 2, 0.0)


def adcc(average_drop: Tensor, coherency: Tensor, complexity: Tensor) -> Tensor:
    """Harmonic mean of Coh, 1 - Com and 1 - AD, all means over the images; 0 where one of the three is 0."""
    parts = torch.stack((coherency, 1 - complexity, 1 - average_drop)).double()
    return 3 / (1 / parts).sum(0)


def mask(images: Tensor, maps: Tensor) -> Tensor:
    """images · maps, [N, channels, *size] with maps [N, *size]; rounded once where the images are in half precision."""
    wide = torch.promote_types(images.dtype, maps.dtype)
    return (images.to(wide) * maps.to(wide)[:, None]).to(images.dtype)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What the parts are made of, for a batch of N images and one method.

    Attributes:
        targets: c, int64 [N].
        probabilities: p, [N].
        kept: p⁺, for the images times their maps, [N].
        deleted: p⁻, for the images times one minus their maps, [N].
        maps: M, [N, *size] in [0, 1].
        again: M′, the same method's maps of the images times M, for the same classes, [N, *size].
    """

    targets: Tensor
    probabilities: Tensor
    kept: Tensor
    deleted: Tensor
    maps: Tensor
    again: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All but the targets, in the order of :meth:`shapleycam.metrics.ADCC.update`."""
        return self.probabilities, self.kept, self.deleted, self.maps, self.again


def measure(
    explainer: Explainer,
    images: Tensor,
    targets: Tensor | int | None = None,
    methods: Sequence[str] = PAPER_METHODS,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Measurement]:
    """Run the model as the evaluation asks, for all methods: 1 + 2 forward passes per *distinct* map.

    One pass (and one derivative) makes the maps of all methods. A method then needs x·M, explained, which gives p⁺ and M′
    at once, and x·(1 - M). Methods whose maps are bitwise equal share these passes, as GradCAM and HiResCAM do where the
    weight is constant over the positions.

    Args:
        explainer: layer, utility and engine; its own method is not looked at.
        images: normalised, [N, channels, *size].
        targets: the classes to explain, one per image; None for the predicted ones.
        methods: names of :data:`shapleycam.METHODS`.
        args, kwargs: what the model takes besides the images; the same for images and masked images.

    Returns:
        a :class:`Measurement` per method.

    Raises:
        InputError: several classes per image, or a model without logits; otherwise as :meth:`shapleycam.Explainer.compare`.
    """
    found = explainer.compare(images, targets, methods, args=args, kwargs=kwargs)
    first = next(iter(found.values()))
    if first.targets is None or first.targets.ndim != 1:
        raise InputError("The evaluation needs logits [N, K] and one class per image.")
    classes, p = first.targets, first.probabilities
    measured: dict[str, Measurement] = {}
    for maps, sharers in _distinct(found):
        again = explainer.compare(mask(images, maps), classes, sharers, args=args, kwargs=kwargs)
        with torch.no_grad():
            deleted = _of_logits(
                explainer.inputs(mask(images, 1 - maps), args, kwargs).run(explainer.model), classes, explainer.utility.output
            )
        for name in sharers:
            measured[name] = Measurement(classes, p, again[name].probabilities, deleted, maps, again[name].heatmaps())
    return {name: measured[name] for name in found}


def probabilities(model: torch.nn.Module, images: Tensor | Inputs, classes: Tensor, output: Output = "auto") -> Tensor:
    """Softmax probability of ``classes`` [N] for ``images``, [N] in float32 (float64 for a float64 model).

    ``images`` come alone or with what the model takes besides; ``output`` says where the logits are in what the model returns,
    as for :class:`shapleycam.Explainer`.

    Raises:
        InputError: the model returned no logits [N, K].
    """
    outputs = images.run(model) if isinstance(images, Inputs) else model(images)
    return _of_logits(outputs, classes, output)


def _of_logits(outputs: Any, classes: Tensor, output: Output) -> Tensor:
    logits = logits_of(outputs, output)
    logits = None if logits is None else flat(logits)
    if logits is None or logits.ndim != 2:
        raise InputError("The model returned no logits [N, K], so there are no class probabilities.")
    p = logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return p.gather(1, classes[:, None]).squeeze(1)


def _distinct(found: dict[str, Explanation]) -> list[tuple[Tensor, list[str]]]:
    groups: list[tuple[Tensor, list[str]]] = []
    for name, explanation in found.items():
        maps = explanation.heatmaps()
        for known, names in groups:
            if torch.equal(known, maps):
                names.append(name)
                break
        else:
            groups.append((maps, [name]))
    return groups
