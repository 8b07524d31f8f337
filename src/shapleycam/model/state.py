"""The state a model must be in: which of its modules the mode matters to, and what no explanation can be made of."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..errors import DerivativeError, LayerError, ModelStateError

#: torch's own modules that compute something else in training mode. Every other module of torch is indifferent to its mode,
#: containers, wrappers (DataParallel, DistributedDataParallel) and graphs among them; a module of anyone else may do anything.
_MODAL = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.RNNBase,
    nn.MultiheadAttention,
    torch.nn.utils.parametrizations._SpectralNorm,
)
_FAKE_QUANTIZED = ("torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat")
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torchao.")

_training = attrgetter("training")


def _kind(module: nn.Module) -> type:
    """The class of a module as it was before torch.nn.utils.parametrize put a class of its own in its place."""
    kind = type(module)
    return (
        kind.__mro__[1]
        if kind.__module__ == "torch.nn.utils.parametrize" and kind.__name__.startswith("Parametrized")
        else kind
    )


def _watched(module: nn.Module) -> bool:
    """Whether the mode can matter to a module, whatever its settings."""
    where = _kind(module).__module__
    return not f"{where}.".startswith("torch.") or isinstance(module, _MODAL) or where.startswith(_FAKE_QUANTIZED)


def mode_dependent(module: nn.Module) -> bool:
    """Whether training mode may change what a module computes; a module that is not torch's own may do anything."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and _kind(module).__module__.startswith("torch.nn.modules"):
        return module.dropout > 0
    return _watched(module)


def _flat(tables: list[dict[str, nn.Module | None]]) -> list[nn.Module | None]:
    return list(chain.from_iterable(map(dict.values, filter(None, tables))))


class _Tree(NamedTuple):
    tables: list[dict[str, nn.Module | None]]  # every module's own table of its children, live
    children: list[nn.Module | None]  # what was in all of them, in their order
    watched: list[nn.Module]


class ModeCheck:
    """Refuses a model of which a part that the mode matters to is in training mode.

    The tree of modules is walked once. A call compares the children of every module with what was seen then (by identity,
    without a walk in Python) and walks again where the tree has changed, so a dropout that was added later is not missed.

    Args:
        model: the user's model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tree = self._walk()

    def check(self) -> bool:
        """Whether the tree of modules has changed since it was last looked at.

        Raises:
            ModelStateError: names the modules that are in training mode.
        """
        tree = self._tree
        now = _flat(tree.tables)
        changed = len(now) != len(tree.children) or not all(map(is_, now, tree.children))
        if changed:
            self._tree = tree = self._walk()
        if any(map(_training, tree.watched)):
            refuse_training(self._model)
        return changed

    def _walk(self) -> _Tree:
        modules = list(self._model.modules())
        tables = [module._modules for module in modules if isinstance(module._modules, dict)]  # scripted ones do not change
        return _Tree(tables, _flat(tables), [module for module in modules if _watched(module)])


def refuse_training(model: nn.Module) -> None:
    """Look at every module's mode.

    Raises:
        ModelStateError: names the modules that are in training mode and depend on it.
    """
    training = [
        name or type(module).__name__ for name, module in model.named_modules() if module.training and mode_dependent(module)
    ]
    if training:
        raise ModelStateError(
            f"The model is in training mode ({', '.join(training[:3])}{', …' if len(training) > 3 else ''}): batch norm "
            "and dropout would make the maps wrong. Call model.eval() first; the explainer leaves the mode to you."
        )


def refuse_frozen(model: nn.Module) -> None:
    """Refuse what runs its layers where no hook sees them.

    Raises:
        ModelStateError: a scripted or traced model, or a graph that calls no modules (``torch.export``).
    """
    if isinstance(model, torch.jit.ScriptModule):
        how = "traced" if isinstance(model, torch.jit._trace.TopLevelTracedModule) else "scripted"
        raise ModelStateError(
            f"The model is {how} (torch.jit), and its layers run where no hook sees them. Pass the original nn.Module."
        )
    if isinstance(model, fx.GraphModule) and not _calls_modules(model):
        raise ModelStateError(
            "The model is one flat graph that calls no modules (as ExportedProgram.module() is), so it has no layers to "
            "explain. Pass the original nn.Module, or torch.export.unflatten(program)."
        )


def _calls_modules(model: fx.GraphModule) -> bool:
    called = [model.get_submodule(str(node.target)) for node in model.graph.nodes if node.op == "call_module"]
    return any(not type(module).__module__.startswith("torch.export.") for module in called)  # its guards are modules


def blame_state(model: nn.Module, error: Exception) -> None:
    """Name the model's state as the reason why an explanation failed, where it is; else return.

    Raises:
        ModelStateError: the model has quantised layers, scripted parts, or weights that were made in inference mode, which
            explain the error.
    """
    reason = None
    if isinstance(error, (LayerError, DerivativeError)):
        reason = _quantized(model) or _scripted(model)
    elif "nference tensor" in str(error):
        reason = _made_in_inference_mode(model)
    if reason is not None:
        raise ModelStateError(reason) from error


def _quantized(model: nn.Module) -> str | None:
    found = ((name, module) for name, module in model.named_modules() if type(module).__module__.startswith(_QUANTIZED))
    names = [name or type(module).__name__ for name, module in found if not name.endswith("_packed_params")]
    if not names:
        return None
    return (
        f"The model has quantised layers ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}), through which PyTorch "
        "takes no derivatives. Explain the floating-point model, or use method='ablationcam' and name a layer."
    )


def _scripted(model: nn.Module) -> str | None:
    names = [name for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if not names:
        return None
    return (
        f"The model's part {names[0]!r} is scripted or traced (torch.jit), and its layers run where no hook sees them. "
        "Pass the model with the original module in its place, or name a layer outside of it."
    )


def _made_in_inference_mode(model: nn.Module) -> str | None:
    tensors: Iterator[tuple[str, Tensor]] = chain(model.named_parameters(), model.named_buffers())
    name = next((name for name, tensor in tensors if tensor.is_inference()), None)
    if name is None:
        return None
    return (
        f"{name!r} was made under torch.inference_mode, so PyTorch takes no derivatives with it. Build or load the model "
        "outside of that mode (with torch.inference_mode(False): ...), or outside of it replace its tensors by clones."
    )
