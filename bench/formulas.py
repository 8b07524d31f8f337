"""The maps by their formulas, in float64 and without the package: what the parity report compares everybody with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def utility_value(name: str, z: Tensor, c: Tensor) -> Tensor:
    """U per image [N] of logits [N, K]."""
    p = z.exp() / z.exp().sum(1, keepdim=True)
    z_c, p_c = (t.gather(1, c[:, None])[:, 0] for t in (z, p))
    return {"logit": z_c, "probability": p_c, "log_probability": p_c.log(), "rest": z_c + p_c.log()}[name]


class Formulas:
    """The maps [N, S] of one network and utility, in float64."""

    def __init__(
        self, head: Callable[[Tensor], Tensor], nhwc: bool, activations: Tensor, utility: str, targets: Tensor
    ) -> None:
        a = activations.double()

        def total(x: Tensor) -> Tensor:
            return utility_value(utility, head(x), targets).sum()

        gradient, hvp = torch.func.jvp(torch.func.grad(total), (a,), (a,))
        self.a, self.g, hvp = ((t.movedim(-1, 1) if nhwc else t).flatten(2) for t in (a, gradient, hvp))
        self.w = self.g - hvp / 2

    def __call__(self, method: str) -> Tensor:
        a, s = self.a, self.a.sum(2, keepdim=True)
        w = self.w if method.startswith("shapleycam") else self.g
        match method:
            case "shapleycam" | "gradcam":
                return (w.mean(2, keepdim=True) * a).sum(1)
            case "shapleycam-h" | "hirescam":
                return (w * a).sum(1)
            case "shapleycam-e" | "gradcam-e":
                return (w * a).clamp_min(0).sum(1)
            case "shapleycam-x" | "xgradcam":
                return ((w * a).sum(2, keepdim=True) / (s + 1e-7) * a).sum(1)
            case "layercam":
                return (w.clamp_min(0) * a).sum(1)
            case "gradcam++":
                bottom = 2 * w**2 + w**3 * s + 1e-6
                return (torch.where(w != 0, w.clamp_min(0) * w**2 / bottom, 0.0).sum(2, keepdim=True) * a).sum(1)
        raise KeyError(method)

    def variants(self, peer: str, method: str) -> Iterator[tuple[str, Tensor]]:
        """What else a peer may compute: words, map."""
        a, g, s = self.a, self.g, self.a.sum(2, keepdim=True)
        if (peer, method) == ("torch_cam", "gradcam++"):
            # It divides a copy that it made by indexing with a mask, and goes on with the undivided tensor.
            yield "the weight is not divided: Σ_s max(g, 0)·g²", ((g.clamp_min(0) * g**2).sum(2, keepdim=True) * a).sum(1)
        if (peer, method) == ("torch_cam", "xgradcam"):
            yield "1e-8 in place of 1e-7 in the denominator", ((g * a).sum(2, keepdim=True) / (s + 1e-8) * a).sum(1)
        if (peer, method) == ("grad_cam", "shapleycam"):
            yield "the Hessian term is missing", self("gradcam")


def display(raw: Tensor, size: int) -> Tensor:
    """The display form [N, size, size] of maps [N, S] on a square grid."""
    side = round(raw.shape[1] ** 0.5)
    maps = _unit(raw.clamp_min(0).unflatten(1, (side, side)))
    return _unit(F.interpolate(maps[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0])


def _unit(maps: Tensor) -> Tensor:
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (1e-7 + maps.amax((1, 2), keepdim=True))


def relative(one: Tensor, other: Tensor) -> float:
    """The largest difference of two maps [N, S] after the ReLU, in units of the second's largest value, image by image."""
    one, other = one.double().clamp_min(0), other.double().clamp_min(0)
    return float(((one - other).abs().amax(1) / other.amax(1).clamp_min(1e-300)).max())
