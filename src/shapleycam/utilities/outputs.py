"""Where the logits are in what a model returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

#: "auto"; a key or attribute ("logits"); a position in a tuple or list; or a function of the outputs.
Output = str | int | Callable[[Any], Tensor]


def check_output(output: Any) -> Output:
    """``output`` if it can say where the logits are.

    Raises:
        InputError: it is neither a name, nor a position, nor a callable.
    """
    if isinstance(output, (str, int)) and not isinstance(output, bool):
        return output
    if callable(output) and not isinstance(output, type):
        function: Callable[[Any], Tensor] = output
        return function
    raise InputError(
        "output must be 'auto', a key or attribute of what the model returns ('logits'), a position in it (1), or a callable "
        f"(outputs) -> logits [N, K]; got {output!r}."
    )


def logits_of(outputs: Any, output: Output = "auto") -> Tensor | None:
    """The logits in what a model returned.

    Args:
        outputs: what the model returned.
        output: where they are; "auto" takes the tensor itself, ``.logits``, ``["logits"]`` or ``["out"]``, or the first of
            a tuple or list, and gives None where there is no tensor.

    Raises:
        InputError: there is no tensor at the place that was named.
    """
    if output != "auto":
        return _named(outputs, output)
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, dict):
        found = outputs.get("logits", outputs.get("out"))
    else:
        found = getattr(outputs, "logits", None)
        if found is None and isinstance(outputs, (tuple, list)) and outputs:
            found = outputs[0]
    return found if isinstance(found, Tensor) else None


def _named(outputs: Any, output: Output) -> Tensor:
    found: Any = None
    if callable(output):
        found = output(outputs)
    elif isinstance(output, int):
        # The rows of a tensor are images, and no parts of the outputs.
        if isinstance(outputs, (tuple, list)) and -len(outputs) <= output < len(outputs):
            found = outputs[output]
    elif isinstance(outputs, dict):
        found = outputs.get(output)
    else:
        found = getattr(outputs, output, None)
    if not isinstance(found, Tensor):
        raise InputError(
            f"output={output!r} should give the logits, but it gave {type(found).__name__} where the model returned "
            f"{_describe(outputs)}."
        )
    return found


def _describe(outputs: Any) -> str:
    if isinstance(outputs, Tensor):
        return f"one tensor [{', '.join(map(str, ('N', *outputs.shape[1:])))}]"
    if isinstance(outputs, dict):
        return f"a mapping with {', '.join(map(repr, outputs))}"
    if isinstance(outputs, (tuple, list)):
        return f"a {type(outputs).__name__} of {len(outputs)}: {', '.join(type(part).__name__ for part in outputs)}"
    return f"a {type(outputs).__name__}"


def flat(logits: Tensor) -> Tensor:
    """Logits [N, K, 1, 1], of a classifier that ends in a convolution, as [N, K]; others as they are."""
    return logits.flatten(1) if logits.ndim > 2 and logits.shape[2:].numel() == 1 else logits


def are_probabilities(logits: Tensor | None) -> bool:
    """Whether ``logits`` [N, K] are probabilities: no entry is negative, every row sums to 1. Waits for the device."""
    if logits is None or logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        return False
    p = logits.detach().double()
    tolerance = max(4 * torch.finfo(logits.dtype).eps, 1e-5)
    return bool(((p >= 0).all(1) & ((p.sum(1) - 1).abs() <= tolerance)).all())


def probability_note(outputs: Any, logits: Tensor | None, utility: str) -> str | None:
    """What to warn of where a utility of logits would be given probabilities; None if it would not."""
    if logits is None or not are_probabilities(logits):
        return None
    advice = (
        "Return the logits instead, or say where they are with output=. For a model that has none, output=lambda p: p.log() "
        "restores them up to a constant per image."
    )
    place = _softmax_source(outputs, logits)
    if place is not None:
        advice = f"The logits are its part {place!r}: use output={place!r}."
    return (
        f"The model returns probabilities where logits are expected (no entry is negative and every row sums to 1), so utility "
        f"{utility!r} takes the softmax of a softmax and its maps are wrong. {advice} If they are logits nevertheless, say so "
        "with output=lambda z: z."
    )


def _softmax_source(outputs: Any, p: Tensor) -> str | int | None:
    """The key or position of the tensor in ``outputs`` whose softmax ``p`` is."""
    if isinstance(outputs, dict):
        parts: list[tuple[Any, Any]] = list(outputs.items())
    elif isinstance(outputs, (tuple, list)):
        parts = list(enumerate(outputs))
    else:
        return None
    tolerance = max(64 * torch.finfo(p.dtype).eps, 1e-4)
    for place, part in parts:
        if not isinstance(part, Tensor) or part.shape != p.shape or not part.is_floating_point() or are_probabilities(part):
            continue
        if torch.allclose(part.detach().double().softmax(1), p.detach().double(), rtol=0, atol=tolerance):
            found: str | int = place
            return found
    return None
