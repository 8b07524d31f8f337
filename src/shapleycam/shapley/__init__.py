"""The game behind the maps: Shapley values of the content of a target layer, exact and estimated."""

from ..derivatives.path import BASELINES
from .game import MOST_EXACT, PLAYERS, Game
from .values import Agreement, ShapleyValues

__all__ = ["BASELINES", "MOST_EXACT", "PLAYERS", "Agreement", "Game", "ShapleyValues"]
