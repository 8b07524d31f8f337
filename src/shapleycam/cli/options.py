"""Options that several commands have, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="efficientnet-lite0, or a torchvision or timm name (timm/NAME picks the library).")]
Weights = Annotated[
    str | None,
    typer.Option(help="A state_dict file, a set of torchvision's, such as IMAGENET1K_V1, or 'random' for seeded ones."),
]
Classes = Annotated[Path | None, typer.Option(help="A file of class names, one a line.")]
Layer = Annotated[str, typer.Option(help="Target layer, such as layer4.2.")]
Layers = Annotated[list[str] | None, typer.Option(help="Target layer, such as layer4.2; repeat to average several.")]
Method = Annotated[str, typer.Option(help="shapleycam, shapleycam-h, gradcam, layercam, …")]
Utility = Annotated[str, typer.Option(help="rest, logit, probability or log_probability.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Backend = Annotated[str, typer.Option(help="auto, cuda, triton, native or torch; an explicit choice never falls back.")]
Engine = Annotated[
    str,
    typer.Option(
        help="Derivative engine: auto, closed_form, gauss_newton, reverse_over_reverse, forward_over_reverse, quadrature, "
        "midpoint."
    ),
]
Nodes = Annotated[
    str | None,
    typer.Option(metavar="N|auto", help="With --engine quadrature: gradients along the path, 1 to 32; 4 if not given."),
]
Baseline = Annotated[str, typer.Option(help="What the content is counted from: zero, or mean over the positions.")]
Out = Annotated[Path, typer.Option(help="Folder for the pictures; made if it is missing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output instead of a table.")]


def number_of_nodes(text: str | None) -> int | str | None:
    """What ``--nodes`` says: a number, "auto", or nothing; a usage error for anything else."""
    if text is None or text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a whole number nor 'auto'.", param_hint="--nodes") from None


def several(text: str) -> tuple[str, ...]:
    """The parts between commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers from 1, with commas between them; a usage error for anything else."""
    try:
        found = tuple(int(part) for part in several(text))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{text!r}: expected whole numbers from 1, with commas between them.", param_hint=option)
    return found
