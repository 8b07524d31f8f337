"""Programs for images of any size, and the explainers that have none."""

import copy

import pytest
import torch
from torch import nn

from shapleycam import Explainer, ExportError, InputError
from shapleycam.program.sizes import other_sizes

from ..helpers import network


def images_of(height, width, count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height + width))


@pytest.mark.parametrize("size", ["layer", "image"])
@pytest.mark.parametrize("targets", ["predicted", "given", "all"])
def test_against_autograd_at_other_sizes(size, targets):
    model = network(curved=False).double()
    program = Explainer(model).program(images_of(12, 12).double(), targets=targets, size=size, dynamic_size=True)
    precise = Explainer(copy.deepcopy(model), engine="reverse_over_reverse")
    assert program.least == (4, 4)
    for height, width in ((12, 12), (4, 9), (33, 10), (50, 70)):
        images = images_of(height, width, 3).double()
        classes = {"predicted": None, "given": torch.tensor([[1, 6]] * 3), "all": torch.arange(7).expand(3, -1)}[targets]
        found = program(images) if targets == "all" else program(images, classes)
        expected = precise(images, classes)
        torch.testing.assert_close(found.logits, expected.logits)
        torch.testing.assert_close(found.raw, expected.raw)
        wanted = expected.heatmaps() if size == "image" else expected.heatmaps(expected.raw.shape[-2:])
        torch.testing.assert_close(found.maps, wanted)


def test_images_that_it_does_not_take():
    program = Explainer(network(curved=False)).program(images_of(12, 12), dynamic_size=True)
    for images in (images_of(3, 12), images_of(12, 3), torch.zeros(2, 4, 12, 12), torch.zeros(3, 12, 12)):
        with pytest.raises(InputError, match=r"\[N, 3, H, W\] with H >= 4 and W >= 4, got"):
            program(images)


def test_a_program_for_one_size_stays_one():
    program = Explainer(network(curved=False)).program(images_of(12, 12))
    with pytest.raises(InputError, match=r"explains images \[N, 3, 12, 12\]"):
        program(images_of(12, 14))


class Positions(nn.Module):
    """Adds something to every position, so that it has one size."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 12, 6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table


class Windows(nn.Module):
    """Takes any size, and pads it to whole windows."""

    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        padded = nn.functional.pad(x, (0, -width % 4, 0, -height % 4))
        return padded[:, :, :height, :width] * self.relative_position_bias_table


class Tokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def stem():
    return [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(8, 12, 3, padding=1)]


REFUSED = {
    "flatten and linear": (
        [*stem(), nn.Flatten(), nn.Linear(12 * 36, 5)],
        "2",
        r"takes images of 12 x 12, and fails on \d+ x \d+ \(RuntimeError: mat1",
    ),
    "a fixed window": ([*stem(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(12, 5)], "2", "window of fixed size"),
    "a table of positions": (
        [*stem(), Positions(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)],
        "3",
        r"takes images of 12 x 12, and fails on \d+ x \d+ \(RuntimeError: The size of tensor a",
    ),
    "windows": (
        [*stem(), Windows(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)],
        "3",
        "'3.relative_position_bias_table' is a table of relative positions",
    ),
    "tokens": ([*stem(), Tokens(), nn.LayerNorm(12), Mean(), nn.Linear(12, 5)], "4", "gives NTC"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_have_one_size(case):
    torch.manual_seed(0)
    parts, layer, said = REFUSED[case]
    with pytest.raises(ExportError, match=f"dynamic_size=True is not to be had: .*({said})"):
        Explainer(nn.Sequential(*parts).eval(), layer).program(images_of(12, 12), dynamic_size=True)


def test_a_window_that_fits_larger_images_too():
    """Then nothing fails: the pool leaves positions out, and the closed form would be wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(*stem(), nn.AvgPool2d(6, 6), nn.Flatten(), nn.Linear(12, 5)).eval()
    explainer = Explainer(model, "2")
    assert explainer(images_of(16, 16)).diagnostics.engine == "reverse_over_reverse"  # 8 positions, and 6 are read
    explainer = Explainer(model, "2")
    with pytest.raises(ExportError, match=r"nn.AdaptiveAvgPool2d\(1\)"):
        explainer.program(images_of(12, 12), dynamic_size=True)
    assert explainer(images_of(12, 12)).diagnostics.engine == "closed_form"  # as it was


def test_what_is_of_one_size_in_the_question():
    explainer, images = Explainer(network(curved=False)), images_of(12, 12)
    for size in (9, (6, 6)):
        with pytest.raises(ExportError, match="use size='layer' or 'image'"):
            explainer.program(images, size=size, dynamic_size=True)
    with pytest.raises(InputError, match="'huge'"):
        explainer.program(images, size="huge", dynamic_size=True)
    by_position = Explainer(network(curved=False), engine="quadrature", baseline=torch.zeros(12, 36))
    with pytest.raises(ExportError, match="a value for every position"):
        by_position.program(images, dynamic_size=True)
    with pytest.raises(ExportError, match="give larger images"):
        explainer.program(images_of(2, 12), dynamic_size=True)


def test_the_sizes_that_are_tried():
    assert other_sizes((224, 224), (64, 64)) == ((64, 64), (299, 181), (181, 337))
    assert other_sizes((65, 64), (64, 64)) == ((64, 64), (87, 65), (65, 97))
