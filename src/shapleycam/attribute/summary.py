"""What a result shows as a whole: counts, numbers per map, the mean map of every class, groups of maps that are alike.

Only the positive part of a map counts here, as in its display form; it is divided by its sum, so that maps of different
strength weigh the same.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.samples import spread
from .maps import Maps
from .rows import raw_of

_TOP = 0.1  # the share of the positions whose part of the map is its concentration


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """One explained class.

    Attributes:
        target: its index. name. count: pictures explained for it. probability: the mean.
        mean: the mean map, float32 [h, w], of sum 1.
    """

    target: int
    name: str
    count: int
    probability: float
    mean: Tensor


@dataclass(frozen=True, slots=True)
class Summary:
    """The whole result.

    Attributes:
        pictures, rows: in the source, and done.
        statuses: rows of each status. errors: the first words of errors, and how often.
        classes: the explained ones, the most frequent first.
        concentration, entropy: means over all maps; see :func:`concentration` and :func:`entropy`.
    """

    pictures: int
    rows: int
    statuses: dict[str, int]
    errors: dict[str, int]
    classes: tuple[ClassSummary, ...]
    concentration: float
    entropy: float


def shares(maps: Tensor) -> Tensor:
    """The positive part of every map divided by its sum, float32 [n, h, w]; zero where nothing is positive, or NaN."""
    positive = maps.nan_to_num(0.0, 0.0, 0.0).clamp_min(0)
    total = positive.flatten(1).sum(1)[:, None, None]
    return torch.where(total > 0, positive / total.clamp_min(1e-30), torch.zeros_like(positive))


def concentration(maps: Tensor) -> Tensor:
    """The part of every map's positive content that lies in the strongest tenth of the positions: 0.1 (even) to 1, [n]."""
    flat = shares(maps).flatten(1)
    return flat.topk(max(round(_TOP * flat.shape[1]), 1), 1).values.sum(1)


def entropy(maps: Tensor) -> Tensor:
    """Shannon entropy of every map's positive content over the largest possible: 0 (one position) to 1 (even), [n]."""
    flat = shares(maps).flatten(1)
    spread_out: Tensor = torch.special.entr(flat).sum(1)
    return spread_out / max(math.log(flat.shape[1]), 1e-30)


def summarise(maps: Maps) -> Summary:
    """Read every row once; memory grows with the number of explained classes, not of pictures.

    With several classes a picture, the first counts.
    """
    errors: Counter[str] = Counter()
    sums: dict[int, Tensor] = {}
    counts: Counter[int] = Counter()
    probabilities: dict[int, float] = {}
    concentrated = spreading = 0.0
    for table in maps.tables(["status", "error", "target", "probability", "scale", "map"]):
        raw = first_class(raw_of(table))
        status = table.column("status").to_pylist()
        good = torch.tensor([each == "ok" for each in status])
        reasons = zip(status, table.column("error").to_pylist(), strict=True)
        errors.update(f"{kind}: {words(why)}" for kind, why in reasons if kind != "ok")
        if not bool(good.any()):
            continue
        said = zip(good.tolist(), table.column("target").to_pylist(), table.column("probability").to_pylist(), strict=True)
        told = [(int(first(target) or 0), float(first(chance) or 0)) for ok, target, chance in said if ok]
        share = shares(raw[good])
        concentrated += float(concentration(raw[good]).sum())
        spreading += float(entropy(raw[good]).sum())
        index = torch.tensor([target for target, _ in told])
        for target in sorted(set(index.tolist())):
            chosen = index == target
            sums[target] = sums.get(target, torch.zeros(())) + share[chosen].sum(0)
            counts[target] += int(chosen.sum())
        for target, chance in told:
            probabilities[target] = probabilities.get(target, 0.0) + chance
    found = sum(counts.values())
    ordered = sorted(counts, key=lambda target: (-counts[target], target))
    classes = [
        ClassSummary(t, maps.class_name(t), counts[t], probabilities[t] / counts[t], sums[t] / counts[t]) for t in ordered
    ]
    return Summary(
        maps.manifest.count,
        len(maps),
        dict(sorted(maps.statuses.items())),
        dict(errors.most_common(50)),
        tuple(classes),
        concentrated / max(found, 1),
        spreading / max(found, 1),
    )


def first_class(raw: Tensor) -> Tensor:
    """[n, h, w] of [n, h, w] or [n, M, h, w]."""
    return raw if raw.ndim == 3 else raw[:, 0]


def first(value: int | float | list[float] | None) -> float | int | None:
    """A number, or the first of several."""
    return value[0] if isinstance(value, list) else value


def words(text: str | None) -> str:
    """An error without the numbers and names in it, so that alike ones count together."""
    return " ".join(word for word in (text or "").split() if not any(mark in "/\\0123456789" for mark in word))


def pick(count: int, limit: int) -> list[int]:
    """At most ``limit`` rows of ``count``, evenly spread."""
    return list(spread(count, limit))


def groups(maps: Tensor, count: int, *, rounds: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Maps that are alike, by k-means over their directions (cosine), from spread-out beginnings; the same every time.

    Args:
        maps: raw, float [n, h, w].
        count: groups asked for; fewer if there are fewer different maps.

    Returns:
        (the group of every map, int64 [n], the largest group first; the groups' mean shares, float32 [k, h, w]).
    """
    share = shares(maps)
    flat = torch.nn.functional.normalize(share.flatten(1), dim=1)
    if not len(flat):
        return torch.empty(0, dtype=torch.int64), share
    centres = flat[:1]
    for _ in range(min(count, len(flat)) - 1):  # the map that is least like any centre so far
        nearest = (flat @ centres.T).amax(1)
        farthest = int(nearest.argmin())
        if float(nearest[farthest]) > 1 - 1e-6:
            break
        centres = torch.cat((centres, flat[farthest : farthest + 1]))
    belongs = (flat @ centres.T).argmax(1)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, belongs, flat)
        centres = torch.nn.functional.normalize(torch.where(sums.any(1, keepdim=True), sums, centres), dim=1)
        again = (flat @ centres.T).argmax(1)
        if torch.equal(again, belongs):
            break
        belongs = again
    sizes = torch.bincount(belongs, minlength=len(centres))
    order = sizes.argsort(descending=True, stable=True)
    order = order[sizes[order] > 0]
    rank = torch.zeros(len(centres), dtype=torch.int64)
    rank[order] = torch.arange(len(order))
    belongs = rank[belongs]
    means = torch.zeros((len(order), *share.shape[1:])).index_add_(0, belongs, share)
    return belongs, means / sizes[order][:, None, None]
