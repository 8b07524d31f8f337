"""Pictures to evaluate on, by index, from any source (:func:`shapleycam.data.sources.open_source`).

A sample that cannot be read is data, not an exception: its reason takes the place of its pixels, so that a run over 50,000
files does not end at the first broken one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from .decoding import Decoder
from .images import Preprocess
from .sources import Entry, Source, open_source


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture.

    Attributes:
        name: what reports call it.
        view: the crop that the network sees, uint8 [3, H, W]; or why it cannot be had.
        label: the name of its folder, or what the source says; None if there is neither.
    """

    name: str
    view: Tensor | str
    label: str | int | None = None


class Samples(Dataset[Sample]):
    """Pictures in a fixed order, by index.

    Args:
        source: where they come from.
        preprocess: how the network wants them.
        limit: at most so many, spread evenly over all.

    Attributes:
        labels: names of all labels that are names, sorted, whatever the limit.

    Raises:
        InputError: the source is empty or cannot be read.
    """

    def __init__(self, source: Source, preprocess: Preprocess, limit: int | None = None) -> None:
        self.source, self.preprocess = source, preprocess
        self._decode = Decoder(preprocess, "exact")
        entries = list(source.entries())
        if not entries:
            raise InputError(f"{source.address} holds no {source.holds}.")
        self.labels = tuple(sorted({entry.label for entry in entries if isinstance(entry.label, str)}))
        self.entries = [entries[i] for i in spread(len(entries), limit)]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        try:
            view: Tensor | str = self._decode(self.source.load(entry), entry.key).view
        except InputError as error:
            view = str(error).removeprefix(f"{entry.key} ")
        return Sample(entry.key, view, entry.label)

    def fingerprint(self) -> str:
        """Changes with the names, the sizes, the times or the number of the pictures."""
        return fingerprint(self.entries)


def open_samples(source: str | PathLike[str] | Source | Any, preprocess: Preprocess, limit: int | None = None) -> Samples:
    """The pictures of a source; arguments as :class:`Samples` and :func:`shapleycam.data.sources.open_source`.

    Raises:
        InputError: nothing there, no pictures, or pyarrow is not installed.
    """
    return Samples(open_source(source), preprocess, limit)


def spread(count: int, limit: int | None) -> Sequence[int]:
    """At most ``limit`` of the indices below ``count``, evenly spread."""
    if limit is None or limit >= count:
        return range(count)
    return [i * count // limit for i in range(limit)]


def fingerprint(entries: Sequence[Entry]) -> str:
    """A digest of all that is known of pictures before they are read."""
    digest = hashlib.sha256()
    for entry in entries:
        add_entry(digest, entry)
    return digest.hexdigest()


def add_entry(digest: Any, entry: Entry) -> None:
    """Put an entry into a digest of :mod:`hashlib`."""
    digest.update(repr(tuple(entry)).encode("utf-8", "backslashreplace") + b"\n")
