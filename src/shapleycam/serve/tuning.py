"""How many images a batch should have, by measuring."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

from .faults import free_memory, is_out_of_memory


def tune(
    run: Callable[[int], object],
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
    *,
    rounds: int = 3,
    budget: float = 10.0,
    slack: float = 0.05,
) -> tuple[int, dict[int, float]]:
    """Measure ``run(size)`` and choose the smallest batch that is as fast per item as any, but for ``slack``.

    On a CPU batches can be slower than single images; on a GPU they are faster up to a size that nobody knows beforehand.
    Larger batches also make everybody in them wait, so a size must earn its place.

    Args:
        run: serves a batch of that size and waits until it is done.
        sizes: tried in this order, ascending; one that runs out of memory ends the trials.
        rounds: timed calls per size, after one that is not timed; their median counts.
        budget: seconds after which no larger size is begun.
        slack: what a smaller batch may be slower per item.

    Returns:
        (the size, seconds per item of every size that was tried).
    """
    began = time.monotonic()
    found: dict[int, float] = {}
    for size in sizes:
        if found and time.monotonic() - began > budget:
            break
        try:
            run(size)
            times = []
            for _ in range(rounds):
                start = time.perf_counter()
                run(size)
                times.append(time.perf_counter() - start)
        except Exception as error:
            if not found or not is_out_of_memory(error):
                raise
            free_memory()
            break
        found[size] = median(times) / size
        if found[size] > 1.5 * min(found.values()):
            break  # it gets worse
    best = min(found.values())
    return next(size for size, each in found.items() if each <= best * (1 + slack)), found
