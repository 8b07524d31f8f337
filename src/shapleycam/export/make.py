"""Making an artefact: program, trace, write, check, name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from .._version import __version__
from ..data.images import Preprocess
from ..errors import ExportError, InputError
from ..explainer import Explainer
from ..optional import need
from ..program.graph import SIZE, TRACING, one_size, plainly, said
from ..program.sizes import counterexamples, other_sizes, resized
from .artefact import Artefact, load
from .check import BATCHES, TOLERANCE, Reference, as_pixels, check, examples, judge
from .files import written
from .formats import check_runtimes, format_for
from .interface import MAPS, TARGETS, Interface, check_choice, check_outputs, input_ports, output_ports
from .metadata import Metadata, weights_checksum
from .pixels import Pixels
from .tracing import trace


def export(
    explainer: Explainer,
    images: Tensor,
    path: str | Path,
    *,
    format: str = "auto",
    targets: str = "predicted",
    maps: str = "image",
    outputs: Sequence[str] = ("prediction", "saliency_map"),
    prediction: str = "prediction",
    preprocess: Preprocess | None = None,
    pixels: bool = False,
    resize: bool = False,
    dynamic_size: bool = False,
    classes: Sequence[str] = (),
    name: str | None = None,
    opset: int | None = None,
    runtimes: Sequence[str] = (),
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
) -> Artefact:
    """Write a file that predicts and explains without this package.

    The file is run in its runtime, on one image and on three, and compared with the explainer in float64, before it gets
    its name; whatever goes wrong, ``path`` is as it was.

    Args:
        explainer: what is exported; its model is not changed.
        images: a few of [N, channels, H, W] as the explainer takes them (normalised), for the study of the model and for the
            comparison. Of their size, the artefact takes any number.
        path: of the file, ending in .onnx or .pt2.
        format: "onnx" (ONNX Runtime, OpenVINO, …), "pt2" (``torch.export.load``) or "aoti" (compiled for this kind of machine;
            Python and C++); "auto" goes by the ending, and takes .pt2 for "pt2".
        targets: which classes are explained: "predicted"; "given" by a second input ``target``, int64 [N] (-1 is the predicted
            class, any other index that is no class gives a map of NaN); "several", the same with int64 [N, M]; or "all".
        maps: what ``saliency_map`` is: "image" for the display form in [0, 1] at the image's size, "layer" for that at the
            target layer's, or "raw" for the signed map.
        outputs: some of "prediction" (logits), "saliency_map", "raw_map" (signed), "target_class" and "feature_vector" (mean
            over the positions of the target layer's output).
        prediction: what the output "prediction" is called in the file.
        preprocess: how the model's images are made from pictures, for the metadata, and for what follows.
        pixels: take decoded pixels of the model's size, uint8 [N, H, W, 3], and normalise them inside.
        resize: take decoded pictures of any size, and resize and crop them inside as ``preprocess.view`` does with the Pillow
            that is installed, to the same levels.
        dynamic_size: take images of any height and width, as they are, from a least one on (``metadata.least_size``), which
            depends on the model; maps follow. For convolutional models; the file is compared at three sizes more, and wherever
            something would be decided otherwise by the size.
        classes: the names of the classes, for the metadata.
        name: of the model, for the metadata; its class's by default.
        opset: of ONNX; 18 by default.
        runtimes: where the file is checked: "onnxruntime" and "openvino" for ONNX, "torch" for the others; ONNX Runtime or
            PyTorch if none is named.
        tolerance: the relative error up to which the artefact is accepted.
        overwrite: replace a file that is there.

    Returns:
        The artefact, opened in its runtime.

    Raises:
        ExportError: the explainer has no program (of any size, where that is wanted), the model does not trace, the format
            lacks an operator, the artefact is off by more than the tolerance, or the path exists or cannot be written.
        InputError: an unknown choice, a package that is missing, or images that do not fit the preprocessing.
        LayerError, ModelStateError, DerivativeError: as calling the explainer.
    """
    path = Path(path)
    form = format_for(format, path)
    check_choice("targets", targets, TARGETS)
    check_choice("maps", maps, MAPS)
    names, wanted = check_outputs(outputs), check_runtimes(form, runtimes)
    if not prediction.isidentifier() or prediction in (*names[1:], "image", "target"):
        raise InputError(f"prediction must be a name that no other input or output has, got {prediction!r}.")
    if dynamic_size and resize:
        raise InputError("resize=True takes pictures of any size and makes them the model's: leave out dynamic_size=True.")
    front = _front(preprocess, pixels, resize, images)
    versions = _versions((*form.packages(), *wanted, *(("PIL",) if resize else ())))
    # Inference mode and autocast around the call would be in the file, or in what it is compared with.
    with written(path, overwrite) as temporary, torch.inference_mode(False), plainly(images.device):
        program = explainer.program(
            images,
            targets="given" if targets == "several" else targets,
            size="image" if maps == "image" else "layer",
            dynamic_size=dynamic_size,
        )
        diagnostics = explainer(images[:1]).diagnostics
        if len(diagnostics.layers) != 1:
            raise ExportError(f"An artefact has one target layer, and the explainer has {list(diagnostics.layers)}.")
        interface = Interface(program, names, maps, front, diagnostics.layers[0], diagnostics.layouts[0])
        shape = (images.shape[1], *SIZE) if dynamic_size else images.shape[1:]
        inputs = input_ports(targets, shape, front, images.dtype)
        batches = [_inputs(images, count, front, seed=count) for count in (2, *BATCHES)]
        if dynamic_size:
            # The tracer's example is oblong, so that height and width are two numbers, and none that another dimension has.
            others = [resized(images, size) for size in other_sizes(tuple(images.shape[2:]), program.least)]
            batches[0] = _inputs(others[1], 2, front, seed=2)
            batches += [_inputs(other, count, front, seed=count) for other, count in zip(others, (2, 1, 3), strict=True)]
        probe = [batches[0]]
        with torch.no_grad():
            if targets in ("given", "several"):
                probe.append(torch.zeros((2,) if targets == "given" else (2, 2), dtype=torch.int64))
            values = interface(*(each.to(images.device) for each in probe))
        number = values[names.index("prediction")].shape[1]
        if classes and len(classes) != number:
            raise InputError(f"classes has {len(classes)} names, and the model {number} classes.")
        metadata = Metadata(
            format=form.name,
            inputs=inputs,
            outputs=output_ports(names, values, targets, maps, prediction, dynamic_size),
            targets=targets,
            maps=maps,
            image_size=tuple(images.shape[2:]),
            preprocess=None if preprocess is None else asdict(preprocess),
            classes=tuple(classes),
            model=name or type(explainer.model).__name__,
            weights=weights_checksum(explainer.model),
            layer=diagnostics.layers,
            method=diagnostics.method,
            utility=diagnostics.utility,
            engine=diagnostics.engine,
            baseline=diagnostics.baseline,
            nodes=diagnostics.nodes,
            versions=versions,
            least_size=program.least,
        )
        traced = [torch.zeros_like(probe[0]), *probe[1:]]  # an exported program keeps its examples: not the user's images
        exported = trace(
            interface, inputs, [each.to(images.device) for each in traced], dict(zip(SIZE, program.least, strict=False))
        )
        with TRACING:
            form.write(exported, temporary, metadata, opset)
        doubtful = {}
        if dynamic_size:  # now, as a compiler takes for granted what holds for the example, too
            image = next(node for node in exported.graph.nodes if node.name == exported.graph_signature.user_inputs[0])
            doubtful = counterexamples(image.meta["val"], program.least, (2, 3) if front is None else (1, 2))
        checks, expected = {}, Reference(explainer, preprocess, resize)
        for runtime in wanted:
            run = form.open(temporary, metadata, runtime)
            found = check(run, metadata, expected, batches[1:], tolerance)
            judge(found, runtime)
            checks[runtime] = found.content()
            for (height, width), rule in doubtful.items():
                other = _inputs(resized(images, (height, width)), 1, front, seed=1)
                try:
                    judge(check(run, metadata, expected, [other], tolerance), runtime)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # whatever the model raises on images of that size
                    raise one_size(f"{rule}, which is not so for {height} x {width} ({said(error)[:-1]})") from error
        form.seal(temporary, replace(metadata, checks=checks))
        artefact = load(temporary)
    artefact.path = path
    return artefact


def _front(preprocess: Preprocess | None, pixels: bool, resize: bool, images: Tensor) -> Pixels | None:
    """What stands before the program, where it is not given normalised images."""
    if preprocess is None:
        if pixels or resize:
            raise InputError("pixels=True and resize=True need preprocess=, which says how pictures become images.")
        return None
    if tuple(images.shape[1:]) != (3, *preprocess.crop):
        raise InputError(
            f"preprocess makes images [N, 3, {preprocess.crop[0]}, {preprocess.crop[1]}], and the images given are "
            f"{tuple(images.shape)}."
        )
    return Pixels(preprocess, resize, images.dtype).to(images.device) if pixels or resize else None


def _inputs(images: Tensor, count: int, front: Pixels | None, seed: int) -> Tensor:
    """A batch as the artefact takes it."""
    made = examples(images, count, seed)
    if front is None:
        return made
    levels = as_pixels(made, front.preprocess)
    if not front.resize:
        return levels
    # Wide ones, and ones so high that their columns come first.
    wanted = front.preprocess.resize
    rows, columns = (wanted, wanted) if isinstance(wanted, int) else wanted
    height, width = rows * 5 // 4 + 1, columns * (7 if count < 3 else 5) // 4 + 3
    height = height if count < 3 else 2 * (height + width)
    grown = torch.nn.functional.interpolate(levels.permute(0, 3, 1, 2).float(), (height, width), mode="bilinear")
    return grown.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Of the packages that make the file and of those that it is checked in, as they say themselves.

    Raises:
        InputError: one of them is missing.
    """
    found = {"shapleycam": __version__, "torch": torch.__version__}
    for package in packages:
        if package != "torch":
            extra = {"openvino": "openvino", "PIL": "cli"}.get(package, "export")
            found[package.replace("PIL", "pillow")] = str(getattr(need(package, extra), "__version__", "unknown"))
    return found
