"""Under which conditions something was measured: what a figure means nothing without."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .._version import __version__

#: Reasons of a lower clock, as nvidia-smi words them.
_THROTTLED = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "sw_power_cap")


def conditions(device: torch.device) -> dict[str, Any]:
    """Device, versions, threads, load and the commit of a checkout, for JSON."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "torch": torch.__version__,
        "shapleycam": __version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "clocks": clocks(device),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """What the machine calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", file.read_text()) if file.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that the package runs from, with "-dirty" where files differ; None outside of one."""
    here = Path(__file__).parent
    run = lambda *command: subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=False)
    try:
        found = run("rev-parse", "--short", "HEAD")
        if found.returncode:
            return None
        dirty = bool(run("status", "--porcelain", "--untracked-files=no").stdout.strip())
    except OSError:
        return None
    return found.stdout.strip() + ("-dirty" if dirty else "")


def clocks(device: torch.device) -> dict[str, Any] | None:
    """A GPU's clocks as found and why they are lower than they could be; None where nvidia-smi does not say."""
    if device.type != "cuda":
        return None
    asked = ["clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu"]
    asked += [f"clocks_throttle_reasons.{reason}" for reason in _THROTTLED]
    index = device.index if device.index is not None else torch.cuda.current_device()
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(asked, (part.strip() for part in said.split(",")), strict=False))
