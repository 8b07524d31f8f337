"""The classes: pytorch-grad-cam's constructor and call, with the explainer behind them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..derivatives import Terms
from ..errors import InputError, LayerError, TargetError
from ..explanation import Explanation
from ..methods.perturbation import ABLATION_FLOOR
from ..methods.table import Method
from ..model.layouts import ReshapeTransform
from .explainers import DropInExplainer, PerImage, Target
from .utils.model_targets import utility_of

Maps = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """One of the transforms of ``aug_smooth``: a horizontal flip or none, times a factor."""

    flip: bool
    factor: float

    def augment_image(self, images: Tensor) -> Tensor:
        """The images as the model is to see them."""
        return (images.flip(3) if self.flip else images) * self.factor

    def deaugment_mask(self, masks: Tensor) -> Tensor:
        """Maps [N, 1, H, W] of augmented images, turned back."""
        return masks.flip(3) if self.flip else masks


class ActivationsAndGradients:
    """What the target layers returned in the last call, and the gradients: one [N, C, *grid] per layer, on the CPU."""

    def __init__(self) -> None:
        self._terms: list[Terms] = []

    @property
    def activations(self) -> list[Tensor]:
        return [term.activations.unflatten(2, term.layout.grid).cpu() for term in self._terms]

    @property
    def gradients(self) -> list[Tensor]:
        return [
            term.pairs(1)[0][0].expand_as(term.activations).unflatten(2, term.layout.grid).cpu()
            for term in self._terms
            if term.gradients or term.position_weights or term.weights is not None
        ]

    def clear(self) -> None:
        """Let go of the tensors."""
        self._terms = []

    #: There are no hooks to remove: they live for one call.
    release = clear


class BaseCAM:
    """A method of attribution with pytorch-grad-cam's constructor and call.

    The results are pytorch-grad-cam's (1.5.7); ``make parity`` compares them. What is different: the layout of a transformer's
    output is found without a ``reshape_transform``; several target layers work with every method; the hooks live for one
    call, so an object may be used after its ``with`` block; ``model.zero_grad()`` is not called; no exception is swallowed;
    too few targets are an error, where pytorch-grad-cam returns zeros for the images without one; NaN in an image gives a
    map of NaN.

    Args:
        model: as there, put into evaluation mode, and left in it.
        target_layers: modules of the model; their maps are averaged.
        reshape_transform: from a layer's output to [N, C, *grid]; None to have it found.
        tta_transforms: what ``aug_smooth`` averages over: objects with ``augment_image`` and ``deaugment_mask``, such as
            a ``ttach.Compose``. None for flips times the factors 0.9, 1 and 1.1.

    Attributes:
        outputs: what the model returned in the last call, without gradients.
        batch_size: for the methods that run the model many times, how many images at once; None to have it chosen.

    Raises:
        LayerError: a target layer is not part of the model, is named twice, or there is none.
        ModelStateError: ``model`` is not an ``nn.Module``, or is compiled.
    """

    method: ClassVar[str | Method]
    #: further arguments of :class:`shapleycam.Explainer`
    _options: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        model: nn.Module,
        target_layers: Iterable[nn.Module],
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        tta_transforms: Iterable[Any] | None = None,
    ) -> None:
        self.model = model
        self.target_layers = list(target_layers)
        self.reshape_transform = reshape_transform
        self.tta_transforms: Iterable[Any] = tta_transforms or [
            Augmentation(flip, factor) for flip in (False, True) for factor in (0.9, 1.0, 1.1)
        ]
        self.outputs: Any = None
        self.batch_size: int | None = None
        self.activations_and_grads = ActivationsAndGradients()
        self._layout = "auto" if reshape_transform is None else ReshapeTransform(reshape_transform)
        self._own = PerImage()
        self._explainers: dict[tuple[str, bool], DropInExplainer] = {}
        self._lock = threading.Lock()
        self._explainer("logit", False)  # a wrong model or layer is refused here and now
        model.eval()
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._explainer('logit', False)!r})"

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Target] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> Maps:
        """Maps of a batch.

        Args:
            input_tensor: floating [N, channels, H, W] (or [N, channels, D, H, W]), normalised as the model expects.
            targets: one callable per image, from the model's output for it to a scalar; None for the logit of the predicted
                class.
            aug_smooth: the mean over six variants of every image.
            eigen_smooth: the first principal component of the weighted activations instead of their sum.

        Returns:
            float32 [N, H, W] (or [N, D, H, W]) in [0, 1].

        Raises:
            TargetError: fewer targets than images, something that is not callable, or a target that returns no scalar.
            InputError, LayerError, ModelStateError, DerivativeError: as :meth:`shapleycam.Explainer.__call__`.
        """
        run = self.forward_augmentation_smoothing if aug_smooth else self.forward
        return run(input_tensor, targets, eigen_smooth)

    def forward(self, input_tensor: Tensor, targets: Sequence[Target] | None = None, eigen_smooth: bool = False) -> Maps:
        """As :meth:`__call__` without ``aug_smooth``."""
        if not isinstance(input_tensor, Tensor):
            raise InputError(f"input_tensor must be a torch.Tensor, got {type(input_tensor).__name__}.")
        images = input_tensor.to(self.device)
        # With input of the wrong rank the explainer says so.
        chosen = None if targets is None else _check(targets, len(images) if images.ndim else 0)
        utility, classes = _recognise(chosen)
        explainer = self._explainer(utility, eigen_smooth)
        with self._lock:
            self._own.targets = chosen or ()
            explainer.terms = []
            explainer.set_chunk(self.batch_size)
            try:
                # With the norms, gradient and Hessian-vector product come apart, for activations_and_grads.
                explanation = explainer(images, classes, with_norms=explainer.method.order == 2)
            except (LayerError, InputError) as error:
                error.add_note("In shapleycam.compat, layout= is reshape_transform=, and utility= is targets=.")
                raise
            finally:
                self._own.targets = ()
                self.activations_and_grads._terms, explainer.terms = explainer.terms, []
        self.outputs = explanation.outputs
        return _display(explanation)

    def forward_augmentation_smoothing(
        self, input_tensor: Tensor, targets: Sequence[Target] | None = None, eigen_smooth: bool = False
    ) -> Maps:
        """As :meth:`__call__` with ``aug_smooth``."""
        maps = []
        for transform in self.tta_transforms:
            found = self.forward(transform.augment_image(input_tensor), targets, eigen_smooth)
            maps.append(transform.deaugment_mask(torch.from_numpy(found)[:, None])[:, 0].numpy())
        mean: Maps = np.mean(np.array(maps, np.float32), axis=0)
        return mean

    def _explainer(self, utility: str, principal: bool) -> DropInExplainer:
        key = (utility, principal)
        if key not in self._explainers:
            self._explainers[key] = DropInExplainer(
                self.model,
                self.target_layers,
                self.method,
                self._own if utility == "targets" else utility,
                layout=self._layout,
                principal=principal,
                **self._options,
            )
        return self._explainers[key]

    def __enter__(self) -> BaseCAM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.activations_and_grads.release()


def _check(targets: Sequence[Target], images: int) -> list[Target]:
    if callable(targets) or not isinstance(targets, Iterable):
        raise TargetError(
            f"targets must be a list with one callable per image, got {type(targets).__name__}. Put it in a list."
        )
    chosen = list(targets)
    for target in chosen:
        if not callable(target):
            raise TargetError(f"targets must be callables such as ClassifierOutputTarget(281), got {target!r}.")
    if len(chosen) < images:
        raise TargetError(f"There are {len(chosen)} targets for {images} images: give one per image.")
    return chosen[:images]


def _recognise(targets: list[Target] | None) -> tuple[str, Tensor | None]:
    """The utility that serves the targets, and the classes."""
    if targets is None:
        return "logit", None
    [name, *others] = {utility_of(target) for target in targets} or {None}
    if name is None or others:
        return "targets", None
    return name, torch.tensor([int(target.category) for target in targets])  # type: ignore[attr-defined]


def _display(explanation: Explanation) -> Maps:
    if len(explanation.image_size) == 3:
        return _display_volumes(explanation)
    maps: Maps = explanation.heatmaps().float().cpu().numpy()
    return maps


def _display_volumes(explanation: Explanation) -> Maps:
    """As pytorch-grad-cam: volumes are enlarged by cubic splines whose corners meet, where pictures are bilinear."""
    from scipy.ndimage import zoom

    layers = []
    for raw in explanation.raws:
        small = _unit(raw.clamp_min(0).cpu().numpy())
        factors = [large / have for large, have in zip(explanation.image_size, small.shape[1:], strict=True)]
        layers.append([zoom(np.float32(volume), factors) for volume in small])
    return _unit(np.maximum(np.array(layers, np.float32), 0).mean(0)).astype(np.float32)


def _unit(maps: npt.NDArray[Any]) -> npt.NDArray[Any]:
    axes = tuple(range(1, maps.ndim))
    maps = maps - maps.min(axes, keepdims=True)
    scaled: npt.NDArray[Any] = maps / (1e-7 + maps.max(axes, keepdims=True))
    return scaled


class ShapleyCAM(BaseCAM):
    """The paper's ShapleyCAM. Over a piecewise-linear head it needs ``ClassifierOutputReST`` targets to differ from GradCAM."""

    method = "shapleycam"


class AumannShapleyCAM(BaseCAM):
    """ShapleyCAM with the gradient's mean along the path from a baseline in the place of g - HA/2; pytorch-grad-cam has none.

    Args:
        nodes: how many Gauss-Legendre nodes, 1 to 32, or "auto".
        baseline: "zero", "mean", or a tensor that broadcasts to the activations as [N, C, S].
        model, target_layers, reshape_transform, tta_transforms: as for :class:`BaseCAM`.

    Raises:
        InputError: nodes or a baseline that cannot be.
    """

    method = "shapleycam"

    def __init__(
        self,
        model: nn.Module,
        target_layers: Iterable[nn.Module],
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        tta_transforms: Iterable[Any] | None = None,
        nodes: int | str = 4,
        baseline: str | Tensor = "zero",
    ) -> None:
        self._options = {"engine": "quadrature", "nodes": nodes, "baseline": baseline}
        super().__init__(model, target_layers, reshape_transform, tta_transforms)


class GradCAM(BaseCAM):
    method = "gradcam"


class HiResCAM(BaseCAM):
    method = "hirescam"


class GradCAMElementWise(BaseCAM):
    """The paper's GradCAM-E."""

    method = "gradcam-e"


class XGradCAM(BaseCAM):
    method = "xgradcam"


class LayerCAM(BaseCAM):
    method = "layercam"


class GradCAMPlusPlus(BaseCAM):
    method = "gradcam++"


class RandomCAM(BaseCAM):
    """Channel weights from NumPy's global generator: ``numpy.random.seed`` seeds it, as there."""

    method = "randomcam"


class ScoreCAM(BaseCAM):
    method = "scorecam"


class AblationCAM(BaseCAM):
    """AblationCAM as pytorch-grad-cam computes it, which is not the paper's wherever an activation is negative.

    It fills an ablated channel with a number far below the smallest activation, see
    :data:`shapleycam.methods.perturbation.ABLATION_FLOOR`; that of its default batch size of 32. For zeros, as in the paper,
    use ``Explainer(method="ablationcam")``.

    Args:
        ablation_layer: taken for compatibility; the layout says where the channels are.
        batch_size: how many altered activations go through the model at once.
        ratio_channels_to_ablate: 1.0; the experimental shortcut of other ratios is not here.

    Raises:
        InputError: another ratio.
    """

    method = ABLATION_FLOOR

    def __init__(
        self,
        model: nn.Module,
        target_layers: Iterable[nn.Module],
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        ablation_layer: Any = None,
        batch_size: int | None = None,
        ratio_channels_to_ablate: float = 1.0,
    ) -> None:
        if ratio_channels_to_ablate != 1:
            raise InputError(f"ratio_channels_to_ablate must be 1, got {ratio_channels_to_ablate}: all channels are ablated.")
        super().__init__(model, target_layers, reshape_transform)
        self.batch_size = batch_size


class EigenCAM(BaseCAM):
    """The sign of the component is that of LAPACK, as there, which is chance; ``Explainer(method="eigencam")`` has a rule."""

    method = "eigencam"


class EigenGradCAM(BaseCAM):
    """As :class:`EigenCAM`, of the activations times the gradient."""

    method = "eigengradcam"
