"""What is refused, and what is left behind: nothing."""

import importlib.metadata
import os
import shutil
import sys
import threading
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from shapleycam import Explainer, ExportError, InputError, LayerError
from shapleycam.export import export, files, load, make
from shapleycam.export.formats.onnx import Onnx
from shapleycam.program.graph import shadow

from ..helpers import network
from .conftest import CLASSES, PREPROCESS


class Branching(nn.Module):
    """Control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3)
        self.classifier = nn.Linear(4, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.features(images)
        if features.sum() > 1e9:  # the place
            features = features / 2
        return self.classifier(features.mean((2, 3)))


@pytest.mark.parametrize("name", ["explained.onnx", "explained.pt2"])
def test_data_dependent_control_flow_is_named(example, tmp_path, name):
    with pytest.raises(ExportError, match=r"test_refusals.py:\d+, in forward \(if features.sum\(\) > 1e9"):
        export(Explainer(Branching().eval()), example, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_exists(model, example, tmp_path):
    path = tmp_path / "explained.pt2"
    path.write_text("precious")
    with pytest.raises(ExportError, match="exists: give another name, or overwrite=True"):
        export(Explainer(model), example, path)
    assert path.read_text() == "precious"
    export(Explainer(model), example, path, overwrite=True)
    assert load(path).metadata.format == "pt2"
    assert [each.name for each in tmp_path.iterdir()] == ["explained.pt2"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_that_somebody_makes_meanwhile_stays(model, example, tmp_path, monkeypatch):
    path = tmp_path / "explained.pt2"
    judge = make.judge
    monkeypatch.setattr(make, "judge", lambda *args: (path.write_text("theirs"), judge(*args)))
    with pytest.raises(ExportError, match="meanwhile"):
        export(Explainer(model), example, path)
    assert path.read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


def test_paths_that_cannot_be_written(model, example, tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="No such file or directory"):
        export(Explainer(model), example, tmp_path / "nowhere" / "explained.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        export(Explainer(model), example, tmp_path / "folder.onnx")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ExportError, match="explained.pt2 cannot be written: No space left"):
        export(Explainer(model), example, tmp_path / "explained.pt2")
    assert [each.name for each in tmp_path.iterdir()] == ["folder.onnx"]


def test_nothing_is_left_of_an_artefact_that_is_wrong(model, example, tmp_path, monkeypatch):
    path = tmp_path / "explained.pt2"
    with pytest.raises(ExportError, match=r"in torch it is off by .*\(tolerance=\)"):
        export(Explainer(model), example, path, tolerance=1e-12)
    write = make.trace

    def wrong(interface, inputs, examples, least):
        exported = write(interface, inputs, examples, least)
        for name, value in exported.state_dict.items():
            if name.endswith("5.weight"):
                value.data.mul_(1.001)  # in this program's copy alone
        return exported

    monkeypatch.setattr(make, "trace", lambda interface, *rest: wrong(_own(interface), *rest))
    with pytest.raises(ExportError, match="off by"):
        export(Explainer(model), example, path)
    assert list(tmp_path.iterdir()) == []


def _own(interface):
    import copy

    return copy.deepcopy(interface)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_damaged_artefacts(made, tmp_path, suffix):
    whole = made(suffix, targets="given", maps="raw").path.read_bytes()
    path = tmp_path / f"damaged{suffix}"
    for place in (len(whole) // 3, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(InputError, match="damaged"):
            load(path)
    path.write_bytes(whole[:-7])
    with pytest.raises(InputError, match="damaged|cut short"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="not made by shapleycam"):
        load(path)


def test_foreign_files(made, model, example, tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load(tmp_path / "missing.onnx")
    plain = tmp_path / "plain.onnx"
    torch.onnx.export(model, (example,), f=plain, dynamo=True, external_data=False, verbose=False)
    with pytest.raises(InputError, match="not made by shapleycam"):
        load(plain)
    torch.export.save(torch.export.export(model, (example,)), tmp_path / "plain.pt2")
    with pytest.raises(InputError, match="not made by shapleycam"):
        load(tmp_path / "plain.pt2")


def test_a_newer_layout_is_refused(made, tmp_path):
    """The whole file is well, sealed anew; its metadata are those of a version to come."""
    source = made(targets="given", maps="raw")
    path = shutil.copy(source.path, tmp_path / "newer.onnx")
    from dataclasses import replace

    Onnx().seal(Path(path), replace(source.metadata, layout_version=2))
    with pytest.raises(InputError, match="layout version 2, and this shapleycam reads 1"):
        load(path)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"path": "explained.bin"}, InputError, r"says no format: end it in .onnx or .pt2"),
        ({"format": "tflite"}, InputError, "Unknown format 'tflite'"),
        ({"format": "pt2"}, InputError, r"format 'pt2' end in .pt2"),
        ({"targets": "best"}, InputError, "targets must be one of"),
        ({"maps": "big"}, InputError, "maps must be one of"),
        ({"outputs": ("prediction", "heat")}, InputError, "'heat'"),
        ({"outputs": ("saliency_map",)}, InputError, "must have 'prediction'"),
        ({"outputs": ("prediction",)}, InputError, "'saliency_map' or 'raw_map'"),
        ({"outputs": ("prediction", "raw_map", "raw_map")}, InputError, "twice"),
        ({"prediction": "image"}, InputError, "no other input or output has"),
        ({"resize": True}, InputError, "need preprocess="),
        ({"preprocess": PREPROCESS, "images": torch.zeros(1, 3, 8, 8)}, InputError, r"makes images \[N, 3, 12, 12\]"),
        ({"classes": ["one"]}, InputError, "1 names, and the model 7"),
        ({"path": "explained.pt2", "opset": 18}, InputError, "opset is for ONNX"),
        ({"opset": 3}, ExportError, "opset 3"),
        ({"path": "explained.pt2", "runtimes": ["openvino"]}, InputError, "'pt2' run in 'torch', not in 'openvino'"),
    ],
)
def test_choices_that_there_are_not(model, example, tmp_path, options, error, said):
    path = tmp_path / options.pop("path", "explained.onnx")
    with pytest.raises(error, match=said):
        export(Explainer(model), options.pop("images", example), path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_goes_by_another_name(model, example, tmp_path, monkeypatch):
    """onnxruntime-gpu installs the module onnxruntime, and no distribution of that name."""

    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    about = export(Explainer(model), example, tmp_path / "explained.onnx", maps="raw").metadata
    assert about.versions["onnxruntime"] == onnxruntime.__version__ and about.versions["onnx"] == onnx.__version__


def test_a_package_that_is_missing_is_missed_before_the_work(model, example, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(make, "trace", lambda *_: pytest.fail("traced"))
    with pytest.raises(InputError, match="onnxruntime is not installed"):
        export(Explainer(model), example, tmp_path / "explained.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_copied(example, tmp_path):
    model = network(curved=False, classes=CLASSES)
    model.lock = threading.Lock()
    with pytest.raises(ExportError, match="Sequential cannot be copied"):
        export(Explainer(model), example, tmp_path / "explained.pt2")
    # Tracing copies modules; the comparison copies what the explainer has besides.
    explainer = Explainer(network(curved=False, classes=CLASSES))
    explainer.note = threading.Lock()
    with pytest.raises(ExportError, match="cannot be copied .*, and the comparison with float64 works on a copy"):
        export(explainer, example, tmp_path / "explained.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_meets_a_hook_being_set_is_made_again():
    class Busy(nn.Module):
        met = 0

        def __deepcopy__(self, memo):
            Busy.met += 1
            if Busy.met < 3:
                raise RuntimeError("OrderedDict mutated during iteration")
            return Busy()

    assert isinstance(shadow(Busy(), "Busy"), Busy) and Busy.met == 3


def test_autocast_and_inference_mode_stay_outside_of_the_file(model, example, tmp_path):
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        artefact = export(Explainer(model), example, tmp_path / "explained.pt2", maps="raw", tolerance=1e-5)
    assert artefact.explain(example).logits.dtype == torch.float32
    torch.testing.assert_close(artefact.explain(example).maps, Explainer(model)(example).raw)


def test_the_umask_is_not_touched(model, example, tmp_path, monkeypatch):
    """It is one for all threads."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("os.umask"))
    export(Explainer(model), example, tmp_path / "explained.pt2", maps="raw")


def test_several_layers_are_refused(example, tmp_path):
    model = network(curved=False, classes=CLASSES)
    with pytest.raises(ExportError):
        export(Explainer(model, ["0", "2"]), example, tmp_path / "explained.onnx")


def test_a_layer_whose_module_is_gone(example, tmp_path):
    model = network(curved=False, classes=CLASSES)
    explainer = Explainer(model, "2")
    explainer(example)
    layer = model[2]
    model[2] = nn.Sequential(layer)  # the same module under another name
    export(explainer, example, tmp_path / "same.pt2")
    model[2] = nn.Identity()
    model[1] = nn.Sequential(model[1], layer)  # "2" is another module now, and reads the same
    moved = Explainer(nn.Sequential(*model), "1.1")
    moved.model[1] = nn.Sequential(nn.Sequential(*moved.model[1]))
    with pytest.raises(LayerError, match="1.1"):
        export(moved, example, tmp_path / "explained.pt2")
    assert [each.name for each in tmp_path.iterdir()] == ["same.pt2"]


def test_the_model_is_as_it_was(model, example, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    explainer = Explainer(model)
    export(explainer, example, tmp_path / "explained.pt2")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert flags == {name: value.requires_grad for name, value in model.named_parameters()}
    assert not any(module._forward_hooks for module in model.modules()) and not model.training
    assert all(value.grad is None for value in model.parameters())
    assert explainer(example).raw.dtype == torch.float32
