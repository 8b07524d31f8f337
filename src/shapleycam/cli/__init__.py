"""The command line: ``shapleycam explain | demo | info``.

Needs the extra ``cli`` (or ``demo``, which contains it). Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the ``shapleycam`` command.

    Exit status: 0 when all went well, 1 when some images could not be explained, 2 when the command could not run.
    """
    try:
        from .app import run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        print(f"The command line needs {package}: pip install 'shapleycam[cli]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(run())
