"""The data-set job against the loops that people write: pytorch-grad-cam, Hugging Face's ``datasets``, and Ray Data.

Each is written as its documentation has it, with batches of the job's size and the maps saved. Before it is timed, its maps of
the first pictures are compared with the job's; all but the job resize by Pillow, which is a level or two of 255 off.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shapleycam import Explainer, ops
from shapleycam.attribute import Settings
from shapleycam.attribute.job import ShardRunner
from shapleycam.attribute.part import part_name
from shapleycam.attribute.rows import raw_of

from .attribute_job import BLOCK, RECIPE, Plain, classifier, interleaved, ratio, runner

#: How far a loop's maps may be from the job's, of a map's largest value: another resize, and for heatmaps another library's.
AGREE = 0.05
PREDICT, FORWARD = "the same loop that only predicts", "the network alone, on pictures that are decoded"
GRAD_CAM, DATASETS, RAY = "pytorch-grad-cam and np.save", "datasets.map with our explainer", "Ray Data with our explainer"


def as_people_do() -> Callable[[Any], Tensor]:
    """:data:`RECIPE` by torchvision."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(RECIPE.mean, RECIPE.std),
        ]
    )


class Files(torch.utils.data.Dataset[tuple[Tensor, str]]):
    """Pictures for a DataLoader."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.recipe = files, as_people_do()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        from PIL import Image

        return self.recipe(Image.open(self.files[index]).convert("RGB")), self.files[index].stem


def off(found: Tensor, ours: Tensor) -> float:
    """The largest distance between maps [N, h, w], of each one's largest absolute value in ``ours``."""
    return float(((found - ours).abs().amax((1, 2)) / ours.abs().amax((1, 2))).max())


def agrees(name: str, found: Tensor, ours: Tensor) -> float:
    distance = off(found.float(), ours)
    if not distance <= AGREE:
        raise SystemExit(f"{name}: its maps are {distance:.3f} of their largest value from the job's, more than {AGREE}.")
    return distance


def maps_of_part(folder: Path, shard: int = 0) -> Tensor:
    from pyarrow import parquet

    return raw_of(parquet.read_table(folder / part_name(shard)))


def loops(source: Path, work: Path, count: int, device: torch.device, settings: Settings) -> dict[str, Any]:
    """Pictures/s of the job over those of loops in one process."""
    import datasets
    import numpy
    from pytorch_grad_cam import ShapleyCAM

    model = classifier("pool-linear", device)
    ours = runner(ShardRunner, model, source, work / "ours", settings)
    plain = runner(Plain, model, source, work / "predicted", settings)
    files = sorted(source.glob("*.jpg"))
    cam = ShapleyCAM(model=model.model, target_layers=[model.model.layer4[-1]])
    (work / "npy").mkdir(parents=True, exist_ok=True)

    def by_grad_cam(block: int) -> None:
        chosen = files[block * BLOCK : (block + 1) * BLOCK]
        for images, names in torch.utils.data.DataLoader(Files(chosen), batch_size=settings.batch_size):
            for each, name in zip(cam(input_tensor=images.to(device), targets=None), names, strict=True):
                numpy.save(work / "npy" / f"{name}.npy", each)

    explainer, recipe = Explainer(model.model), as_people_do()
    datasets.disable_progress_bars()
    datasets.disable_caching()

    def explain(batch: dict[str, Any]) -> dict[str, Any]:
        images = torch.stack([recipe(picture.convert("RGB")) for picture in batch["image"]]).to(device)
        return {"map": explainer(images).raw.half().cpu().numpy()}

    def by_map(block: int) -> None:
        paths = [str(file) for file in files[block * BLOCK : (block + 1) * BLOCK]]
        data = datasets.Dataset.from_dict({"path": paths, "image": paths}).cast_column("image", datasets.Image())
        data = data.map(  # a fingerprint that is given, or it would be made of the weights in every block
            explain, batched=True, batch_size=settings.batch_size, remove_columns=["image"], new_fingerprint=f"block{block}"
        )
        data.to_parquet(str(work / f"map-{block}.parquet"))

    ready = torch.randn(settings.batch_size, 3, *RECIPE.crop, device=device).to(memory_format=torch.channels_last)

    def forward(block: int) -> None:
        with torch.inference_mode():
            for _ in range(BLOCK // settings.batch_size):
                model.model(ready)
        if device.type == "cuda":
            torch.cuda.synchronize()

    contenders: dict[str, Callable[[int], Any]] = {
        "attribute": ours.run,
        PREDICT: plain.run,
        FORWARD: forward,
        GRAD_CAM: by_grad_cam,
        DATASETS: by_map,
    }
    for each in contenders.values():
        each(0)
    expected = maps_of_part(work / "ours")
    heatmaps = ops.display_map(expected, RECIPE.crop, renormalize=True)
    saved = torch.stack([torch.from_numpy(numpy.load(work / "npy" / f"{file.stem}.npy")) for file in files[:BLOCK]])
    by_datasets = datasets.Dataset.from_parquet(str(work / "map-0.parquet"), cache_dir=str(work / "cache"))
    distances = {
        GRAD_CAM: agrees(GRAD_CAM, saved, heatmaps),
        DATASETS: agrees(DATASETS, torch.tensor(by_datasets["map"][:]), expected),
    }
    blocks = range(1, 1 + max(count // BLOCK, 3))
    cpu, wall = interleaved(contenders, blocks)
    seconds = wall if device.type == "cuda" else cpu
    ours.close()
    plain.close()
    found: dict[str, Any] = {
        name: {
            "times": ratio(seconds, "attribute", name),
            "times_by_the_clock": ratio(wall, "attribute", name),
            "cpu_seconds": cpu[name],
            "seconds": wall[name],
        }
        for name in contenders
    }
    for name, distance in distances.items():
        found[name]["maps_off"] = distance
    # What the ratio would be if the job did nothing but predict, and if it did nothing but the network's forward pass.
    found[GRAD_CAM]["times_of_prediction"] = ratio(seconds, PREDICT, GRAD_CAM)
    found[GRAD_CAM]["times_of_forward"] = ratio(seconds, FORWARD, GRAD_CAM)
    for name, row in found.items():
        print(f"{row['times']:.2f} × {name}", flush=True)
    return found


# ------------------------------------------------------------------------------------------------------------- Ray Data


class Explain:
    """An actor of Ray Data's."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.explainer = Explainer(classifier("pool-linear", self.device).model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = torch.from_numpy(batch["image"]).to(self.device)
        return {"path": batch["path"], "map": self.explainer(images).raw.half().cpu().numpy()}


def prepared(row: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    return {"path": row["path"], "image": as_people_do()(Image.fromarray(row["image"])).numpy()}


def ray_data(source: Path, work: Path, count: int, device: torch.device, settings: Settings, rounds: int = 3) -> dict[str, Any]:
    """Pictures/s of the job over those of Ray Data on as many cores, by the clock: of whole jobs, and of further pictures.

    Both do a short data set and a long one. What a picture costs once all is started is the difference of the two by that of
    their lengths.
    """
    import pyarrow
    import ray
    from pyarrow import parquet

    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    cores = len(os.sched_getaffinity(0))
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=512 << 20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    files = [str(file) for file in sorted(source.glob("*.jpg"))]
    short = 2 * BLOCK
    long = short + max(count // BLOCK, 2) * BLOCK
    ours = runner(ShardRunner, classifier("pool-linear", device), source, work / "beside-ray", settings)
    place = work / "ray"

    def by_ray(pictures: int) -> None:
        shutil.rmtree(place, ignore_errors=True)
        gpu: dict[str, Any] = {"num_gpus": 1} if device.type == "cuda" else {"num_cpus": 1}
        data = ray.data.read_images(files[:pictures], mode="RGB", include_paths=True).map(prepared)
        data = data.map_batches(
            Explain,
            fn_constructor_args=(device.type,),
            batch_size=settings.batch_size,
            compute=ray.data.ActorPoolStrategy(size=1),
            **gpu,
        )
        data.write_parquet(str(place))

    def by_job(pictures: int) -> None:
        for _ in ours.run_all(range(pictures // BLOCK)):
            pass

    spent_of_all = ProcessorTime()
    contenders: dict[str, Callable[[int], None]] = {"attribute": by_job, RAY: by_ray}
    try:
        for each in contenders.values():
            each(short)
        table = pyarrow.concat_tables([parquet.read_table(file) for file in sorted(place.rglob("*.parquet"))])
        rows = dict(zip(table.column("path").to_pylist(), table.column("map").combine_chunks().to_numpy_ndarray(), strict=True))
        chosen = torch.stack([torch.from_numpy(rows[file]) for file in files[:BLOCK]])
        distance = agrees(RAY, chosen, maps_of_part(work / "beside-ray"))
        measured: dict[str, dict[str, list[float]]] = {
            name: {"short": [], "long": [], "short_cpu": [], "long_cpu": []} for name in contenders
        }
        for number in range(rounds):
            for name in list(contenders)[:: (-1) ** number]:
                for length, pictures in (("short", short), ("long", long)):
                    spent = spent_of_all if name == RAY else time.process_time  # its daemons idle beside the job
                    began = time.perf_counter(), spent()
                    contenders[name](pictures)
                    measured[name][length].append(time.perf_counter() - began[0])
                    measured[name][f"{length}_cpu"].append(spent() - began[1])
    finally:
        ours.close()
        spent_of_all.close()
        ray.shutdown()

    def further(name: str, unit: str = "") -> float:
        """Seconds of a picture that is not among the first."""
        pairs = zip(measured[name][f"short{unit}"], measured[name][f"long{unit}"], strict=True)
        return statistics.median(b - a for a, b in pairs) / (long - short)

    found: dict[str, Any] = {"pictures": [short, long], "cores": cores}
    for name, seconds in measured.items():
        found[name] = {
            "times": further(name) / further("attribute"),
            "times_cpu": further(name, "_cpu") / further("attribute", "_cpu"),
            "times_whole_job": statistics.median(
                b / a for a, b in zip(measured["attribute"]["long"], seconds["long"], strict=True)
            ),
            **{f"seconds_{unit}": values for unit, values in seconds.items()},
        }
    found[RAY]["maps_off"] = distance
    row = found[RAY]
    print(f"{row['times']:.2f} × {RAY} by the clock, {row['times_cpu']:.2f} by CPU seconds", flush=True)
    return found


class ProcessorTime:
    """CPU seconds of this process and of all below it, by looking ten times a second.

    Ray does not wait for its workers, so that the kernel forgets what they have used. The last tenth of a second of each that
    ends is not seen.
    """

    def __init__(self) -> None:
        self._spent: dict[tuple[int, str], float] = {}
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def __call__(self) -> float:
        self._look()
        return time.process_time() + sum(self._spent.values())

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self._look()

    def _look(self) -> None:
        below: dict[int, list[tuple[int, str]]] = {}
        ticks: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            below.setdefault(int(fields[1]), []).append((int(entry.name), fields[19]))
            ticks[int(entry.name)] = int(fields[11]) + int(fields[12])
        with self._lock:
            waiting = [os.getpid()]
            while waiting:
                for process, began in below.get(waiting.pop(), []):
                    self._spent[process, began] = ticks[process] / os.sysconf("SC_CLK_TCK")
                    waiting.append(process)


# ------------------------------------------------------------------------------------------------------------- the page

BEGIN, END = "<!-- loops: written by bench.attribute -->\n", "<!-- /loops -->"


def section(result: dict[str, Any]) -> str:
    """The loops' part of docs/data_sets.md."""
    rows = [(name, row) for name, row in result["loops"].items() if name != "attribute"]
    lines = ["", "| the job's pictures/s over | |", "| --- | --- |"]
    lines += [f"| {name} | {row['times']:.2f} × |" for name, row in rows]
    row = result["loops"][GRAD_CAM]
    said = [f"The loop of pytorch-grad-cam was to be three times slower, and is{'' if row['times'] >= 3 else ' not'}."]
    if "times_of_prediction" in row:
        said.append(
            f"A job that only predicts is {row['times_of_prediction']:.2f} times as fast as it, and the network alone, with "
            f"nothing to decode and nothing to write, {row['times_of_forward']:.2f} times"
            + (": no job that runs this network as it is can reach it here." if row["times_of_forward"] < 3 else ".")
        )
    if "ray" in result:
        row, (short, long) = result["ray"][RAY], result["ray"]["pictures"]
        lines.append(f"| {RAY}, {result['ray']['cores']} cores, by the clock | {row['times']:.2f} × |")
        said.append(
            f"Ray Data's figure is that of a further picture, {long} pictures against {short}, as its start takes seconds: "
            f"{row['times']:.2f} × by the clock, {row['times_cpu']:.2f} × in CPU seconds of all its processes; the whole job "
            f"of {long}, with its actor's start, is {row['times_whole_job']:.1f} ×."
        )
    return "\n".join([*lines, "", *textwrap.wrap(" ".join(said), 128), ""]) + "\n"


def write_section(page: Path, result: dict[str, Any]) -> None:
    """Put it between its marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    if not rest:
        raise SystemExit(f"{page} has no mark {BEGIN!r}.")
    after = rest.partition(END)[2]
    page.write_text(before + BEGIN + section(result) + END + after, encoding="utf-8")
