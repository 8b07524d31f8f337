"""What several test files and the benchmarks share: small models whose heads have curvature, live networks, tolerances."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shapleycam import BackendError, ops
from shapleycam.ops.tolerance import TOLERANCE

__all__ = ["TOLERANCE"]  # (rtol, atol) against float64, by the dtype of the result: the package's own table


class Split(nn.Module):
    """trunk, then ``target`` (whose output is explained), then head."""

    def __init__(self, target: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.target = target
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.target(images))


class Pick(nn.Module):
    """Fixed activations, whatever the images: for tests with literal values."""

    def __init__(self, activations: Tensor) -> None:
        super().__init__()
        self.register_buffer("activations", activations)

    def forward(self, images: Tensor) -> Tensor:
        return self.activations.clone()


class Tokens(nn.Module):
    """[N, C, H, W] to a class token and [N, H·W, C] patches."""

    def forward(self, a: Tensor) -> Tensor:
        patches = a.flatten(2).transpose(1, 2)
        return torch.cat((patches.mean(1, keepdim=True), patches), 1)


class Attend(nn.Module):
    """One fused-attention block that ends in the class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, t: Tensor) -> Tensor:
        q, k, v = self.qkv(t).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, 0]


def small_heads(channels: int = 6, classes: int = 5) -> dict[str, tuple[nn.Module, nn.Module]]:
    """name -> (target, head): every kind of curvature, all from [N, 3, 4, 4] images."""
    c = channels
    pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return {
        "pool-linear": (nn.Conv2d(3, c, 1), nn.Sequential(*pooled, nn.Linear(c, classes))),
        "relu-pool-linear": (nn.Conv2d(3, c, 1), nn.Sequential(nn.ReLU(inplace=True), *pooled, nn.Linear(c, classes))),
        "conv-bn-silu": (
            nn.Conv2d(3, c, 1),
            nn.Sequential(nn.Conv2d(c, 7, 3, padding=1), nn.BatchNorm2d(7), nn.SiLU(), *pooled, nn.Linear(7, classes)),
        ),
        "pool-norm-linear": (nn.Conv2d(3, c, 1), nn.Sequential(*pooled, nn.LayerNorm(c), nn.Linear(c, classes))),
        "flatten-mlp": (
            nn.Conv2d(3, c, 1),
            nn.Sequential(nn.Flatten(), nn.Linear(16 * c, 9), nn.GELU(), nn.Linear(9, classes)),
        ),
        "attention": (nn.Sequential(nn.Conv2d(3, c, 1), Tokens()), nn.Sequential(Attend(c), nn.Linear(c, classes))),
    }


def by_definition(model: nn.Module, image: Tensor, target: int, utility: str = "rest") -> Tensor:
    """ShapleyCAM's raw map [H, W] of one image at a model's ``target``, by torch.autograd.functional and its ``head`` alone."""
    a = model.target(image).detach()

    def value(b: Tensor) -> Tensor:
        z = model.head(b.clone())[0]
        log_p = z.log_softmax(0)[target]
        return {"logit": z[target], "probability": log_p.exp(), "log_probability": log_p, "rest": z[target] + log_p}[utility]

    g = torch.autograd.functional.jacobian(value, a)
    _, hvp = torch.autograd.functional.hvp(value, a, a)
    assert float(hvp.norm() / g.norm()) > 0.01, "a head without curvature proves little"
    w = g - hvp / 2
    if a.ndim == 3:  # a class token, then the patches of a square
        side = round((a.shape[1] - 1) ** 0.5)
        a, w = (t[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for t in (a, w))
    return (w.mean((2, 3), keepdim=True) * a).sum(1)[0]


def toy(classes: int = 5, channels: int = 6) -> nn.Module:
    """A small network with a curved head that runs in a millisecond."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 9),
        nn.Tanh(),
        nn.Linear(9, classes),
    )
    return model.eval()


def wake(model: nn.Module, size: int | tuple[int, int] = 224, spread: float = 3.0, images: int = 2) -> nn.Module:
    """Random statistics and a last layer scaled so that the softmax is neither flat nor saturated; eval mode."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    model.eval()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        if not last.weight.any():
            last.weight.normal_(0, 0.1, generator=generator)
        height, width = (size, size) if isinstance(size, int) else size
        noise = torch.randn(images, 3, height, width, generator=generator, dtype=last.weight.dtype)
        last.weight.mul_(spread / model(noise).std())
    return model


def build(name: str, size: int | tuple[int, int] = 224, **options: object) -> nn.Module:
    """A live network by name, for images of a size: "tv:resnet18" is torchvision's, "timm:resnet18" is timm's."""
    torch.manual_seed(0)
    import timm
    import torchvision

    library, _, model = name.partition(":")
    if library == "tv":
        return wake(torchvision.models.get_model(model, weights=None, **options), size)
    size = options.get("img_size", size)
    return wake(timm.create_model(model, pretrained=False, num_classes=1000, **options), size)


def narrow_vgg11(size: int | tuple[int, int]) -> nn.Module:
    """torchvision's VGG-11, but 64 wide where it is 4096: its classifier is most of its weights, and no matter to a test."""
    import torchvision

    torch.manual_seed(0)
    with torch.device("meta"):
        model = torchvision.models.vgg11()
    model.features.to_empty(device="cpu")
    for module in model.features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    hidden = (nn.Linear(512 * 7 * 7, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Dropout())
    model.classifier = nn.Sequential(*hidden, nn.Linear(64, 1000))
    return wake(model, size)


def network(curved: bool = True, classes: int = 7) -> nn.Module:
    torch.manual_seed(4)
    head = [nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, classes)] if curved else [nn.Linear(12, classes)]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        *head,
    )
    with torch.no_grad():
        model[-1].weight *= 8
    return model.eval()


def available(operator: str, device: str = "cpu") -> list[str]:
    """The backends that serve an operator on a kind of device here."""
    found = []
    for name in ops.ORDER:
        try:
            pooling = "mean" if operator == "weighted_reduce" else None
            ops.select(operator, torch.empty(1, device=device), pooling=pooling, backend=name)
        except BackendError:
            continue
        found.append(name)
    return found
