"""The classes against pytorch-grad-cam's own, in float64 on both sides."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from shapleycam import InputError, LayerError, ModelStateError, ShapleyCamWarning, TargetError, compat
from shapleycam.compat import explainers
from shapleycam.compat.explainers import principal_map

peer = pytest.importorskip("pytorch_grad_cam")
peer_targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")

METHODS = (
    "ShapleyCAM",
    "GradCAM",
    "HiResCAM",
    "GradCAMElementWise",
    "XGradCAM",
    "LayerCAM",
    "GradCAMPlusPlus",
    "RandomCAM",
    "EigenCAM",
    "EigenGradCAM",
    "ScoreCAM",
    "AblationCAM",
)
#: Hundreds of forward passes on the other side.
ASK_THE_MODEL = ("ScoreCAM", "AblationCAM")
CLOSE = {"rtol": 0, "atol": 2e-6}
#: Where a gradient that is negative all over the image makes channels of the weighted activations zero.
SIGN_IS_CHANCE = {("LayerCAM", "Pooled"), ("GradCAMPlusPlus", "Pooled")}


class Mixed:
    """A target of one's own, which no utility of the package has."""

    def __init__(self, category):
        self.category = category

    def __call__(self, output):
        return output[self.category] ** 2 / 20 + output.softmax(-1)[0]


TARGETS = {
    "predicted": lambda library: None,
    "logit": lambda library: [library.ClassifierOutputTarget(c) for c in (0, 3, 5)],
    "probability": lambda library: [library.ClassifierOutputSoftmaxTarget(c) for c in (0, 3, 5)],
    "rest": lambda library: [library.ClassifierOutputReST(c) for c in (0, 3, 5)],
    "own": lambda library: [Mixed(c) for c in (0, 3, 5)],
    "of two kinds": lambda library: [library.ClassifierOutputTarget(0), Mixed(1), library.ClassifierOutputReST(2)],
    "from the end": lambda library: [library.ClassifierOutputTarget(-1)] * 3,
    "more than images": lambda library: [library.ClassifierOutputTarget(c) for c in (0, 3, 5, 1)],
}


@pytest.fixture(autouse=True)
def _expected_warning():
    # A logit over a piecewise-linear head makes ShapleyCAM equal GradCAM: tested for itself below.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShapleyCamWarning)
        yield


def run(library, name, model, layers, images, targets, **options):
    np.random.seed(0)  # noqa: NPY002
    with getattr(library, name)(model=model, target_layers=layers) as cam:
        return cam(input_tensor=images, targets=targets, **options), cam


#: All kinds of targets once; smoothing, and the methods that take seconds on the other side, with a few.
COMBINATIONS = [
    (name, kind, eigen_smooth)
    for name in METHODS
    for kind in TARGETS
    for eigen_smooth in (False, True)
    if kind in ("predicted", "own") or not (eigen_smooth or name in ASK_THE_MODEL)
]


@pytest.mark.parametrize(("name", "kind", "eigen_smooth"), COMBINATIONS)
def test_maps_are_pytorch_grad_cams(model, images, name, kind, eigen_smooth, monkeypatch):
    theirs, their_cam = run(peer, name, model, [model.second], images, TARGETS[kind](peer_targets), eigen_smooth=eigen_smooth)
    ours, cam = run(compat, name, model, [model.second], images, TARGETS[kind](compat), eigen_smooth=eigen_smooth)
    assert ours.dtype == np.float32 and ours.shape == (3, 20, 28) and type(ours) is np.ndarray
    assert ours.std() > 0.05, "a dead map proves nothing"
    if eigen_smooth and (name, type(model).__name__) in SIGN_IS_CHANCE:
        # Rounding decides between the two: see the test below.
        monkeypatch.setattr(explainers, "principal_map", lambda weighted: -principal_map(weighted))
        turned, _ = run(compat, name, model, [model.second], images, TARGETS[kind](compat), eigen_smooth=True)
        monkeypatch.undo()
        same = np.abs(ours - theirs).max((1, 2), keepdims=True) < np.abs(turned - theirs).max((1, 2), keepdims=True)
        np.testing.assert_allclose(np.where(same, ours, turned), theirs, **CLOSE)
    else:
        np.testing.assert_allclose(ours, theirs, **CLOSE)
    torch.testing.assert_close(cam.outputs, their_cam.outputs.detach())
    # pytorch-grad-cam's own targets are as good as ours.
    again, _ = run(compat, name, model, [model.second], images, TARGETS[kind](peer_targets), eigen_smooth=eigen_smooth)
    np.testing.assert_array_equal(again, ours)


def test_the_sign_of_a_component_with_dead_channels_is_chance():
    """One rounding of pytorch-grad-cam's own input turns its own component round, so nobody can promise the same sign."""
    projection = pytest.importorskip("pytorch_grad_cam.utils.svd_on_activations").get_2d_projection
    generator = np.random.default_rng(0)
    weighted = generator.standard_normal((1, 10, 5, 7))
    weighted[:, [0, 2, 3, 5, 6, 7, 8]] = 0
    found = [projection(weighted * (1 + 1e-16 * generator.standard_normal(weighted.shape))) for _ in range(40)]
    turned = [f for f in found if np.abs(f + found[0]).max() < 1e-6]
    assert turned and all(np.abs(np.abs(f) - np.abs(found[0])).max() < 1e-6 for f in found)


@pytest.mark.parametrize("eigen_smooth", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_smoothing_by_augmentation(model, images, name, eigen_smooth):
    if eigen_smooth and (name, type(model).__name__) in SIGN_IS_CHANCE:
        return  # six maps with a sign each; their parts are compared above
    options = {"aug_smooth": True, "eigen_smooth": eigen_smooth}
    theirs, their_cam = run(peer, name, model, [model.second], images, None, **options)
    ours, cam = run(compat, name, model, [model.second], images, None, **options)
    np.testing.assert_allclose(ours, theirs, **CLOSE)
    torch.testing.assert_close(cam.outputs, their_cam.outputs.detach())


def test_augmentations_of_ones_own(curved, images):
    tta = pytest.importorskip("ttach")
    found = []
    for library in (peer, compat):
        cam = library.GradCAM(curved, [curved.second])
        cam.tta_transforms = tta.Compose([tta.VerticalFlip(), tta.Multiply(factors=[1, 2])])
        found.append(cam(images, None, aug_smooth=True))
    np.testing.assert_allclose(found[1], found[0], **CLOSE)


@pytest.mark.parametrize("name", METHODS)
def test_two_layers(curved, images, name):
    targets = [compat.ClassifierOutputReST(c) for c in (1, 2, 3)]
    ours, _ = run(compat, name, curved, [curved.first, curved.second], images, targets)
    if name == "ShapleyCAM":
        with pytest.raises(RuntimeError, match="second time"):
            run(peer, name, curved, [curved.first, curved.second], images, targets)
        # So its maps one at a time, put together as it puts those of other methods together.
        parts = []
        for layer in (curved.first, curved.second):
            cam = peer.ShapleyCAM(curved, [layer])
            whole = cam.aggregate_multi_layers
            cam.aggregate_multi_layers = lambda maps: maps
            parts += cam(images, targets)
        theirs = whole(parts)
    else:
        theirs, _ = run(peer, name, curved, [curved.first, curved.second], images, targets)
    np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_volumes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(1, 5, 3, stride=2, padding=1), nn.SiLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(40, 4)
    )
    volumes = torch.randn(2, 1, 8, 10, 12, dtype=torch.float64)
    found = [
        run(library, name, model.double(), [model[1]], volumes, None, **options)[0]
        for name in ("GradCAM", "XGradCAM")
        for options in ({}, {"eigen_smooth": True}, {"aug_smooth": True})
        for library in (peer, compat)
    ]
    for theirs, ours in zip(found[::2], found[1::2], strict=True):
        assert ours.shape == (2, 8, 10, 12) and ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_segmentation():
    """A wrapped segmentation model, explained over a mask of pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.SiLU(), nn.Conv2d(6, 4, 3, padding=1), nn.Upsample(scale_factor=2)
    )
    images = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    masks = [np.float32(np.arange(192).reshape(12, 16) % k == 0) for k in (2, 3)]
    for name in ("GradCAM", "HiResCAM", "LayerCAM"):
        theirs, ours = (
            run(library, name, model.double(), [model[1]], images, [targets.SemanticSegmentationTarget(2, m) for m in masks])[0]
            for library, targets in ((peer, peer_targets), (compat, compat))
        )
        assert ours.std() > 0.05
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_binary_classifier_with_one_output():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1)
    ).double()
    images = torch.randn(2, 1, 12, 16, dtype=torch.float64)
    theirs, ours = (
        run(
            library,
            "GradCAM",
            model,
            [model[1]],
            images,
            [t.BinaryClassifierOutputTarget(1), t.BinaryClassifierOutputTarget(0)],
        )[0]
        for library, t in ((peer, peer_targets), (compat, compat))
    )
    np.testing.assert_allclose(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", ["GradCAM", "ShapleyCAM"])
def test_activations_and_gradients(model, images, name):
    found = []
    for library in (peer, compat):
        cam = getattr(library, name)(model, [model.second])
        cam(images, [library.utils.model_targets.ClassifierOutputReST(c) for c in (1, 2, 3)])
        kept = cam.activations_and_grads
        found.append((list(kept.activations), list(kept.gradients)))
    for theirs, ours in zip(*found, strict=True):
        assert len(ours) == 1
        # Its ShapleyCAM leaves the Hessian-vector product in front of the gradient.
        torch.testing.assert_close(ours[0], theirs[-1].detach())
    cam.activations_and_grads.release()
    assert cam.activations_and_grads.activations == []


@pytest.mark.parametrize("kind", ["predicted", "rest", "own"])
@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_aumann_shapley_is_the_mean_of_their_gradients_along_the_path(model, images, kind, baseline):
    """Their own GradCAM is asked for the gradients at each node, with the target layer's output replaced."""
    targets = TARGETS[kind](peer_targets)
    seen = {}
    hook = model.second.register_forward_hook(lambda m, i, o: seen.update(a=o.detach()))
    logits = model(images)
    hook.remove()
    targets = targets or [peer_targets.ClassifierOutputTarget(int(c)) for c in logits.argmax(1)]
    start = torch.zeros_like(seen["a"]) if baseline == "zero" else seen["a"].mean((2, 3), keepdim=True).expand_as(seen["a"])
    nodes, shares = np.polynomial.legendre.leggauss(3)
    weights = torch.zeros_like(seen["a"])
    for node, share in zip((nodes + 1) / 2, shares / 2, strict=True):
        here = start + node * (seen["a"] - start)
        hook = model.second.register_forward_hook(lambda m, i, o, here=here: here + 0 * o)
        cam = peer.GradCAM(model, [model.second])
        cam(images, targets)
        weights += share * cam.activations_and_grads.gradients[0].detach()
        cam.activations_and_grads.release()
        hook.remove()
    raw = (weights.mean((2, 3), keepdim=True) * (seen["a"] - start)).sum(1)
    ours = compat.AumannShapleyCAM(model, [model.second], nodes=3, baseline=baseline)
    found = ours(images, TARGETS[kind](compat))
    expected = peer.base_cam.scale_cam_image(np.maximum(raw.numpy(), 0), images.shape[:1:-1])
    np.testing.assert_allclose(found, peer.base_cam.scale_cam_image(expected), rtol=0, atol=5e-6)
    assert found.max() > 0.9
    kept = ours.activations_and_grads
    torch.testing.assert_close(kept.activations[0], seen["a"])


def test_aumann_shapley_refuses_what_it_cannot(curved):
    with pytest.raises(InputError, match="nodes must be a whole number from 1 to 32"):
        compat.AumannShapleyCAM(curved, [curved.second], nodes=0)
    with pytest.raises(InputError, match="Unknown baseline 'blur'"):
        compat.AumannShapleyCAM(curved, [curved.second], baseline="blur")


def test_recognised_targets_are_not_called_one_by_one(curved, images, monkeypatch):
    expected = compat.GradCAM(curved, [curved.second])(images, [lambda output: output[2]] * 3)
    calls = []
    monkeypatch.setattr(compat.ClassifierOutputTarget, "__call__", lambda self, output: calls.append(output))
    found = compat.GradCAM(curved, [curved.second])(images, [compat.ClassifierOutputTarget(2)] * 3)
    assert not calls
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_a_subclass_is_asked(curved, images):
    class Negated(compat.ClassifierOutputTarget):
        def __call__(self, output):
            return -super().__call__(output)

    plain = compat.GradCAM(curved, [curved.second])(images, [compat.ClassifierOutputTarget(2)] * 3)
    negated = compat.GradCAM(curved, [curved.second])(images, [Negated(2)] * 3)
    assert np.abs(plain - negated).max() > 0.1


def test_the_model_is_left_alone_and_the_object_stays_usable(curved, images):
    curved.train()
    curved.first[0].weight.grad = torch.ones_like(curved.first[0].weight)
    with compat.ShapleyCAM(curved, [curved.second]) as cam:
        before = cam(images, [compat.ClassifierOutputReST(1)] * 3)
    assert not curved.training, "as pytorch-grad-cam, which its README relies on"
    assert (curved.first[0].weight.grad == 1).all() and not any(m._forward_hooks for m in curved.modules())
    np.testing.assert_array_equal(cam(images[:2], [compat.ClassifierOutputReST(1)] * 2), before[:2])
    with torch.inference_mode():
        np.testing.assert_array_equal(cam(images, [compat.ClassifierOutputReST(1)] * 3), before)


def test_no_exception_is_swallowed(curved, images):
    with pytest.raises(IndexError, match="mine"), compat.GradCAM(curved, [curved.second]):
        raise IndexError("mine")


def test_shapleycam_of_logits_over_a_linear_head_warns(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShapleyCamWarning)
        with pytest.raises(ShapleyCamWarning, match="Hessian term is zero"):
            compat.ShapleyCAM(model, [model[1]])(images)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda cam, x: cam(x, [lambda o: o[0]]), TargetError, "1 targets for 3 images"),
        (lambda cam, x: cam(x, [281, 1, 2]), TargetError, r"ClassifierOutputTarget\(281\), got 281"),
        (lambda cam, x: cam(x, lambda o: o[0]), TargetError, "got function"),
        (lambda cam, x: cam(x, [compat.RawScoresOutputTarget()] * 3), TargetError, r"one value .*shape \(6,\)"),
        (lambda cam, x: cam(x, [lambda o: 1.0] * 3), TargetError, "returned float"),
        (lambda cam, x: cam(x, [compat.ClassifierOutputTarget(6)] * 3), TargetError, "target 6 is out of range"),
        (lambda cam, x: cam(x.numpy()), InputError, "ndarray"),
        (lambda cam, x: cam(x[0]), InputError, "empty|rank|dimensions|None"),
        (lambda cam, x: cam(x[:0]), InputError, "empty batch"),
    ],
)
def test_mistakes(curved, images, call, error, match):
    cam = compat.ShapleyCAM(curved, [curved.second])
    with pytest.raises(error, match=match):
        call(cam, images)
    assert not any(m._forward_hooks for m in curved.modules())


def test_mistakes_in_the_constructor(curved):
    with pytest.raises(LayerError, match="not part of the model"):
        compat.GradCAM(curved, [nn.Identity()])
    with pytest.raises(LayerError, match="empty"):
        compat.GradCAM(curved, [])
    with pytest.raises(ModelStateError, match=r"nn\.Module"):
        compat.GradCAM(lambda x: x, [curved.second])


def test_nan_is_not_hidden(curved, images):
    images[1, 0, 0, 0] = float("nan")
    for options in ({}, {"eigen_smooth": True}):
        maps = compat.GradCAM(curved, [curved.second])(images, None, **options)
        assert np.isnan(maps[1]).all() and np.isfinite(maps[[0, 2]]).all()


def test_names_that_are_elsewhere(monkeypatch):
    from shapleycam.compat import FullGrad

    assert FullGrad is peer.FullGrad
    monkeypatch.setitem(__import__("sys").modules, "pytorch_grad_cam", None)
    from shapleycam.compat import FullGrad as Absent

    with pytest.raises(InputError, match="install grad-cam"):
        Absent(model=None, target_layers=[])
    with pytest.raises(ImportError):
        from shapleycam.compat import NoSuchCAM  # noqa: F401


def test_every_public_name_of_the_original_is_there():
    for name in vars(peer):
        if isinstance(getattr(peer, name), type) and name != "ActivationsAndGradients":
            assert hasattr(compat, name), name
    for name in vars(peer_targets):
        if isinstance(getattr(peer_targets, name), type):
            assert hasattr(compat.utils.model_targets, name), name
