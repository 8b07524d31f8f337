"""What a profile found, as rows, and as JSON that can be read again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import InputError

#: Of the JSON document; raised where older readers would misread it.
LAYOUT = 1


def quantile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least this share of them do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, min(len(ordered) - 1, -(-len(ordered) * share // 1).__int__() - 1))]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of an explanation.

    Attributes:
        name: an entry of :data:`shapleycam.profiling.stages.STAGES`, or "call" where the stages cannot be told apart.
        seconds: every sample.
        bytes: what it must at least read and write; None where that is not known.
    """

    name: str
    seconds: tuple[float, ...]
    bytes: int | None = None

    @property
    def p50(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p90(self) -> float:
        return quantile(self.seconds, 0.9)

    @property
    def p99(self) -> float:
        return quantile(self.seconds, 0.99)

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second at the median."""
        return None if self.bytes is None else self.bytes / max(self.p50, 1e-12)


@dataclass(frozen=True, slots=True)
class Row:
    """One case: a model, a batch and the settings of an explainer.

    Attributes:
        case: what sets it apart, by name: model, batch, dtype, layout, engine, backend, mode.
        engine, backend: which served; None where the mode does not tell.
        forward: seconds of the plain forward pass, a sample per round.
        explanation: seconds of the whole explanation, in the same rounds.
        stages: in the order of the road.
        copy: bytes per second that ``Tensor.copy_`` reached, read plus written.
        operators: how many operators an explanation dispatches, and a forward pass; on a GPU, how many kernels it launches.
        peak: bytes held at most above what was held before, by an explanation and by a forward pass.
    """

    case: dict[str, Any]
    engine: str | None
    backend: str | None
    forward: tuple[float, ...]
    explanation: tuple[float, ...]
    stages: tuple[Stage, ...]
    copy: float
    operators: tuple[int, int]
    peak: tuple[int, int]

    @property
    def over_forward(self) -> float:
        """The explanation in plain forward passes: the median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.explanation, self.forward, strict=True))

    @property
    def limit(self) -> float:
        """Seconds that no explanation can be under: the forward pass, and what the steps behind it move, at the copy's pace."""
        return statistics.median(self.forward) + sum(stage.bytes or 0 for stage in self.stages) / self.copy

    @property
    def over_limit(self) -> float:
        """The explanation in units of that limit."""
        return statistics.median(self.explanation) / self.limit

    @property
    def label(self) -> str:
        return " ".join(str(value) for value in self.case.values())


@dataclass(frozen=True, slots=True)
class Profile:
    """Rows measured in turn, in one process."""

    rows: tuple[Row, ...]
    conditions: dict[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """For JSON: all samples, and the figures made of them."""
        rows = []
        for row in self.rows:
            entry = asdict(row)
            entry |= {"over_forward": row.over_forward, "limit": row.limit, "over_limit": row.over_limit}
            for stage, told in zip(row.stages, entry["stages"], strict=True):
                told |= {"p50": stage.p50, "p90": stage.p90, "p99": stage.p99, "bandwidth": stage.bandwidth}
            rows.append(entry)
        return {"layout": LAYOUT, "kind": "shapleycam profile", "conditions": self.conditions, "rows": rows}

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the JSON document; :func:`load` reads it.

        Raises:
            InputError: the file cannot be written.
        """
        target = Path(path)
        try:
            target.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"The profile cannot be written to {path}: {error.strerror or error}.") from error
        return target


def load(path: str | PathLike[str]) -> Profile:
    """A profile that was saved.

    Raises:
        InputError: the file is missing, or no profile of this layout.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content["kind"] != "shapleycam profile" or content["layout"] != LAYOUT:
            raise InputError(f"{path} is no profile of layout {LAYOUT}: measure again with this version.")
        rows = []
        for entry in content["rows"]:
            forward, explanation = _samples(entry["forward"], entry["explanation"])
            stages = tuple(Stage(told["name"], tuple(told["seconds"]), told["bytes"]) for told in entry["stages"])
            rows.append(
                Row(
                    dict(entry["case"]),
                    entry["engine"],
                    entry["backend"],
                    forward,
                    explanation,
                    stages,
                    entry["copy"],
                    tuple(entry["operators"]),
                    tuple(entry["peak"]),
                )
            )
        return Profile(tuple(rows), content["conditions"])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no JSON document of `shapleycam profile --json`: {error!r}.") from error


def _samples(*columns: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    found = tuple(tuple(float(value) for value in column) for column in columns)
    if len({len(column) for column in found}) != 1 or not found[0]:
        raise ValueError("forward passes and explanations are not as many")
    return found
