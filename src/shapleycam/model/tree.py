"""The tree of a model's modules, and whether it is still the one that was studied."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter

from torch import nn

_training = attrgetter("training")
_children = attrgetter("_modules")


class ModuleTree:
    """A record of which module stands where, compared in a few microseconds per call.

    Replacing, adding or removing a module anywhere changes it; new weights in the same modules do not. What a module
    computes is not looked at.

    Attributes:
        modal: (name, module) of the modules whose computation may depend on training mode.
    """

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules())
        self.modal = tuple((name or type(module).__name__, module) for name, module in named if _depends_on_mode(module))
        self._modal = [module for _, module in self.modal]
        modules = [module for _, module in named]
        # Modules of the trunk without children cannot be told from those that will get some, so all are kept.
        self._parents = modules
        self._children = self._now()
        self._types = list(map(type, modules))

    def _now(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, map(_children, self._parents))))

    @property
    def changed(self) -> bool:
        """Whether a module was replaced, added, removed, or became one of another class (as parametrisations do)."""
        # Lists compare their items by identity first.
        return self._now() != self._children or list(map(type, self._parents)) != self._types

    @property
    def training(self) -> list[str]:
        """The names of modules in training mode that depend on it."""
        if not any(map(_training, self._modal)):
            return []
        return [name for name, module in self.modal if module.training]


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether training mode may change what a module computes; a module that is not torch's own may do anything."""
    if not type(module).__module__.startswith("torch.nn.modules"):
        return True
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU, nn.RNNBase)) or (
        isinstance(module, nn.MultiheadAttention) and module.dropout > 0
    )
