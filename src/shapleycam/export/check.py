"""An artefact against the explainer in float64: what must agree before the file gets its name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.images import Preprocess
from ..errors import ExportError, ShapleyCamWarning
from ..explainer import Explainer
from ..model.capture import tensor_of
from ..ops import reference
from ..ops.display_map import EPS_DISPLAY
from ..program.build import off
from ..program.graph import TRACING, copied
from .formats import Run
from .metadata import Metadata

#: Relative to the largest logit, or value of the map, of the same image.
TOLERANCE = 1e-4
#: The batches that are compared; programs are traced with two images.
BATCHES = (1, 3)


@dataclass(frozen=True, slots=True)
class Checks:
    """How far an artefact was off, in its own runtime, when it was made.

    Attributes:
        batches: the numbers of images.
        sizes: (height, width) of each batch as the artefact took it.
        logits: largest difference to float64, relative to the image's largest logit.
        maps: the same for signed maps. A display map counts by the change of the signed map that it stands for: its difference,
            times the spreads that the two min-max steps have divided by, relative to the largest value of the signed map.
        display: largest plain difference of display maps, in [0, 1]; None where there are none.
        features: as logits; None where there are none.
        tolerance: what was allowed for ``logits``, ``maps`` and ``features``.
    """

    batches: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]
    logits: float
    maps: float
    display: float | None
    features: float | None
    tolerance: float

    def content(self) -> dict[str, Any]:
        """As a mapping, for the metadata."""
        return asdict(self)


def examples(images: Tensor, count: int, seed: int) -> Tensor:
    """``count`` images like those given, all different: they themselves, then with noise of their own spread."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(count) % images.shape[0]
    picked = images.detach().cpu()[index]
    noise = torch.randn(picked.shape, generator=generator, dtype=torch.float32).to(picked.dtype)
    again = (torch.arange(count) >= images.shape[0]).to(picked.dtype).view(-1, *[1] * (images.ndim - 1))
    return picked + noise * picked.std().nan_to_num(1.0) * again * 0.5


def as_pixels(images: Tensor, preprocess: Preprocess) -> Tensor:
    """The uint8 pixels [N, H, W, 3] nearest to normalised images [N, 3, H, W]."""
    mean = torch.tensor(preprocess.mean)[:, None, None]
    std = torch.tensor(preprocess.std)[:, None, None]
    return ((images.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def targets_for(mode: str, count: int, classes: int) -> Tensor | None:
    """Predicted (-1), first and last class, and from three images on one that is none; None where none are given."""
    if mode not in ("given", "several"):
        return None
    cycle = torch.tensor([-1, 0, classes, classes - 1])
    if mode == "given":
        return cycle[(torch.arange(count) if count > 1 else torch.tensor([3])) % 4]
    return cycle[:3].expand(count, -1).contiguous() if count > 1 else cycle[[3, 0]][None]


class Reference:
    """The explainer in float64, with a model of its own.

    Args:
        explainer: of the user.
        preprocess: of an artefact that takes pixels.
        resize: whether it resizes them.
    """

    def __init__(self, explainer: Explainer, preprocess: Preprocess | None, resize: bool = False) -> None:
        self._explainer = copied(explainer, type(explainer.model).__name__, "the comparison with float64")
        self._explainer.model.double()
        self._device = next((p.device for p in self._explainer.model.parameters()), torch.device("cpu"))
        self._preprocess, self._resize = preprocess, resize

    def images(self, inputs: Tensor) -> Tensor:
        """float64 [N, channels, ...] of what an artefact is given."""
        if inputs.dtype != torch.uint8:
            return inputs.to(self._device, torch.float64)
        assert self._preprocess is not None
        views = inputs
        if self._resize:
            from PIL import Image

            views = torch.stack([self._preprocess.view(Image.fromarray(each.numpy())).permute(1, 2, 0) for each in inputs])
        mean = torch.tensor(self._preprocess.mean, dtype=torch.float64)
        std = torch.tensor(self._preprocess.std, dtype=torch.float64)
        return ((views.double() / 255 - mean) / std).permute(0, 3, 1, 2).to(self._device)

    def features(self, images: Tensor) -> Tensor:
        """[N, C]: the mean over the positions of the target layer's output."""
        explanation = self._explainer(images)
        found: list[Tensor] = []

        def take(module: nn.Module, args: Any, output: Any) -> None:
            found.append(explanation.diagnostics.layouts[0].view(tensor_of(output, name)).mean(2))

        name = explanation.diagnostics.layers[0]
        handle = self._explainer.model.get_submodule(name).register_forward_hook(take)
        try:
            with torch.no_grad():
                self._explainer.inputs(images).run(self._explainer.model)
        finally:
            handle.remove()
        return found[0].cpu()

    def explain(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Logits [N, K], signed maps [N, M, *grid] of classes [N, M] (of NaN where a class is none), and the images' size."""
        # The filters are those of the process: two threads that take turns badly would leave them changed.
        with TRACING, warnings.catch_warnings():
            warnings.simplefilter("ignore", ShapleyCamWarning)  # the user was warned by their own explainer
            logits = self._explainer(images).logits
            assert logits is not None
            known = (targets >= 0) & (targets < logits.shape[1])
            safe = torch.where(known, targets, 0).to(self._device)
            explanation = self._explainer(images, safe)
            raw = explanation.raw.cpu()
        missing = ~known.view(*known.shape, *[1] * (raw.ndim - 2))
        return logits.cpu(), raw.masked_fill(missing, float("nan")), explanation.image_size


def check(
    run: Run,
    metadata: Metadata,
    reference_of: Reference,
    inputs: Sequence[Tensor],
    tolerance: float = TOLERANCE,
) -> Checks:
    """Run an artefact on batches of inputs and compare all that it returns.

    Args:
        run: the opened artefact.
        metadata: its own.
        reference_of: the explainer in float64.
        inputs: one batch per entry, as the artefact takes them, normalised or pixels.
        tolerance: for the predicted class, and the result.

    Raises:
        ExportError: it does not run, or it explains another class; whether the figures are good, :func:`judge` says.
    """
    worst = {"logits": 0.0, "maps": 0.0, "display": 0.0, "features": 0.0}
    names = [port.name for port in metadata.outputs]
    prediction = next(port for port in metadata.outputs if port.content == "logits")
    for batch in inputs:
        images = reference_of.images(batch)
        classes = prediction.shape[1]
        assert isinstance(classes, int)
        given = targets_for(metadata.targets, len(batch), classes)
        feed = {"image": batch} if given is None else {"image": batch, "target": given}
        try:
            found = dict(zip(names, run(feed), strict=True))
        except Exception as error:
            raise ExportError(f"The artefact does not run with images {tuple(batch.shape)}: {error}") from error
        logits = found[prediction.name]
        chosen = classes_of(metadata.targets, given, logits)
        some = torch.arange(chosen.shape[1])
        if metadata.targets == "all":  # a sample: every class may cost a pass of the head
            some = torch.unique(torch.cat((torch.linspace(0, chosen.shape[1] - 1, 6).long(), logits.argmax(1))))
        expected, raw, image_size = reference_of.explain(images, chosen[:, some])
        size = image_size if metadata.maps == "image" else tuple(raw.shape[2:])
        worst["logits"] = max(worst["logits"], off(logits, expected))
        near_best(logits, expected, tolerance)
        several = metadata.targets in ("several", "all")
        for name in ("raw_map", "saliency_map"):
            if name not in found:
                continue
            value = found[name] if several else found[name][:, None]
            value = value[:, some]
            if name == "raw_map" or metadata.maps == "raw":
                worst["maps"] = max(worst["maps"], off(value.flatten(0, 1), raw.flatten(0, 1)))
            else:
                meant, plain = off_display(value.flatten(0, 1), raw.flatten(0, 1), size)
                worst["maps"], worst["display"] = max(worst["maps"], meant), max(worst["display"], plain)
        if "feature_vector" in found:
            worst["features"] = max(worst["features"], off(found["feature_vector"], reference_of.features(images)))
        if "target_class" in found:
            wanted = chosen if several else chosen[:, 0]
            if not torch.equal(found["target_class"], wanted):
                raise ExportError(f"The artefact explains the classes {found['target_class'].tolist()}, not {wanted.tolist()}.")
    return Checks(
        batches=tuple(len(batch) for batch in inputs),
        sizes=tuple(tuple(batch.shape[1:3] if batch.dtype == torch.uint8 else batch.shape[2:]) for batch in inputs),
        logits=worst["logits"],
        maps=worst["maps"],
        display=worst["display"] if metadata.maps != "raw" and "saliency_map" in names else None,
        features=worst["features"] if "feature_vector" in names else None,
        tolerance=tolerance,
    )


def classes_of(mode: str, given: Tensor | None, logits: Tensor) -> Tensor:
    """The explained classes, int64 [N, M], of an artefact that returned these logits."""
    predicted = logits.argmax(1, keepdim=True)
    if mode == "all":
        return torch.arange(logits.shape[1]).expand(logits.shape[0], -1)
    if given is None:
        return predicted
    given = given[:, None] if given.ndim == 1 else given
    return torch.where(given == -1, predicted, given)


def near_best(logits: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise ExportError where the artefact's predicted class is not (within the tolerance) the best in float64."""
    best = expected.amax(1)
    taken = expected.gather(1, logits.argmax(1, keepdim=True))[:, 0]
    if not bool((best - taken <= 2 * tolerance * expected.abs().amax(1)).all()):
        raise ExportError(f"The artefact predicts {logits.argmax(1).tolist()}, the model {expected.argmax(1).tolist()}.")


def off_display(found: Tensor, raw: Tensor, size: Sequence[int]) -> tuple[float, float]:
    """How far display maps [N, *size] are from those of signed maps [N, *grid] in float64.

    Returns:
        the difference in terms of the signed map (see :class:`Checks`), and the plain one.
    """
    raw = raw.double()
    expected = reference.display_map(raw, size, True)
    if found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return float("inf"), float("inf")
    dims = tuple(range(1, raw.ndim))
    shown = raw.clamp_min(0)
    spread = shown.amax(dims) - shown.amin(dims) + EPS_DISPLAY
    resized = reference.display_map(raw, size, False)
    again = resized.amax(dims) - resized.amin(dims) + EPS_DISPLAY
    plain = (found.double() - expected).abs().amax(dims)
    error = (plain * spread * again / raw.abs().amax(dims).clamp_min(1e-30)).nan_to_num(0.0)
    return float(error.amax()), float(plain.nan_to_num(0.0).amax())


def judge(checks: Checks, runtime: str) -> None:
    """Raise ExportError where an artefact is off by more than its tolerance."""
    worst = max(checks.logits, checks.maps, checks.features or 0.0)
    if not worst <= checks.tolerance:
        raise ExportError(
            f"The artefact was refused: in {runtime} it is off by {checks.logits:.1e} (logits) and {checks.maps:.1e} "
            f"(maps), relative to float64; at most {checks.tolerance:.0e} is allowed (tolerance=)."
        )
