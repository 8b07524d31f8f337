"""The attribution methods: their table, and the sources of weights that need no derivative."""

from .table import METHODS, PAPER_METHODS, Method, get_method

__all__ = ["METHODS", "PAPER_METHODS", "Method", "get_method"]
