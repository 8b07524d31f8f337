"""The game: against its definition by brute force, against literal values, and against the axioms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from shapleycam import Explainer, InputError
from shapleycam.shapley import Game
from shapleycam.shapley import game as game_module


class Curved(nn.Module):
    """A trunk whose output is the target layer, and a head with curvature: tanh, then a linear layer."""

    def __init__(self, channels: int = 2, side: int = 2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Conv2d(3, channels, 4, stride=4)
        self.mix, self.linear = nn.Linear(channels * side * side, 5), nn.Linear(5, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))

    def head(self, a: Tensor) -> Tensor:
        out: Tensor = self.linear(torch.tanh(2 * self.mix(a.flatten(1))))
        return out


@pytest.fixture(name="images")
def _images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_definition(worth, players: int) -> list[float]:
    """Shapley values of one game from all coalitions, as the textbook writes them."""
    values = []
    for i in range(players):
        others = [j for j in range(players) if j != i]
        value = 0.0
        for size in range(players):
            share = math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)
            for members in itertools.combinations(others, size):
                value += share * (worth({*members, i}) - worth(set(members)))
        values.append(value)
    return values


def rest(z: Tensor, c: int) -> float:
    z = z.detach()
    return float(z[0, c] + z.log_softmax(1)[0, c])


@pytest.mark.parametrize("players", ["positions", "channels", "elements"])
@pytest.mark.parametrize("baseline", ["zero", "mean", "tensor"])
def test_exact_values_are_the_definition(players: str, baseline: str, images: Tensor) -> None:
    net = Curved().eval()
    a = net.layer(images).detach()  # [2, 2, 2, 2]
    ground = {"zero": torch.zeros_like(a), "mean": a.mean((2, 3), keepdim=True).expand_as(a), "tensor": torch.full_like(a, 0.3)}
    given = torch.full((2, 1), 0.3, dtype=torch.float64) if baseline == "tensor" else baseline
    game = Game(Explainer(net, "layer"), images, [1, 3], players=players, baseline=given, chunk=5)
    found = game.exact()
    count = {"positions": 4, "channels": 2, "elements": 8}[players]
    assert found.values.shape == (2, count) and not found.standard_errors.any()
    for n, c in ((0, 1), (1, 3)):

        def worth(members: set[int], n: int = n, c: int = c) -> float:
            mixed = ground[baseline][n : n + 1].clone()
            for k, y, x in itertools.product(range(2), repeat=3):
                player = {"positions": 2 * y + x, "channels": k, "elements": 4 * k + 2 * y + x}[players]
                if player in members:
                    mixed[0, k, y, x] = a[n, k, y, x]
            return rest(net.head(mixed), c)

        torch.testing.assert_close(found.values[n], torch.tensor(by_definition(worth, count)).double(), rtol=1e-6, atol=1e-9)
        assert float(found.full[n]) == pytest.approx(worth(set(range(count))), abs=1e-10)
        assert float(found.empty[n]) == pytest.approx(worth(set()), abs=1e-10)
        # Efficiency, to the digits of float64.
        assert float(found.values[n].sum()) == pytest.approx(float(found.full[n] - found.empty[n]), abs=1e-10)


class Toy(nn.Module):
    """A target layer that passes a 1 x 3 image on, and a utility made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out.flatten(2)[:, 0]


def test_the_glove_game() -> None:
    """Players 0 and 1 hold a left glove, player 2 a right one; a pair is worth 1. Known values: 1/6, 1/6, 2/3."""

    def pairs(out: Tensor, targets: Tensor | None) -> Tensor:
        return torch.minimum(out[:, :2].amax(1), out[:, 2])

    game = Game(
        Explainer(Toy().eval(), "layer", layout="NCHW", method="gradcam", utility=pairs),
        torch.ones(1, 1, 1, 3),
        cells=(1, 3),
    )
    torch.testing.assert_close(game.exact().values, torch.tensor([[1 / 6, 1 / 6, 2 / 3]]).double())
    for estimate in (game.permutations(300), game.regression(600)):
        assert ((estimate.values - game.exact().values).abs() <= 4 * estimate.standard_errors + 1e-12).all()
        assert float(estimate.values.sum()) == pytest.approx(1.0, abs=1e-9)


def test_symmetry_dummy_and_linearity() -> None:
    a = torch.tensor([[[[1.5, 1.5, 2.0]]]])
    games = {
        "product": lambda out, _: out[:, 0] * out[:, 1],
        "square": lambda out, _: (out[:, 0] + out[:, 1]) ** 2,
    }
    games["sum"] = lambda out, t: games["product"](out, t) + 2 * games["square"](out, t)
    values = {}
    for name, utility in games.items():
        values[name] = Game(Explainer(Toy().eval(), "layer", layout="NCHW", utility=utility), a, cells=(1, 3)).exact().values[0]
        assert float(values[name][0]) == pytest.approx(float(values[name][1]))  # they play alike
        assert float(values[name][2]) == pytest.approx(0.0)  # and he not at all
    torch.testing.assert_close(values["sum"], values["product"] + 2 * values["square"])
    torch.testing.assert_close(values["product"], torch.tensor([1.125, 1.125, 0.0]).double())


def test_the_second_order_map_is_exact_for_a_quadratic_utility(images: Tensor) -> None:
    net = Curved().eval()

    def quadratic(out: Tensor, targets: Tensor | None) -> Tensor:
        return (out**2).sum(1) + out[:, 0]

    class Linear(Curved):
        def head(self, a: Tensor) -> Tensor:
            out: Tensor = self.linear(self.mix(a.flatten(1)))
            return out

    net = Linear().eval()
    with torch.no_grad():
        net.mix.bias.zero_()
        net.linear.bias.zero_()
    explainer = Explainer(net, "layer", method="shapleycam-h", utility=quadratic)
    oracle = Game(explainer, images, players="elements").exact()
    found = explainer(images).agreement(oracle)
    torch.testing.assert_close(explainer(images).raw.double(), oracle.map(), rtol=1e-9, atol=1e-10)
    assert float(found.relative_error.max()) < 1e-10 and float(found.efficiency_gap.abs().max()) < 1e-10
    torch.testing.assert_close(found.pearson, torch.ones(2).double())
    torch.testing.assert_close(found.spearman, torch.ones(2).double())
    # The first order is not: the test can fail.
    first = Explainer(net, "layer", method="hirescam", utility=quadratic)(images).agreement(oracle)
    assert float(first.relative_error.min()) > 0.05


@pytest.mark.parametrize("estimator", ["permutations", "plain", "regression"])
def test_estimates_are_unbiased_and_their_errors_honest(estimator: str, images: Tensor) -> None:
    """Over many seeds: the mean comes to the exact value, and (estimate - exact) / error has a variance near 1."""
    net = Curved(side=2).eval()
    game = Game(Explainer(net, "layer"), images[:1], [1], players="elements", chunk=4096)
    exact = game.exact().values
    scores, found = [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        if estimator == "regression":
            estimate = game.regression(120, generator=generator)
        else:
            estimate = game.permutations(60, antithetic=estimator == "permutations", generator=generator)
        found.append(estimate.values)
        scores.append((estimate.values - exact) / estimate.standard_errors)
        assert float((estimate.values.sum() - estimate.full + estimate.empty).abs()) < 1e-9
    spread = torch.cat(found)
    bias = (spread.mean(0) - exact[0]) / (spread.std(0) / 60**0.5)
    assert float(bias.abs().max()) < 4
    # 60 seeds x 8 players, which are correlated; errors off by a factor of 1.3 either way would show.
    assert 0.65 < float(torch.cat(scores).var()) < 1.5


def test_antithetic_orders_pay(images: Tensor) -> None:
    """The same number of evaluations, and less variance."""
    game = Game(Explainer(Curved().eval(), "layer"), images[:1], [1], players="elements", chunk=4096)
    pairs = torch.cat([game.permutations(10, generator=torch.Generator().manual_seed(s)).values for s in range(40)])
    plain = torch.cat(
        [game.permutations(20, antithetic=False, generator=torch.Generator().manual_seed(s)).values for s in range(40)]
    )
    assert float(pairs.var(0).sum()) < 0.7 * float(plain.var(0).sum())


def test_cells_pool_neighbours(images: Tensor) -> None:
    net = Curved(channels=3, side=2).eval()
    explainer = Explainer(net, "layer")
    rows = Game(explainer, images, [0, 0], cells=(2, 1)).exact()
    assert rows.values.shape == (2, 2) and rows.groups.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(rows.map()[:, :, 0], rows.map()[:, :, 1])
    torch.testing.assert_close(rows.map().sum((1, 2)), rows.values.sum(1))
    assert Game(explainer, images, players="channels", cells=2).exact().groups.tolist() == [0, 0, 1]
    whole = Game(explainer, images, cells=(1, 1))
    for single in (whole.exact(), whole.permutations(2), whole.regression(2)):
        torch.testing.assert_close(single.values[:, 0], single.full - single.empty)


def test_agreement_by_hand(images: Tensor) -> None:
    explainer = Explainer(Curved().eval(), "layer")
    oracle, explanation = Game(explainer, images).exact(), explainer(images)
    found = explanation.agreement(oracle)
    raw = explanation.raw.flatten(1).double()
    for n in range(2):
        both = torch.stack((raw[n], oracle.values[n]))
        assert float(found.pearson[n]) == pytest.approx(float(torch.corrcoef(both)[0, 1]))
        assert float(found.spearman[n]) == pytest.approx(float(torch.corrcoef(both.argsort(1).argsort(1).double())[0, 1]))
        error = (raw[n] - oracle.values[n]).norm() / oracle.values[n].norm()
        assert float(found.relative_error[n]) == pytest.approx(float(error))
    gap = raw.sum(1) - (oracle.full - oracle.empty)
    torch.testing.assert_close(found.efficiency_gap, gap)


def test_a_wrong_target_on_the_device_pays_nan(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only where the targets live on a GPU are they not checked at once; tests/gpu has them there.
    nan_for_one = torch.tensor([0.0, float("nan")])
    monkeypatch.setattr(game_module, "place_targets", lambda *_: (torch.tensor([[1], [3]]), nan_for_one))
    found = Game(Explainer(Curved().eval(), "layer"), images).exact()
    assert torch.isfinite(found.values[0]).all() and torch.isnan(found.values[1]).all() and torch.isnan(found.full[1])


def test_the_model_is_left_as_it_was(images: Tensor) -> None:
    net = Curved().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    game = Game(Explainer(net, "layer"), images)
    game.permutations(3)
    game.regression(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.layer._forward_hooks and all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert game.evaluations == 2 * (2 + 2 * 3 * 3) + 2 * (2 + 2 * 3)


def test_bad_input(images: Tensor) -> None:
    explainer = Explainer(Curved().eval(), "layer")
    for options, match in [
        ({"players": "pixels"}, "Unknown players 'pixels'"),
        ({"cells": (3, 2)}, r"up to the layer's grid \(2, 2\), got \(3, 2\)"),
        ({"cells": (2,)}, r"cells must be 2 numbers"),
        ({"players": "channels", "cells": 9}, "1 to 2 groups"),
        ({"players": "elements", "cells": 2}, "nothing to pool"),
        ({"baseline": "blur"}, "Unknown baseline 'blur'"),
        ({"baseline": torch.zeros(7)}, r"broadcast to the activations \[N, 2, 4\], .*; got \(7,\)"),
        ({"chunk": 0}, "chunk must be"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, "one class per image"),
    ]:
        with pytest.raises(InputError, match=match):
            Game(explainer, images, **options)  # type: ignore[arg-type]
    game = Game(Explainer(Curved(channels=5).eval(), "layer"), images, players="elements")
    with pytest.raises(InputError, match="20 players need 2\\^20 coalitions"):
        game.exact()
    with pytest.raises(InputError, match="samples must be at least 2"):
        game.permutations(1)
    with pytest.raises(InputError, match=r"coalitions must be bool \[Q, 20\]"):
        game.worth(torch.ones(3, 4, dtype=torch.bool))
    channels = Game(explainer, images, players="channels").exact()
    with pytest.raises(InputError, match="no place in the image"):
        channels.map()
    with pytest.raises(InputError, match="use players='positions'"):
        explainer(images).agreement(channels)
    with pytest.raises(InputError, match="oracle has 2 images"):
        explainer(images[:1]).agreement(Game(explainer, images).exact())
    with pytest.raises(InputError, match=r"classes \[1, 2\], but the oracle \[1, 3\]"):
        explainer(images, [1, 2]).agreement(Game(explainer, images, [1, 3]).exact())
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    two = nn.Sequential(nn.Conv2d(3, 2, 2), nn.Conv2d(2, 2, 2), *pool).double().eval()
    with pytest.raises(InputError, match="one target layer"):
        Game(Explainer(two, ["0", "1"]), images)
    same = nn.Sequential(nn.Conv2d(3, 2, 2), nn.Tanh(), *pool).double().eval()
    with pytest.raises(InputError, match="layer '1', but the oracle is of '0'"):
        Explainer(same, "1")(images).agreement(Game(Explainer(same, "0"), images, cells=2).exact())
