"""Two profiles of the same cases: which became faster, which slower, and where one cannot tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError
from .result import Profile, Row

#: How often the rounds are drawn again, with replacement.
_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one case.

    Attributes:
        label: the case, and the stage or "explanation".
        ratio: the new median over the old one.
        low, high: the interval that holds it in 95 % of the draws.
        word: "FAST" or "SLOW" where the whole interval is beyond the threshold, "SAME" where all of it is within, else
            "UNCLEAR".
    """

    label: str
    ratio: float
    low: float
    high: float
    word: str


def compare(old: Profile, new: Profile, *, threshold: float = 0.02) -> list[Verdict]:
    """A verdict per case, on the explanation in units of the forward pass of its own round, and per stage.

    The rounds of either side are drawn again with replacement (a percentile bootstrap of the ratio of medians, seeded), which
    asks nothing of their distribution. Explanations are compared in forward passes, so that a machine that became slower as a
    whole changes nothing; stages in units of the forward pass's median.

    Args:
        old, new: of the same cases; others are left out.
        threshold: what counts as a difference, such as 0.02.

    Raises:
        InputError: they have no case in common.
    """
    before = {row.label: row for row in old.rows}
    pairs = [(before[row.label], row) for row in new.rows if row.label in before]
    if not pairs:
        raise InputError("The two profiles have no case in common: measure the same models, batches and settings.")
    return [verdict for one, other in pairs for verdict in _verdicts(one, other, threshold)]


def _verdicts(old: Row, new: Row, threshold: float) -> Iterator[Verdict]:
    def relative(row: Row) -> list[float]:
        return [a / b for a, b in zip(row.explanation, row.forward, strict=True)]

    yield judge(f"{new.label} explanation", relative(old), relative(new), threshold)
    stages = {stage.name: stage for stage in old.stages}
    for stage in new.stages:
        if stage.name in stages:
            one, other = (
                [sample / _median(row.forward) for sample in each.seconds]
                for row, each in ((old, stages[stage.name]), (new, stage))
            )
            yield judge(f"{new.label} {stage.name}", one, other, threshold)


def judge(label: str, old: Sequence[float], new: Sequence[float], threshold: float) -> Verdict:
    """The verdict on two sets of samples."""
    generator = torch.Generator().manual_seed(0)

    def medians(samples: Sequence[float]) -> torch.Tensor:
        values = torch.tensor(samples, dtype=torch.float64)
        drawn = values[torch.randint(len(samples), (_DRAWS, len(samples)), generator=generator)]
        return drawn.quantile(0.5, dim=1)

    ratios = medians(new) / medians(old)
    low, high = (float(q) for q in ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)))
    word = "UNCLEAR"
    if high < 1 - threshold:
        word = "FAST"
    elif low > 1 + threshold:
        word = "SLOW"
    elif low >= 1 - threshold and high <= 1 + threshold:
        word = "SAME"
    return Verdict(label, _median(new) / _median(old), low, high, word)


def _median(samples: Sequence[float]) -> float:
    return float(torch.tensor(samples, dtype=torch.float64).quantile(0.5))
