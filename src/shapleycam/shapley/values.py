"""What a game paid out, and how close an explanation comes to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..explanation import Explanation


@dataclass(frozen=True, slots=True)
class Agreement:
    """How close an explanation's signed maps come to the Shapley values of its game, per image, float64 [N].

    Attributes:
        pearson, spearman: correlation over the players, and of their ranks; NaN where either side does not vary.
        relative_error: |map - values| / |values|, Euclidean.
        efficiency_gap: sum of the map, less U(A) - U(baseline): 0 where the efficiency axiom holds.
    """

    pearson: Tensor
    spearman: Tensor
    relative_error: Tensor
    efficiency_gap: Tensor


@dataclass(frozen=True, slots=True)
class ShapleyValues:
    """What a game paid out.

    Attributes:
        values: Shapley values [N, P], float64, on the images' device.
        standard_errors: of the values, [N, P]; 0 where they are exact.
        players: "positions", "channels" or "elements".
        groups: int64, the player of every position [S], channel [C] or element [C, S].
        grid: how the positions lie, (h, w), (l,) or (d, h, w).
        full, empty: U(A), and U of the baseline alone, [N].
        targets: the explained classes [N]; None for a utility without classes.
        layer: the target layer's name.
        evaluations: how many altered activations the head was run on.
    """

    values: Tensor
    standard_errors: Tensor
    players: str
    groups: Tensor
    grid: tuple[int, ...]
    full: Tensor
    empty: Tensor
    targets: Tensor | None
    layer: str
    evaluations: int

    def map(self) -> Tensor:
        """The values as a map [N, *grid]: a cell's value in equal parts to its positions, elements added up over channels.

        Raises:
            InputError: the players are channels, which lie nowhere.
        """
        if self.players == "channels":
            raise InputError("The players of this game are channels, which have no place in the image: there is no map.")
        groups = self.groups.flatten()
        shares = self.values / groups.bincount(minlength=self.values.shape[1])
        spread = shares[:, groups]
        if self.players == "elements":
            spread = spread.unflatten(1, self.groups.shape).sum(1)
        out: Tensor = spread.unflatten(1, self.grid)
        return out

    def agreement(self, explanation: Explanation) -> Agreement:
        """Compare an explanation's signed map with these values, which it approximates.

        The map is added up over the players: its cells, or all channels of a position. So the map must be an attribution: its
        sum over channels is of ``A·w`` in ShapleyCAM, ShapleyCAM-H, GradCAM and HiResCAM.

        Args:
            explanation: of the same images, classes and layer; the players of this game are positions or elements.

        Raises:
            InputError: several layers or classes, channels as players, or an explanation of another batch, class or layer.
        """
        if explanation.targets is not None and explanation.targets.ndim == 2:
            raise InputError("agreement() compares one class per image: explain with targets [N].")
        if self.players == "channels":
            raise InputError(
                "The players of the oracle are channels, but a map attributes to positions: use players='positions'."
            )
        raw = explanation.raw
        if raw.shape != (self.values.shape[0], *self.grid):
            raise InputError(f"The map is {tuple(raw.shape)}, but the oracle has {self.values.shape[0]} images of {self.grid}.")
        if explanation.diagnostics.layers != (self.layer,):
            raise InputError(f"The map is of layer {explanation.diagnostics.layers[0]!r}, but the oracle is of {self.layer!r}.")
        ours, theirs = (None if t is None else t.tolist() for t in (explanation.targets, self.targets))
        if ours != theirs:
            raise InputError(f"The map explains the classes {ours}, but the oracle {theirs}: give both the same targets.")
        flat, values = raw.flatten(1).double(), self.values
        if self.players == "elements":
            values = self.map().flatten(1)
        else:
            flat = torch.zeros_like(values).index_add_(1, self.groups, flat)
        return Agreement(
            pearson=_correlation(flat, values),
            spearman=_correlation(_ranks(flat), _ranks(values)),
            relative_error=(flat - values).norm(dim=1) / values.norm(dim=1),
            efficiency_gap=flat.sum(1) - (self.full - self.empty),
        )


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    out: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return out


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the rows, equal values sharing their mean."""
    below = (values[:, None, :] < values[:, :, None]).sum(2)
    equal = (values[:, None, :] == values[:, :, None]).sum(2)
    return (below + (equal - 1) / 2).to(values.dtype)
