"""Where the logits are in what a model returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def logits_of(outputs: Any) -> Tensor | None:
    """The logits in what a model returned: the tensor itself, ``.logits``, ``["logits"]`` or ``["out"]``, or the first."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, dict):
        found = outputs.get("logits", outputs.get("out"))
    else:
        found = getattr(outputs, "logits", None)
        if found is None and isinstance(outputs, (tuple, list)) and outputs:
            found = outputs[0]
    return found if isinstance(found, Tensor) else None
