"""The layers a caller names, and what a model says of its own tokens."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import LayerError

LayerSpec = str | nn.Module


def named_layers(model: nn.Module, wanted: LayerSpec | Sequence[LayerSpec]) -> list[tuple[str, nn.Module]]:
    """(name, module) of each layer the caller named, as a module, a dotted name ("layer4.2", "layer4[-1]") or a list.

    Raises:
        LayerError: no such layer (the nearest names are suggested), a module from elsewhere, or one named twice.
    """
    specs: Iterable[Any] = wanted if isinstance(wanted, (list, tuple)) else [wanted]
    modules = dict(model.named_modules())
    found: list[tuple[str, nn.Module]] = []
    for spec in specs:
        if isinstance(spec, nn.Module):
            name = next((name for name, module in modules.items() if module is spec), None)
            if name is None:
                raise LayerError(
                    f"The layer {type(spec).__name__} given is not part of the model {type(model).__name__}. "
                    "Take it from the very model that is explained (a copy or a compiled model has other modules)."
                )
            found.append((name, spec))
        elif isinstance(spec, str):
            found.append(_by_name(modules, spec))
        else:
            raise LayerError(f"layer must be 'auto', a module, a dotted name or a list of them, got {spec!r}.")
    if not found:
        raise LayerError("layer is an empty list: name at least one layer, or use layer='auto'.")
    if len({id(module) for _, module in found}) != len(found):
        raise LayerError(f"A layer is named twice in {[name for name, _ in found]}: name each layer once.")
    return found


def _by_name(modules: dict[str, nn.Module], spec: str) -> tuple[str, nn.Module]:
    if spec in modules:
        return spec, modules[spec]
    dotted = spec.replace("[", ".").replace("]", "")
    parts = dotted.split(".")
    module, name = modules[""], ""
    for part in parts:
        children = dict(module.named_children())
        if (
            part.lstrip("-").isdigit()
            and part not in children
            and -len(children) <= int(part) < len(children)
            and str(int(part)) == part
        ):
            part = list(children)[int(part)]
        if part not in children:
            near = difflib.get_close_matches(dotted, modules, n=4, cutoff=0.5) or [n for n in modules if n][-4:]
            raise LayerError(f"No layer {spec!r} in {type(modules['']).__name__}. Nearest: {', '.join(map(repr, near))}.")
        module, name = children[part], f"{name}.{part}".lstrip(".")
    return name, module


def token_facts(model: nn.Module) -> tuple[int | None, tuple[int, ...] | None]:
    """What a model says of its tokens: how many leading ones are not patches, and the patch size."""
    prefix = getattr(model, "num_prefix_tokens", None)
    if not isinstance(prefix, int):
        # torchvision's VisionTransformer keeps its class token as a parameter.
        prefix = 1 if isinstance(getattr(model, "class_token", None), Tensor) else None
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and module.stride == module.kernel_size and module.stride[0] > 1:
            return prefix, tuple(module.stride)
    return prefix, None


def token_suffix(model: nn.Module) -> int | None:
    """How many trailing tokens are no patches, where the model says so: the detection tokens of YOLOS; else None."""
    count = getattr(getattr(model, "config", None), "num_detection_tokens", None)
    return count if isinstance(count, int) else None
