"""What a format of artefacts is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor
from torch.export import ExportedProgram

from ..metadata import Metadata

#: An opened artefact: inputs by name to outputs in their order, on the CPU.
Run = Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]]


class Format(ABC):
    """One format; see the classes.

    Attributes:
        name: as users call it.
        suffix: of its files.
        runtimes: that this package opens it in; the first is the usual one.
    """

    name: str
    suffix: str
    runtimes: tuple[str, ...]

    @abstractmethod
    def write(self, exported: ExportedProgram, path: Path, metadata: Metadata, opset: int | None) -> None:
        """Make the file, without its metadata (which follow when it was checked). One thread at a time does that.

        Raises:
            ExportError: what the format has not.
        """

    @abstractmethod
    def seal(self, path: Path, metadata: Metadata) -> None:
        """Put the metadata into the file, and what tells when it is damaged."""

    @abstractmethod
    def open(self, path: Path, metadata: Metadata, runtime: str) -> Run:
        """Load the file into one of ``runtimes``.

        Raises:
            InputError: the runtime is missing or refuses the file.
        """

    def packages(self) -> tuple[str, ...]:
        """What writing it needs besides torch."""
        return ()
