"""``shapleycam verify``: the operators' contract on this machine's own devices and backends."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..ops.verify import Finding, places, verify


def run_verify(device: str, backend: str, quick: bool, results: Console, notes: Console) -> int:
    """Print a table of worst errors and times; returns 1 where a kernel is wrong, else 0."""
    start = time.perf_counter()
    found: list[Finding] = []
    for where, rung in places(device, backend):
        with notes.status(f"{rung.name} on {where}"):
            found += verify(where, rung, quick)
    table = Table("device", "backend", "operator", "dtype", "calls", box=None, pad_edge=False, header_style="bold")
    for column in ("worst error", "time", "reference"):
        table.add_column(column, justify="right")
    table.add_column("worst in")
    for one in found:
        share = f"{one.worst:.1%}" if one.worst <= 1 else f"{one.worst:.3g} times"
        table.add_row(
            one.device,
            one.backend,
            one.operator,
            str(one.dtype).removeprefix("torch."),
            str(one.calls),
            share if one.mistake is None else f"[bold red]{share}[/]",
            _time(one.seconds),
            _time(one.reference),
            one.where,
        )
    results.print(table)
    results.print("Errors are parts of what the contract allows; times are of one call, beside the reference in plain PyTorch.")
    wrong = [one for one in found if one.mistake is not None]
    for one in wrong:
        results.print(f"[bold red]wrong:[/] {one.operator}: {escape(one.mistake or '')}")
    calls, taken = sum(one.calls for one in found), time.perf_counter() - start
    verdict = f"[bold red]{len(wrong)} of {len(found)} rows are wrong[/]" if wrong else "[green]all is well[/]"
    results.print(f"{verdict}: {calls} calls compared in {taken:.0f} s")
    return 1 if wrong else 0


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.0f} µs"
