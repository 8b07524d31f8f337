"""`shapleycam verify --quick` where neither typer nor rich is: one line per finding, exit status 1 on a mismatch."""

from __future__ import annotations

import sys

from shapleycam.ops.verify import places, verify


def main() -> int:
    wrong = 0
    for place, backend in places():
        for found in verify(place, backend, quick=True):
            times = f"{(found.seconds or 0) * 1e6:8.0f} µs (reference {(found.reference or 0) * 1e6:8.0f} µs)"
            what = f"{found.device:8} {found.backend:8} {found.operator:34} {str(found.dtype)[6:]:9} {found.calls:5} calls"
            print(f"{what} worst {found.worst:8.1%} of what is allowed {times} {found.where}", found.mistake or "", flush=True)
            wrong += found.mistake is not None
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
