"""Exports beside each other, and beside explanations of the same model."""

import threading

import pytest
import torch

from shapleycam import Explainer
from shapleycam.export import export, load
from shapleycam.export.interface import Interface

from ..helpers import network
from .conftest import CLASSES


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.long)])
def test_exports_and_explanations_at_once(example, tmp_path, suffix):
    """The tracer swaps a model's weights for fakes; a thread that explains the model is not to meet them."""
    model = network(curved=False, classes=CLASSES)
    explainer = Explainer(model, backend="torch")
    expected = explainer(example)
    wrong, stop, calls = [], threading.Event(), 0

    def write(name):
        try:
            export(Explainer(model), example, tmp_path / f"{name}{suffix}")
        except BaseException as error:
            wrong.append(error)

    writers = [threading.Thread(target=write, args=(name,)) for name in "ab"]

    def explain():
        nonlocal calls
        try:
            while not stop.is_set():
                torch.testing.assert_close(explainer(example).raw, expected.raw)
                calls += 1
        except BaseException as error:
            wrong.append(error)

    reader = threading.Thread(target=explain)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert wrong == [] and calls > 10
    assert not any(module._forward_hooks for module in model.modules())
    for name in "ab":
        torch.testing.assert_close(load(tmp_path / f"{name}{suffix}").explain(example).logits, expected.logits)


def test_a_feature_vector_is_that_of_its_own_call(example):
    class Interrupted(torch.nn.Module):
        """In the middle of a call another thread runs the model on other images."""

        def __init__(self):
            super().__init__()
            self.inner, self.others = network(curved=False, classes=CLASSES), None

        def forward(self, images):
            if self.others is not None:
                others, self.others = self.others, None
                thread = threading.Thread(target=self.inner, args=(others,))
                thread.start()
                thread.join()
            return self.inner(images)

    model = Interrupted().eval()
    explainer = Explainer(model)
    program = explainer.program(example)
    diagnostics = explainer(example).diagnostics
    interface = Interface(program, ("prediction", "feature_vector"), "raw", None, diagnostics.layers[0], diagnostics.layouts[0])
    expected = interface(example)[1]
    model.others = example + 1
    assert torch.equal(interface(example)[1], expected)
    assert not torch.equal(interface(example + 1)[1], expected)
