"""Utilities: the scalar per image whose Shapley values are explained, and the classes it is asked for."""

from ..ops.coefficients import Coefficients
from .named import UTILITIES, Utility, UtilityFunction, evaluate, get_utility

__all__ = ["UTILITIES", "Coefficients", "Utility", "UtilityFunction", "evaluate", "get_utility"]
