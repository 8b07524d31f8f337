"""The command line: ``shapleycam explain | evaluate | serve | demo | info``.

Needs the extra ``cli`` (or ``demo``, which contains it). Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def main() -> None:
    """Entry point of the ``shapleycam`` command.

    Exit status: 0 when all went well, 1 when some images could not be explained, 2 when the command could not run.
    """
    keep_freed_memory()
    try:
        from .app import run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        print(f"The command line needs {package}: pip install 'shapleycam[cli]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(run())


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for this process; returns whether it does.

    PyTorch frees the activations of a layer before it allocates those of another. By default glibc gives every large block back
    to the system, and the system clears each page of the next one: a batch on a CPU can spend more time on that than on the
    network (bench/test_metrics.py measures it). Nothing happens where the user has tuned the allocator, or it is not glibc's.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # No block in a mapping of its own, and no trimming of the heap below 2 GiB of free memory at its end.
    return mallopt is not None and all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)])
