"""The game behind the maps: Shapley values of the content of a target layer, exact and estimated.

In the Content Reserved Game of arXiv 2501.06261 (section 3) the players are parts of the target layer's output ``A``. A
coalition keeps its members' activations and sets the rest to a baseline; it is worth the utility of the class that is
explained. CAMs approximate the Shapley values of this game from derivatives at ``A``; here the game itself is played, on the
head alone, so that the approximation can be judged.

    game = Game(explainer, images, cells=(4, 4))
    oracle = game.exact()
    oracle.agreement(explainer(images)).pearson
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..derivatives.path import background
from ..errors import InputError
from ..explainer import Explainer
from ..model.head import Head, rows_per_pass
from ..model.layouts import Layout
from ..utilities.named import evaluate
from ..utilities.targets import as_targets, place_targets
from .values import ShapleyValues

PLAYERS = ("positions", "channels", "elements")
#: More players than this have more than 65536 coalitions.
MOST_EXACT = 16
# Coalitions that are written down at once, in players: a bound on memory.
_MOST_FLAGS = 1 << 22


class Game:
    """The Content Reserved Game of a batch, on one target layer.

    Args:
        explainer: whose model, target layer, layout and utility are used.
        images, targets: as for :meth:`Explainer.__call__`, with one class per image.
        players: "positions", "channels", or "elements" (a channel at a position).
        cells: pools neighbours into fewer players: a grid such as (4, 4) for positions, a number for channels.
        baseline: what absent players show: "zero"; "mean", each channel's mean over the positions of its image; or a tensor
            that broadcasts to the activations as [N, C, S].
        chunk: how many altered activations go through the head at once; None for a number that fits into memory.
        args, kwargs: what the model takes besides the images, as for :meth:`Explainer.__call__`. Every coalition then runs
            the whole model, for they may reach the head past the layer.

    Raises:
        InputError: an unknown kind of player or baseline, cells that do not fit, several target layers or several classes.
        Otherwise as :meth:`Explainer.__call__`.
    """

    def __init__(
        self,
        explainer: Explainer,
        images: Tensor,
        targets: Any = None,
        *,
        players: str = "positions",
        cells: Sequence[int] | int | None = None,
        baseline: str | Tensor = "zero",
        chunk: int | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if players not in PLAYERS:
            raise InputError(f"Unknown players {players!r}: expected one of {', '.join(PLAYERS)}.")
        if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
            raise InputError(f"chunk must be a positive number of rows, or None, got {chunk!r}.")
        plan = explainer.prepare(images, targets, args=args, kwargs=kwargs)
        if len(plan.layers) != 1:
            raise InputError(f"The game is played on one target layer; the explainer has {len(plan.layers)}.")
        self.players, self._chunk, self._utility = players, chunk, explainer.utility
        inputs = explainer.inputs(images.detach(), args, kwargs)
        self._head = Head(explainer.model, plan.layers[0], inputs)
        self._layer, module = plan.layers[0]
        self._layout: Layout = explainer.layout_of(self._layer, module, self._head.activations, images)
        self._activations = self._layout.view(self._head.activations)  # [N, C, S]
        self.batch = images.shape[0]
        placed, self._nan_mark = place_targets(
            as_targets(targets), self._utility.logits_of(self._head.outputs), self.batch, images.device
        )
        if placed is not None and placed.shape[1] != 1:
            raise InputError(f"The game explains one class per image, got {placed.shape[1]}. Play one game for each.")
        self.targets = None if placed is None else placed[:, 0]
        self._groups = self._group(cells)
        #: the number of players
        self.count = int(self._groups.max()) + 1
        self._baseline = background(baseline, self._activations).expand_as(self._activations)
        self.evaluations = 0

    def worth(self, coalitions: Tensor) -> Tensor:
        """What coalitions are worth: U of their content, for every image.

        Args:
            coalitions: bool [Q, P] (the same for every image) or [N, Q, P]; true is present.

        Returns:
            [N, Q], float64.
        """
        if coalitions.ndim == 2:
            coalitions = coalitions.expand(self.batch, *coalitions.shape)
        if coalitions.dtype != torch.bool or coalitions.shape[::2] != (self.batch, self.count):
            raise InputError(
                f"coalitions must be bool [Q, {self.count}] or [{self.batch}, Q, {self.count}], got {coalitions.dtype} "
                f"{tuple(coalitions.shape)}."
            )
        asked = coalitions.shape[1]
        device = self._activations.device
        rows = torch.arange(self.batch, device=device).repeat_interleave(asked)
        flat = coalitions.reshape(-1, self.count).to(device)
        size = rows_per_pass(self._head.activations[0], self._chunk)
        self.evaluations += rows.shape[0]
        if not rows.shape[0]:
            return torch.zeros(self.batch, asked, dtype=torch.float64, device=device)
        parts = zip(rows.split(size), flat.split(size), strict=True)
        out: Tensor = torch.cat([self._ask(*part) for part in parts]).unflatten(0, (self.batch, asked))
        return out

    def exact(self) -> ShapleyValues:
        """The Shapley values by all 2^P coalitions.

        Raises:
            InputError: more than 16 players; use ``cells``, or an estimator.
        """
        p = self.count
        if p > MOST_EXACT:
            raise InputError(
                f"Exact Shapley values of {p} players need 2^{p} coalitions; at most {MOST_EXACT} players are possible. "
                "Pool them with cells=, or use permutations() or regression()."
            )
        device = self._activations.device
        number = torch.arange(2**p, device=device)
        present = (number[:, None] >> torch.arange(p, device=device)) & 1 == 1  # [Q, P]
        worth = self.worth(present)
        size = present.sum(1)
        orders = [math.factorial(s) * math.factorial(p - s - 1) / math.factorial(p) for s in range(p)]
        share = torch.tensor(orders, dtype=torch.float64, device=device)
        # A coalition counts for its members as one they have joined, against the others as one they have not.
        joined, missing = share[(size - 1).clamp_min(0)], share[size.clamp_max(p - 1)]
        weights = torch.where(present, joined[:, None], -missing[:, None])  # [Q, P]
        return self._paid(worth @ weights, torch.zeros(self.batch, p, device=device), worth[:, -1], worth[:, 0])

    def permutations(self, samples: int, *, antithetic: bool = True, generator: torch.Generator | None = None) -> ShapleyValues:
        """Unbiased estimates: the players join in random order, and each is paid what it adds.

        Args:
            samples: number of random orders, at least 2. An order costs P - 1 evaluations, an antithetic pair twice that.
            antithetic: take every order backwards too (Mitchell et al., 2022), which cancels much of the noise.
            generator: of the random numbers, on the CPU; None for one seeded with 0.
        """
        self._enough(samples)
        generator = generator or torch.Generator().manual_seed(0)
        empty, full = self._ends()
        together = max(1, _MOST_FLAGS // self.count**2)

        def each() -> Iterator[Tensor]:
            for start in range(0, samples, together):
                count = min(together, samples - start)
                orders = torch.stack([torch.randperm(self.count, generator=generator) for _ in range(count)])
                paid = self._joining(orders, empty, full)
                yield from ((paid + self._joining(orders.flip(1), empty, full)) / 2 if antithetic else paid).unbind(1)

        mean, error = _mean_and_error(each())
        return self._paid(mean, error, full, empty)

    def regression(self, samples: int, *, generator: torch.Generator | None = None) -> ShapleyValues:
        """Unbiased KernelSHAP (Covert and Lee, AISTATS 2021): least squares under the efficiency axiom, which holds exactly.

        Args:
            samples: number of random coalitions, each taken with its complement, at least 2; two evaluations each.
            generator: of the random numbers, on the CPU; None for one seeded with 0.
        """
        self._enough(samples)
        p = self.count
        empty, full = self._ends()
        if p == 1:
            return self._paid((full - empty)[:, None], torch.zeros_like(full)[:, None], full, empty)
        generator = generator or torch.Generator().manual_seed(0)
        sizes = torch.arange(1, p, dtype=torch.float64)
        chances = 1 / (sizes * (p - sizes))
        together = float(((sizes - 1) / (p - sizes)).sum() / chances.sum()) / (p * (p - 1))  # E[z_i z_j]; E[z_i] is 1/2
        size = torch.multinomial(chances, samples, replacement=True, generator=generator) + 1
        rank = torch.rand(samples, p, generator=generator).argsort(1).argsort(1)
        present = rank < size[:, None]  # [Q, P]
        step = max(1, _MOST_FLAGS // p)

        def each() -> Iterator[Tensor]:
            for part in present.split(step):
                worth = self.worth(torch.cat((part, ~part)))
                kept = part.to(worth.device)
                with_, without = worth.chunk(2, 1)
                # The constraint takes the mean over the players away, and with it everything that is common to them.
                moment = torch.where(kept[None], with_[:, :, None], without[:, :, None]) / 2  # [N, Q, P]
                yield from ((moment - moment.mean(2, keepdim=True)) / (0.5 - together)).unbind(1)

        mean, error = _mean_and_error(each())
        return self._paid(mean + ((full - empty) / p)[:, None], error, full, empty)

    # ------------------------------------------------------------------------------------------------------- inside

    def _ask(self, rows: Tensor, present: Tensor) -> Tensor:
        keep = present[:, self._groups.flatten()]
        keep = {"positions": keep[:, None, :], "channels": keep[:, :, None]}.get(
            self.players, keep.unflatten(1, self._groups.shape)
        )
        altered = self._head.activations[rows].contiguous()
        self._layout.view(altered).copy_(torch.where(keep, self._activations[rows], self._baseline[rows]))
        outputs = self._head(altered, rows)
        targets = None if self.targets is None else self.targets[rows]
        value = evaluate(self._utility.rows(rows), outputs, self._utility.logits_of(outputs), targets, rows.shape[0])
        worth: Tensor = value.detach().double()
        return worth if self._nan_mark is None else worth + self._nan_mark[rows]

    def _ends(self) -> tuple[Tensor, Tensor]:
        everything = torch.ones(2, self.count, dtype=torch.bool)
        everything[0] = False
        worth = self.worth(everything)
        return worth[:, 0], worth[:, 1]

    def _joining(self, orders: Tensor, empty: Tensor, full: Tensor) -> Tensor:
        """What every player adds when it joins, [N, T, P], for T orders [T, P]."""
        count, p = orders.shape
        places = orders.argsort(1)
        # The coalitions that an order passes through are a triangle; some of its rows at a time.
        sizes = torch.arange(1, p).split(max(1, _MOST_FLAGS // (count * p)))
        between = [self.worth((places[:, None] < part[:, None]).flatten(0, 1)).unflatten(1, (count, -1)) for part in sizes]
        ends = [end[:, None, None].expand(-1, count, 1) for end in (empty, full)]
        worth = torch.cat([ends[0], *between, ends[1]], 2)  # [N, T, P + 1]
        return (worth[:, :, 1:] - worth[:, :, :-1]).gather(2, places.to(worth.device).expand(self.batch, -1, -1))

    def _paid(self, values: Tensor, errors: Tensor, full: Tensor, empty: Tensor) -> ShapleyValues:
        return ShapleyValues(
            values,
            errors.double(),
            self.players,
            self._groups,
            self._layout.grid,
            full,
            empty,
            self.targets,
            self._layer,
            self.evaluations,
        )

    def _enough(self, samples: int) -> None:
        if not isinstance(samples, int) or samples < 2:
            raise InputError(f"samples must be at least 2, or there is no standard error; got {samples!r}.")

    def _group(self, cells: Sequence[int] | int | None) -> Tensor:
        _, channels, positions = self._activations.shape
        device = self._activations.device
        if self.players == "elements":
            if cells is not None:
                raise InputError("cells= pools positions or channels; with players='elements' there is nothing to pool.")
            return torch.arange(channels * positions, device=device).view(channels, positions)
        if self.players == "channels":
            wanted = channels if cells is None else cells
            if not isinstance(wanted, int) or not 1 <= wanted <= channels:
                raise InputError(f"cells must be a number of 1 to {channels} groups of channels, got {cells!r}.")
            return torch.arange(channels, device=device) * wanted // channels
        grid = self._layout.grid
        pooled = grid if cells is None else (cells,) * len(grid) if isinstance(cells, int) else tuple(cells)
        if len(pooled) != len(grid) or any(
            not isinstance(c, int) or not 1 <= c <= g for c, g in zip(pooled, grid, strict=False)
        ):
            raise InputError(f"cells must be {len(grid)} numbers from 1 up to the layer's grid {grid}, got {cells!r}.")
        group = torch.zeros((), dtype=torch.int64, device=device)
        for c, g in zip(pooled, grid, strict=True):
            group = group[..., None] * c + torch.arange(g, device=device) * c // g
        return group.flatten()


def _mean_and_error(samples: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of equally distributed tensors and its standard error, in one pass (Welford)."""
    first = next(samples)
    mean, squares, count = first.clone(), torch.zeros_like(first), 1
    for sample in samples:
        count += 1
        step = sample - mean
        mean += step / count
        squares += step * (sample - mean)
    return mean, (squares / (count - 1) / count).sqrt()
