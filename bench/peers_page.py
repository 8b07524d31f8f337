"""docs/peers.md from the result of bench.peers."""

from __future__ import annotations

import statistics
from typing import Any

TEXT = """\
# Beside other packages

What a map costs by pytorch-grad-cam, torch-cam and captum, and by shapleycam with the same method on the same images: seeded
weights, images of 224 pixels, {device}, {threads} threads, torch {torch}, {peers}. Made by `python -m bench.peers`, which times
everything in turn in one process, after it has seen that the maps agree. Ratios are medians over the rounds. The machine was
shared: differences of a few percent mean nothing. Freed memory is kept for the process, for all of them, as `shapleycam`'s own
commands do: glibc's default gives it back to the system and has its pages cleared again, which plain inference, ours and the
forward pass alike, pays for every layer, and a package that keeps all activations for a pass back does not.

## In plain forward passes

{summary}

| network | batch | {columns} |
| --- | --- | {rule} |
{table}

Of each peer, behind the slash, how many times as long it takes as ours by the same method. A dash: the peer does not do it
(below).

## Memory

The most that is held during a call, in units of the plain forward pass's own; a dash also where the profiler saw nothing:

| network | batch | {columns} |
| --- | --- | {rule} |
{memory}

## In torch-cam's terms

torch-cam's README gives the time that GradCAM adds to the forward pass. The same here, in forward passes:

| network | batch | torch-cam | ours | times |
| --- | --- | --- | --- | --- |
{overhead}

## What was not timed

{failed}
"""


def page(result: dict[str, Any]) -> str:
    """The page."""
    rows = [row | {"network": label(row)} for row in result["rows"]]
    known = rows[0]["conditions"]
    threads = sorted({row["conditions"]["threads"] for row in rows})
    places = list(dict.fromkeys((row["network"], row["batch"]) for row in rows))
    places.sort(key=lambda place: (place[0].endswith("bfloat16"), *place))
    rivals = list(dict.fromkeys(row["rival"] for row in rows))
    rivals.sort(key=lambda name: not name.startswith("ours"))
    at = {(row["network"], row["batch"], row["rival"]): row for row in rows if "failed" not in row}

    def cell(place: tuple[str, int], rival: str) -> str:
        row = at.get((*place, rival))
        if row is None:
            return "–"
        return f"{row['over_forward']:.2f}" + ("" if rival.startswith("ours") else f" / {row['over_ours']:.1f}")

    def memory(place: tuple[str, int], rival: str) -> str:
        row = at.get((*place, rival))
        return "–" if row is None or not row["peak_over_forward"] else f"{row['peak_over_forward']:.2f}"

    def lines(fill: Any) -> str:
        return "\n".join(
            f"| {name} | {batch} | {' | '.join(fill((name, batch), r) for r in rivals)} |" for name, batch in places
        )

    return TEXT.format(
        device=known["device"],
        threads=" and ".join(map(str, threads)),
        torch=known["torch"],
        peers=", ".join(f"{name} {known[name]}" for name in ("grad-cam", "torchcam", "captum")),
        columns=" | ".join(rivals),
        rule=" | ".join("---" for _ in rivals),
        table=lines(cell),
        memory=lines(memory),
        summary=summary(rows),
        overhead=overhead(at, places),
        failed=failed(result["rows"]),
    )


def label(row: dict[str, Any]) -> str:
    """The network, with the dtype where that is not float32."""
    return str(row["network"]) if row.get("dtype", "float32") == "float32" else f"{row['network']}, {row['dtype']}"


def summary(rows: list[dict[str, Any]]) -> str:
    """Medians and worst cases, also where we lose."""
    out = []
    for package in ("grad-cam", "torchcam", "captum"):
        found = [row for row in rows if row["rival"].startswith(package) and "failed" not in row]
        if not found:
            continue
        ratios = [row["over_ours"] for row in found]
        worst = min(found, key=lambda row: row["over_ours"])
        lost = [row for row in found if row["over_ours"] < 1]
        out.append(
            f"- **{package}** takes {statistics.median(ratios):.2f} times as long as ours (median of {len(found)} cases; "
            f"{min(ratios):.2f} to {max(ratios):.2f}; least at {worst['network']}, batch {worst['batch']}, {worst['rival']}). "
            + (f"Ours is slower in {len(lost)} of them." if lost else "Ours is slower in none of them.")
        )
    return "\n".join(out)


def overhead(at: dict[Any, dict[str, Any]], places: list[tuple[str, int]]) -> str:
    """Lines for ResNet-18 and MobileNet-V3."""
    out = []
    for place in places:
        theirs, ours = at.get((*place, "torchcam GradCAM")), at.get((*place, "ours gradcam"))
        if place[0] in ("ResNet-18", "MobileNet-V3-L") and theirs and ours:
            more, less = theirs["over_forward"] - 1, ours["over_forward"] - 1
            times = f"{more / less:.0f}" if less > 0.005 else "ours is within the noise"
            out.append(f"| {place[0]} | {place[1]} | {more:.2f} | {less:.3f} | {times} |")
    return "\n".join(out)


def failed(rows: list[dict[str, Any]]) -> str:
    """Reasons, each with its cases."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "failed" in row:
            reasons.setdefault((row["rival"], row["failed"]), []).append(f"{row['network']} {row['batch']} {row['dtype']}")
    return "\n".join(f"- {rival}: {reason} ({', '.join(where)})" for (rival, reason), where in reasons.items()) or "Nothing."
