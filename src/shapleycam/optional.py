"""Packages that may be missing: what an extra installs is imported where it is used, or refused in one line."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import InputError


def need(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Raises:
        InputError: it is not installed; the message says which extra has it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'shapleycam[{extra}]'") from error
    except (ImportError, RuntimeError, OSError) as error:
        import torch

        raise InputError(
            f"{module} does not load ({error}). torch {torch.__version__} and {module} must be releases that belong "
            f"together: pip install --upgrade 'shapleycam[{extra}]'"
        ) from error
