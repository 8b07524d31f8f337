"""The explanation service: a batcher, a service around it, and the HTTP server over both (``shapleycam serve``)."""

from .batching import Batcher, BatcherError, DeadlinePassed, OutOfMemory, Overloaded, Slot, Stopped, Watch
from .onnx_runtime import OnnxRuntime
from .pictures import BadImage
from .program_runtime import ProgramRuntime
from .runtime import ExplainerRuntime, Maps, Question, Runtime
from .service import Answer, Service
from .tuning import tune

__all__ = [
    "Answer",
    "BadImage",
    "Batcher",
    "BatcherError",
    "DeadlinePassed",
    "ExplainerRuntime",
    "Maps",
    "OnnxRuntime",
    "OutOfMemory",
    "Overloaded",
    "ProgramRuntime",
    "Question",
    "Runtime",
    "Service",
    "Slot",
    "Stopped",
    "Watch",
    "tune",
]
