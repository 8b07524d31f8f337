"""The data-set job: its price over plain inference, loops that people write, decoders, memory, and the files.

Every ratio is of contenders that take turns in this run, block by block, so that what disturbs the machine disturbs all of
them; it is the median over the blocks of one's seconds over the other's in the same block. On a CPU the seconds are those of
the process's CPU time, all threads together, which others on the machine take little from; the clock's stand beside them.
Pictures are generated: smooth noise with grain, JPEG of 500 × 375 and about 50 KB, as a photograph of ImageNet. Usage:

    python -m bench.attribute [--out DIR] [--device cuda] [--images 2000] [--timed 448] [--only NAME ...]

With ``--only`` the other steps' results stay. Loops are in bench/attribute_loops.py; their figures are written into
docs/data_sets.md where ``--out`` is not given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from shapleycam.attribute import Settings, open_maps
from shapleycam.attribute.folder import part_files
from shapleycam.attribute.job import ShardRunner
from shapleycam.data.decoding import Decoder
from shapleycam.data.manifest import Manifest

from .attribute_job import BLOCK, RECIPE, Plain, classifier, interleaved, pictures, ratio, runner
from .attribute_loops import loops, ray_data, write_section
from .ops import commit, conditions


def price(source: Path, work: Path, count: int, device: torch.device, settings: Settings) -> dict[str, Any]:
    """Pictures/s of the job over those of the same loop with plain inference."""
    found: dict[str, Any] = {}
    cases = {
        "closed_form": ("pool-linear", settings),
        "quadrature, 4 nodes": ("pool-linear", replace(settings, engine="quadrature", nodes=4)),
        "reverse_over_reverse (a hidden layer)": ("mlp", settings),
    }
    for name, (head, chosen) in cases.items():
        model = classifier(head, device)
        both = {
            "plain": runner(Plain, model, source, work / "plain", chosen),
            "attribute": runner(ShardRunner, model, source, work / "attribute", chosen),
        }
        for each in both.values():
            each.run(0)  # everything is warm
        blocks = range(1, (count if name == "closed_form" else count // 2) // BLOCK)
        cpu, wall = interleaved({key: each.run for key, each in both.items()}, blocks)
        seconds = wall if device.type == "cuda" else cpu
        found[name] = {
            "engine": both["attribute"].engine,
            "pictures": len(blocks) * BLOCK,
            "of_plain": ratio(seconds, "attribute", "plain"),
            "of_plain_by_the_clock": ratio(wall, "attribute", "plain"),
            "cpu_seconds": cpu,
            "seconds": wall,
        }
        for each in both.values():
            each.close()
        print(f"{name}: {found[name]['of_plain']:.3f} of plain inference", flush=True)
    return found


def decoders(source: Path, count: int) -> dict[str, Any]:
    """Pictures/s of decode, resize and crop alone, with 1 and 2 threads."""
    contents = [(file.name, file.read_bytes()) for file in sorted(source.glob("*.jpg"))[:count]]
    chosen: dict[str, Decoder] = {
        "Pillow, its resize": Decoder(RECIPE, "exact"),
        "Pillow, PyTorch's resize": Decoder(RECIPE, "pillow"),
    }
    try:
        chosen["torchcodec, PyTorch's resize"] = Decoder(RECIPE, "torchcodec")
    except ValueError as error:
        print(error, file=sys.stderr)

    def job(decoder: Decoder, threads: int) -> Callable[[int], None]:
        def run(block: int) -> None:
            def work(share: list[tuple[str, bytes]]) -> None:
                for name, content in share:
                    decoder(content, name)

            workers = [threading.Thread(target=work, args=(contents[n::threads],)) for n in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        return run

    contenders = {f"{name}, {threads} threads": job(d, threads) for name, d in chosen.items() for threads in (1, 2)}
    cpu, wall = interleaved(contenders, range(9))
    first = next(iter(contenders))
    found = {
        name: {
            "pictures_per_cpu_second": len(contents) / statistics.median(values),
            "times": ratio(cpu, name, first),
            "times_by_the_clock": ratio(wall, name, first),
        }
        for name, values in cpu.items()
    }
    for name, each in found.items():
        print(f"{name}: {each['pictures_per_cpu_second']:.0f} per CPU second, {each['times']:.2f} × {first}", flush=True)
    return found


MEMORY = """
import sys
from pathlib import Path
import torch
from torch import nn
from shapleycam.attribute import Settings, attribute
from shapleycam.data.images import Preprocess
from shapleycam.model.zoo import Classifier
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1))
model += nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
c = Classifier("tiny", model.eval(), Preprocess((32, 32), 32, "bilinear"), (), "random")
peaks = []
def progress(outcome):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peaks.append(int(status["VmRSS"].split()[0]))
attribute(c, sys.argv[1], sys.argv[2], Settings(layer="2", batch_size=64), progress=progress)
print(sorted(peaks)[len(peaks) // 2], peaks[-1])
"""


def memory(work: Path, large: int) -> dict[str, Any]:
    """Resident memory (KiB) of the whole process at the end of 2,000 and of ten times as many small pictures."""
    found: dict[str, Any] = {}
    for count in (large // 10, large):
        source = pictures(work / f"small-{count}", count, (48, 40))
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(source), str(work / f"memory-{count}")],
            capture_output=True,
            text=True,
            check=True,
        )
        median, last = map(int, done.stdout.split())
        found[str(count)] = {"median_kib": median, "end_kib": last}
    ends = [each["end_kib"] for each in found.values()]
    found["growth"] = ends[1] / ends[0] - 1
    print(f"memory: {found}", flush=True)
    return found


def files(work: Path, large: int) -> dict[str, Any]:
    """What writing and reading the result of :func:`memory` costs, in seconds of CPU time."""
    from pyarrow import parquet

    out = work / f"memory-{large}"
    parts = sorted(out.glob("part-*"))
    size = sum(file.stat().st_size for file in parts)
    maps = open_maps(out)
    began = time.process_time()
    rows = sum(len(keys) for keys, _ in maps.batches())
    scan = time.process_time() - began
    keys = list(maps.keys())
    maps[keys[0]]  # builds the index
    generator, times = torch.Generator().manual_seed(0), []
    for index in torch.randperm(len(keys), generator=generator)[:300].tolist():
        began = time.process_time()
        maps[keys[index]]
        times.append(time.process_time() - began)
    table = parquet.read_table(parts[0])
    began = time.process_time()
    for _ in range(20):
        parquet.write_table(table, work / "again.parquet", compression="zstd", compression_level=1, use_dictionary=False)
    write = (time.process_time() - began) / 20
    began = time.process_time()
    listed = Manifest(out / "manifest.parquet")
    footer = parquet.read_metadata(out / "manifest.parquet").serialized_size
    found = {
        "rows": rows,
        "grid": list(maps.grid),
        "bytes_per_row": size / rows,
        "manifest_bytes_per_row": (out / "manifest.parquet").stat().st_size / listed.count,
        "manifest_footer_bytes_per_shard": footer / listed.shards,
        "scan_rows_per_second": rows / scan,
        "write_rows_per_second": len(table) / write,
        "write_mb_per_second": table.nbytes / write / 1e6,
        "random_map_ms": statistics.median(times) * 1e3,
    }
    print(found, flush=True)
    return found


def schedule(shards: int = 100_000) -> dict[str, Any]:
    """What the bookkeeping of many shards costs: a runner that writes empty files in the place of the network."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        began = time.perf_counter()
        for k in range(shards):
            beside = folder / f".part-{k:06}.part"
            beside.touch()
            os.replace(beside, folder / f"part-{k:06}.parquet")
        wrote = time.perf_counter() - began
        began = time.perf_counter()
        there = part_files(folder)
        missing = [k for k in range(shards) if k not in there]
        seen = time.perf_counter() - began
        assert not missing
    return {"shards": shards, "seconds_to_place": wrote, "seconds_to_find_the_missing": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "shapleycam-bench-attribute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--timed", type=int, help="pictures that are timed per contender; all if not given")
    parser.add_argument("--large", type=int, default=20_000)
    parser.add_argument("--only", nargs="*", default=["price", "loops", "ray", "decoders", "memory", "files", "schedule"])
    options = parser.parse_args()
    device = torch.device(options.device)
    settings = Settings(batch_size=8 if device.type == "cpu" else 64, threads=len(os.sched_getaffinity(0)))
    source = pictures(options.work / "pictures", options.images)
    size = statistics.mean(file.stat().st_size for file in source.glob("*.jpg"))
    run = Path(tempfile.mkdtemp(prefix="run-", dir=options.work))
    for stale in options.work.glob("memory-*"):
        if "memory" in options.only:
            shutil.rmtree(stale)
    steps: dict[str, Callable[[], Any]] = {
        "price": lambda: price(source, run, options.timed or options.images, device, settings),
        "loops": lambda: loops(source, run, (options.timed or options.images) // 4, device, settings),
        "ray": lambda: ray_data(source, run, min(options.timed or 1000, options.images - 64), device, settings),
        "decoders": lambda: decoders(source, 100),
        "memory": lambda: memory(options.work, options.large),
        "files": lambda: files(options.work, options.large),
        "schedule": schedule,
    }
    result: dict[str, Any] = {
        "conditions": {
            **conditions(device),
            "pictures": options.images,
            "picture_bytes": round(size),
            "settings": asdict(settings),
        }
    }
    options.out.mkdir(parents=True, exist_ok=True)
    processor = "-".join(result["conditions"]["device"].lower().split()[:2])
    file = options.out / f"attribute-{device.type}-{processor}.json"
    if file.exists() and set(options.only) < set(steps):  # the other steps' results stay; each says its commit and load
        result = {**json.loads(file.read_text()), "conditions": result["conditions"]}
    for name in options.only:
        result[name] = steps[name]()
        result.setdefault("measured", {})[name] = {"commit": commit(), "load": os.getloadavg()[0]}
        file.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(run)
    if options.out == parser.get_default("out") and device.type == "cpu":
        write_section(Path("docs/data_sets.md"), result)
    print(f"written: {file}")


if __name__ == "__main__":
    main()
