"""What an error of a model means for a batcher."""

from __future__ import annotations

import re

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at a time may go well: PyTorch's errors for a device and for the host, ONNX Runtime's, and Python's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return bool(_of_an_engine(error) and _MEMORY.search(str(error)))


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost for this process: after an error inside a kernel every later call fails too."""
    lost = getattr(torch, "AcceleratorError", None)
    found = (lost is not None and isinstance(error, lost)) or (_of_an_engine(error) and _LOST.search(str(error)))
    return bool(found) and not is_out_of_memory(error)


def _of_an_engine(error: BaseException) -> bool:
    """ONNX Runtime's errors derive from Exception alone."""
    return isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime.")


_MEMORY = re.compile("out of memory|can't allocate memory|Failed to allocate memory|bad_alloc|STATUS_ALLOC_FAILED")
#: ONNX Runtime says "CUDA failure 700: …"; both hand on what cuBLAS and cuDNN say after an error inside a kernel.
_LOST = re.compile(r"CUDA failure \d+|(CUBLAS|CUDNN)_STATUS_(EXECUTION_FAILED|MAPPING_ERROR)")


def free_memory() -> None:
    """Give cached blocks back to the device, so that another size of batch finds room."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
