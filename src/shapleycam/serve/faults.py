"""What an error of a model means for a batcher."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at a time may go well: PyTorch's errors for a device and for the host, ONNX Runtime's, and Python's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        part in text for part in ("out of memory", "can't allocate memory", "Failed to allocate memory", "bad_alloc")
    )


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost for this process: after an error inside a kernel every later call fails too."""
    lost = getattr(torch, "AcceleratorError", None)
    return lost is not None and isinstance(error, lost) and not is_out_of_memory(error)


def free_memory() -> None:
    """Give cached blocks back to the device, so that another size of batch finds room."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
