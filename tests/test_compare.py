"""One pass for several methods gives what one explainer per method gives."""

from dataclasses import replace

import pytest
import torch

from shapleycam import METHODS, UTILITIES, Explainer, InputError, ShapleyCamWarning
from shapleycam.methods import PAPER_METHODS

from .helpers import Split, small_heads, toy

PAPER = list(PAPER_METHODS)


@pytest.mark.filterwarnings("ignore::shapleycam.ShapleyCamWarning")
@pytest.mark.parametrize("head", small_heads())
@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("targets", [None, [[0, 1], [4, 2], [3, 3]]])
def test_the_same_maps_as_separate_explainers(images, head, utility, targets):
    torch.manual_seed(2)
    model = Split(*small_heads()[head]).double().eval()
    images = images.double()
    together = Explainer(model, layer="target", utility=utility).compare(images, targets)
    assert list(together) == PAPER
    for name, mine in together.items():
        alone = Explainer(model, layer="target", utility=utility, method=name)(images, targets)
        assert float(alone.raw.abs().max()) > 0
        torch.testing.assert_close(mine.raw, alone.raw, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mine.heatmaps(), alone.heatmaps(), rtol=0, atol=1e-6)
        assert torch.equal(mine.targets, alone.targets)
        # Fused attention in the one, its math kernel (for the second derivative) in the other.
        torch.testing.assert_close(mine.logits, alone.logits, rtol=0, atol=1e-12)
        # The note names one of the second-order methods.
        assert replace(mine.diagnostics, notes=()) == replace(alone.diagnostics, notes=())
        assert len(mine.diagnostics.notes) == len(alone.diagnostics.notes)


@pytest.mark.parametrize("methods", [("shapleycam", "shapleycam-e"), ("gradcam", "layercam"), ("randomcam",)])
def test_bitwise_where_all_methods_need_the_same_order(images, methods):
    model = Split(*small_heads()["pool-linear"]).eval()
    together = Explainer(model, layer="target").compare(images, 1, methods)
    for name in methods:
        assert torch.equal(together[name].raw, Explainer(model, layer="target", method=name)(images, 1).raw)


def test_one_forward_pass_whatever_the_number_of_methods(images):
    model = toy()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    explainer = Explainer(model, layer="2", method="gradcam")
    explainer.compare(images)  # studies the model
    passes.clear()
    explainer.compare(images)
    assert len(passes) == 1


def test_reseed_repeats_randomcam(images):
    explainer = Explainer(toy(), layer="2")
    explainer.reseed(5)
    first = explainer.compare(images, methods="randomcam")["randomcam"].raw
    assert not torch.equal(first, explainer.compare(images, methods="randomcam")["randomcam"].raw)
    explainer.reseed(5)
    assert torch.equal(first, explainer.compare(images, methods="randomcam")["randomcam"].raw)
    assert torch.equal(first, Explainer(toy(), layer="2", method="randomcam", seed=5)(images).raw)


def test_the_note_on_a_flat_hessian_stays_with_the_second_order(images):
    model = Split(*small_heads()["pool-linear"]).eval()
    with pytest.warns(ShapleyCamWarning, match="Hessian term is zero"):
        both = Explainer(model, layer="target", utility="logit", method="gradcam").compare(
            images, methods=("gradcam", "shapleycam")
        )
    assert both["shapleycam"].diagnostics.notes and not both["gradcam"].diagnostics.notes


@pytest.mark.parametrize("methods", [(), ("gradcam", "GradCAM"), ("gradcam", "no-such")])
def test_refuses(images, methods):
    with pytest.raises(InputError):
        Explainer(toy(), layer="2").compare(images, methods=methods)


def test_the_paper_has_eleven_methods():
    assert len(PAPER) == 11 and set(PAPER) <= set(METHODS)
