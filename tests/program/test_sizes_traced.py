"""Programs of traced heads for images of any size, against torch's own Hessian-vector product in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from shapleycam import Explainer, ExportError
from shapleycam.program import sizes, substitutes

from ..helpers import Split, by_definition

CHANNELS, CLASSES = 6, 5
TIGHT = {"rtol": 1e-8, "atol": 1e-11}


class Beside(nn.Module):
    """A skip connection around its parts."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.parts(x)


class Last(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


class Spread(nn.Module):
    """The standard deviation over the positions, of which there are as many as the image has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.std((2, 3))


def pooled(width: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)


def heads() -> dict[str, tuple[nn.Module, ...]]:
    c = CHANNELS
    return {
        "strides": (nn.Conv2d(c, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 7, 2, 3), nn.Tanh(), *pooled(7)),
        "one of two": (nn.Conv2d(c, 8, 1, 2), nn.SiLU(), *pooled(8)),
        "grouped and dilated": (
            Beside(nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=3), nn.GELU()),
            nn.Conv2d(c, 8, 3, (2, 1), (0, 2), groups=2),
            nn.GELU(),
            *pooled(8),
        ),
        "transposed": (
            nn.ConvTranspose2d(c, 8, 3, 2, 1, output_padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(8, 7, 3, 1, 1, output_padding=1, dilation=2),
            nn.SiLU(),
            *pooled(7),
        ),
        "pools": (
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(c, 8, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(3, 2, 1),
            *pooled(8),
        ),
        "windows of an adaptive pool": (
            nn.MaxPool2d(3, 2, 1),
            nn.AdaptiveAvgPool2d((3, 2)),
            nn.Flatten(),
            nn.Linear(c * 6, 9),
            nn.Tanh(),
            nn.Linear(9, CLASSES),
        ),
        "norms": (nn.GroupNorm(3, c), nn.SiLU(), nn.InstanceNorm2d(c, affine=True), nn.Conv2d(c, 7, 1), nn.SiLU(), *pooled(7)),
        "channels last": (Last(), nn.LayerNorm(c), nn.Linear(c, 8), nn.GELU(), nn.Flatten(1, 2), Tokens()),
        "spread": (nn.Conv2d(c, 8, 1), nn.Tanh(), Spread(), nn.Linear(8, CLASSES)),
    }


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean(1))


def model_of(name: str) -> nn.Module:
    torch.manual_seed(4)
    model = Split(nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.Sequential(*heads()[name])).eval().double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 1.5)
        [module for module in model.modules() if isinstance(module, nn.Linear)][-1].weight.mul_(8)
    return model


def images_of(height: int, width: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 100 + width)
    return torch.randn(count, 3, height, width, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", heads())
def test_against_the_definition_at_other_sizes(name):
    model = model_of(name)
    program = Explainer(model, "target").program(images_of(40, 40), targets="given", size="image", dynamic_size=True)
    low, narrow = program.least
    for height, width in ((40, 40), (low, narrow), (low, 37), (39, narrow + 1), (33, 36), (52, 45)):
        images, targets = images_of(height, width, 3), torch.tensor([4, 0, 2])
        found = program(images, targets)
        torch.testing.assert_close(found.logits, model(images), **TIGHT)
        for i, target in enumerate(targets.tolist()):
            torch.testing.assert_close(found.raw[i], by_definition(model, images[i : i + 1], target), **TIGHT)
        assert found.maps.shape == (3, height, width)


@pytest.mark.parametrize("targets", ["given", "all"])
@pytest.mark.parametrize("options", [{}, {"engine": "quadrature", "nodes": 3, "baseline": "mean"}])
def test_several_and_all_classes_by_both_engines(targets, options):
    explainer = Explainer(model_of("strides"), "target", "shapleycam-h", **options)
    program = explainer.program(images_of(24, 24), targets=targets, all_classes=True, dynamic_size=True)
    for height, width in ((24, 24), (40, 29)):
        images = images_of(height, width, 3)
        classes = torch.tensor([[1, 4]] * 3) if targets == "given" else torch.arange(CLASSES).expand(3, -1)
        found, expected = program(images, classes) if targets == "given" else program(images), explainer(images, classes)
        torch.testing.assert_close(found.raw, expected.raw, **TIGHT)
        assert found.maps.shape == expected.raw.shape


class Images(nn.Module):
    """Its head resizes to the images' size, which no input of the head has."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.target, self.linear, self.fixed = nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.Linear(CHANNELS, CLASSES), fixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.target(x)
        if self.fixed:
            a = nn.functional.interpolate(a, x.shape[2:], mode="bilinear")
        return self.linear((a.sum((2, 3)) / (x.shape[2] * x.shape[3])).tanh())


def test_a_head_that_asks_for_the_size_of_the_images():
    model = Images(fixed=False).eval().double()
    explainer = Explainer(model, "target")
    program = explainer.program(images_of(20, 20), targets="given", dynamic_size=True)
    for size in ((20, 20), (33, 18)):
        images, targets = images_of(*size), torch.tensor([[0, 3, 1], [4, 4, 2]])
        torch.testing.assert_close(program(images, targets).raw, explainer(images, targets).raw, **TIGHT)


def test_a_rule_that_cannot_be_proven_of_all_sizes_and_holds():
    """Whether the last window of a pool with ceil_mode starts inside of the picture."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(CHANNELS, 8, 3, padding=1), nn.SiLU(), *pooled(8))
    stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.SiLU(), nn.MaxPool2d(3, 2, ceil_mode=True))
    model = Split(stem, head).eval().double()
    explainer = Explainer(model, "target")
    program = explainer.program(images_of(40, 40), dynamic_size=True)
    for size in ((40, 40), (39, 41), (38, 37), (51, 66)):
        torch.testing.assert_close(program(images_of(*size)).raw, explainer(images_of(*size)).raw, **TIGHT)


class Distances(nn.Module):
    """Its head reads weights between all positions, [H·W, H·W], which the trunk has made: no row of them is an image's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.target = nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.scale, self.linear = nn.Linear(1, 1), nn.Linear(CHANNELS, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        rows, columns = (torch.arange(side, dtype=x.dtype) for side in x.shape[2:])
        place = (rows[:, None] + columns).flatten()
        near = self.scale((place[:, None] - place).square()[..., None])[..., 0].softmax(1)
        a = self.target((x.flatten(2) @ near).view_as(x))
        return self.linear((a.flatten(2).tanh() @ near).square().mean(2))


@pytest.mark.parametrize("options", [{}, {"engine": "quadrature", "nodes": 3}])
def test_what_the_head_reads_may_have_a_row_for_every_position(options):
    explainer = Explainer(Distances().eval().double(), "target", **options)
    program = explainer.program(images_of(16, 16), targets="given", dynamic_size=True)
    for size in ((16, 16), (22, 31)):
        images, targets = images_of(*size), torch.tensor([[0, 3, 1], [4, 4, 2]])
        torch.testing.assert_close(program(images, targets).raw, explainer(images, targets).raw, **TIGHT)


class Functional(nn.Module):
    """Pools that are no modules, the last of which a small image would leave one row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(x.sigmoid(), 2, return_indices=True)[0]
        return nn.functional.avg_pool2d(x.square(), 3, 2).mean((2, 3))


def test_the_least_size_leaves_functions_several_rows_too():
    model = Split(nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.Sequential(Functional(), nn.Linear(CHANNELS, CLASSES))).eval().double()
    program = Explainer(model, "target").program(images_of(40, 40), targets="given", dynamic_size=True)
    assert program.least == (32, 32)
    for size in ((32, 32), (33, 71)):
        images, targets = images_of(*size, 1), torch.tensor([3])
        torch.testing.assert_close(program(images, targets).raw[0], by_definition(model, images, 3), **TIGHT)


class Decides(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh() if x.shape[2] > 30 else x.sigmoid()


class RowByRow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros_like(x[:, :, 0])
        for row in x.unbind(2):
            state = (state + row).tanh()
        return state.mean(2)


class Padded(nn.Module):
    """To whole windows of two by two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(x, (0, -x.shape[3] % 2, 0, -x.shape[2] % 2))
        return nn.functional.pixel_unshuffle(x, 2).unflatten(1, (CHANNELS, 4)).tanh().mean(2)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Images(fixed=True), r"for such sizes only: .*, of aten\.upsample_bilinear2d\.vec, which is not so"),
        (Split(nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.Sequential(Decides(), *pooled(CHANNELS))), r"for such sizes only: .*\b60\b"),
        (
            Split(nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.Sequential(RowByRow(), nn.Linear(CHANNELS, CLASSES))),
            "for such sizes only: one height",
        ),
        (Split(nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.Sequential(Padded(), *pooled(CHANNELS))), "only: multiples of some number"),
        (
            Split(nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.Sequential(nn.MaxPool2d(7), nn.Sigmoid(), *pooled(CHANNELS))),
            "one (height|width), .*larger images",
        ),
    ],
    ids=["resize", "decision", "recurrent", "padded", "one row"],
)
def test_heads_that_have_one_size(model, said):
    with pytest.raises(ExportError, match=f"dynamic_size=True is not to be had: .*({said})"):
        Explainer(model.eval().double(), "target").program(images_of(24, 24), dynamic_size=True)


class DecidesByBoth(nn.Module):
    """torch.export lets rules about height and width together pass in silence."""

    def __init__(self, large: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.large = large

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh() if self.large(x.shape[2], x.shape[3]) else x.sigmoid()


def raises_if(large: bool) -> bool:
    if large:
        raise ValueError("too oblong")
    return False


@pytest.mark.parametrize("where", ["trunk", "head"])
@pytest.mark.parametrize(
    ("large", "said"),
    [
        (lambda h, w: h * w > 3000, "<= 3000, which is not so for"),
        (lambda h, w: h > 3 * w, "which is not so for"),
        (lambda h, w: (h * w) ** 0.5 > 60, "<= 60.0*, which is not so for"),
        (lambda h, w: raises_if(h > 5 * w), "which is not so for .* fails on .* too oblong"),
    ],
    ids=["area", "aspect", "root", "refuses"],
)
def test_what_a_model_decides_by_both_sides_is_tried_where_it_is_not_so(large, said, where):
    torch.manual_seed(3)
    stem, decides = nn.Conv2d(3, CHANNELS, 3, 2, 1), DecidesByBoth(large)
    parts = (nn.Sequential(stem, decides), ()) if where == "trunk" else (stem, (decides,))
    model = Split(parts[0], nn.Sequential(*parts[1], nn.Conv2d(CHANNELS, 7, 1), nn.SiLU(), *pooled(7))).eval().double()
    with pytest.raises(ExportError, match=f"for such sizes only: .*{said}"):
        Explainer(model, "target").program(images_of(24, 24), dynamic_size=True)


class OtherForLarge(nn.Module):
    """What no graph of it shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(x if torch.compiler.is_exporting() or x.shape[2] < 100 else 1.5 * x)


def test_what_a_derivative_decides_by_is_tried_where_it_is_not_so(monkeypatch):
    """Nobody's tries come to a hundred positions by themselves."""
    seen = []

    def decides(x):
        seen.append(x.shape)
        return x.sigmoid() * x if x.shape[2] < 100 else x * x.sigmoid()

    def made(activation):
        torch.manual_seed(0)
        model = Split(nn.Conv2d(3, CHANNELS, 3, 2, 1), nn.Sequential(activation, *pooled(CHANNELS))).eval().double()
        explainer = Explainer(model, "target")
        return explainer, explainer.program(images_of(24, 24), dynamic_size=True)

    assert made(OtherForLarge())[1].doubtful == {}
    monkeypatch.setitem(substitutes.SUBSTITUTES, torch.ops.aten.silu.default, decides)
    with pytest.raises(ExportError, match=r"sizes only: .* < 100, of aten.silu.default, which is not so for (199|200) x"):
        made(OtherForLarge())
    explainer, program = made(nn.SiLU())
    assert seen and [height for height, _ in program.doubtful] in ([199], [200])
    torch.testing.assert_close(program(images_of(31, 30)).raw, explainer(images_of(31, 30)).raw, **TIGHT)


def test_a_rule_that_cannot_be_computed_is_named(monkeypatch):
    monkeypatch.setattr(sizes.PythonPrinter, "doprint", lambda self, rule: "nobody_knows(height)")
    head = nn.Sequential(DecidesByBoth(lambda h, w: h * w > 3000), *pooled(CHANNELS))
    explainer = Explainer(Split(nn.Conv2d(3, CHANNELS, 3, 2, 1), head).eval().double(), "target")
    with pytest.raises(ExportError, match=r"only: nobody_knows\(height\), which cannot be tried \(NameError: .*nobody_knows"):
        explainer.program(images_of(24, 24), dynamic_size=True)
