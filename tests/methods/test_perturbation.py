"""ScoreCAM, AblationCAM and the Eigen methods against their formulas, written out channel by channel in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shapleycam import METHODS, UTILITIES, Explainer, InputError, ShapleyCamWarning
from shapleycam.methods.eigen import principal_map
from shapleycam.methods.perturbation import ABLATION_FLOOR

from ..helpers import Pick, Split, small_heads, toy

HEADS = ["pool-linear", "relu-pool-linear", "conv-bn-silu", "flatten-mlp", "attention"]


def net(name: str) -> nn.Module:
    torch.manual_seed(1)
    target, head = small_heads()[name]
    model = Split(target, head).double().eval()
    with torch.no_grad():  # a softmax that is neither flat nor saturated, so that the utilities differ
        [module for module in model.modules() if isinstance(module, nn.Linear)][-1].weight.mul_(4)
    return model


def utility_of(name: str, z: Tensor, c: int) -> Tensor:
    p = z.softmax(-1)[c]
    return {"logit": z[c], "probability": p, "log_probability": p.log(), "rest": z[c] + p.log()}[name]


def channels_of(a: Tensor, name: str) -> Tensor:
    """One image's activations as [C, S]."""
    return a[0, 1:].T if name == "attention" else a[0].flatten(1)


def ablation_by_hand(model: nn.Module, name: str, image: Tensor, c: int, utility: str, fill=None) -> Tensor:
    with torch.no_grad():
        a = model.target(image)
        base = utility_of(utility, model.head(a.clone())[0], c)
        total = torch.zeros_like(channels_of(a, name)[0])
        for channel in range(channels_of(a, name).shape[0]):
            altered = a.clone()
            altered[(..., channel) if name == "attention" else (slice(None), channel)] = 0.0 if fill is None else fill[channel]
            alpha = (base - utility_of(utility, model.head(altered)[0], c)) / base
            total += alpha * channels_of(a, name)[channel]
    return total


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("name", HEADS)
def test_ablation_is_the_change_of_the_utility(name, utility, images):
    model, images = net(name), images.double()
    classes = torch.tensor([[0, 3], [1, 4], [2, 2]])
    engines = ("auto", "reverse_over_reverse")  # the closed form where there is one, and the head itself
    for engine in engines:
        result = Explainer(model, "target", "ablationcam", utility, engine=engine)(images, classes)
        assert result.diagnostics.engine == "none"
        for i in range(3):
            for m in range(2):
                expected = ablation_by_hand(model, name, images[i : i + 1], int(classes[i, m]), utility)
                assert expected.abs().max() > 1e-3
                torch.testing.assert_close(result.raw[i, m].flatten(), expected, rtol=1e-9, atol=1e-12)


def test_ablation_in_closed_form_runs_no_head(images):
    model = net("pool-linear")
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    explainer = Explainer(model, "target", "ablationcam")
    explainer.prepare(images.double())
    for engine, expected in (("auto", 1), ("reverse_over_reverse", 1 + 1 + 1 + 3)):
        explainer = Explainer(model, "target", "ablationcam", engine=engine, chunk=6)
        explainer.prepare(images.double())
        calls.clear()
        explainer(images.double())
        # One forward pass; then, for the head, one more, one on noise, and 3 x 6 channels in chunks of 6.
        assert len(calls) == expected


def test_ablation_notices_that_the_head_was_edited(images):
    model = net("pool-linear")
    explainer = Explainer(model, "target", "ablationcam", "logit")
    explainer(images.double())
    model.head = nn.Sequential(nn.Softplus(), *model.head)
    result = explainer(images.double(), 2)
    expected = ablation_by_hand(model, "pool-linear", images[:1].double(), 2, "logit")
    torch.testing.assert_close(result.raw[0].flatten(), expected, rtol=1e-9, atol=1e-12)


def test_ablation_by_hand_once():
    a = torch.tensor([[[[1.0, 3.0]], [[4.0, 0.0]]]])  # means 2 and 2
    model = Split(Pick(a), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False)))
    with torch.no_grad():
        model.head[2].weight.copy_(torch.tensor([[3.0, -1.0], [0.0, 1.0]]))  # z = (4, 2)
    result = Explainer(model.eval(), "target", "ablationcam", "logit")(torch.zeros(1, 3, 1, 2), 0)
    # Without channel 0: z_0 = -2, alpha = 6/4; without channel 1: z_0 = 6, alpha = -2/4.
    torch.testing.assert_close(result.raw[0, 0], torch.tensor([1.5 * 1 - 0.5 * 4, 1.5 * 3]))


@pytest.mark.parametrize("engine", ["auto", "reverse_over_reverse"])
@pytest.mark.parametrize("name", ["pool-linear", "flatten-mlp"])
def test_the_floor_is_pytorch_grad_cams(name, engine, images):
    model = net(name)
    result = Explainer(model, "target", ABLATION_FLOOR, "logit", engine=engine)(images.double(), 1)
    with torch.no_grad():
        lowest = model.target(images[:1].double()).min()
    assert lowest < 0
    fill = lowest - 1e7 * torch.arange(1, 7, dtype=torch.float64)  # six channels, all in the first 32
    expected = ablation_by_hand(model, name, images[:1].double(), 1, "logit", fill)
    torch.testing.assert_close(result.raw[0].flatten(), expected, rtol=1e-9, atol=1e-9)
    assert result.diagnostics.method == "ablationcam-floor" and "ablationcam-floor" not in METHODS


def score_by_hand(model: nn.Module, name: str, image: Tensor, c: int, utility: str) -> Tensor:
    with torch.no_grad():
        a = channels_of(model.target(image), name)
        scores = []
        for channel in a:
            mask = nn.Upsample(image.shape[2:], mode="bilinear", align_corners=True)(channel.view(1, 1, 2, 2))
            mask = (mask - mask.min()) / (mask.max() - mask.min() + 1e-8)
            scores.append(utility_of(utility, model(image * mask)[0], c))
        return (torch.stack(scores).softmax(0)[:, None] * a).sum(0)


class Coarse(nn.Module):
    """[N, 3, 6, 4] images to 2 x 2 positions; the first channel is dead for images of a positive mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, (3, 2), (3, 2))

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv(x).relu()
        keep = torch.ones(x.shape[0], 6, 1, 1, dtype=x.dtype)
        keep[x.mean((1, 2, 3)) > 0, ::3] = 0
        return a * keep


@pytest.mark.parametrize("utility", UTILITIES)
def test_scorecam_is_the_softmax_of_the_masked_scores(utility):
    torch.manual_seed(4)
    head = nn.Sequential(nn.Flatten(), nn.Linear(24, 9), nn.Tanh(), nn.Linear(9, 5))
    model = Split(Coarse(), head).double().eval()
    images = torch.randn(4, 3, 6, 4, dtype=torch.float64)
    images[:2] -= 0.5
    images[2:] += 0.5
    classes = torch.tensor([[0, 3], [1, 4], [2, 2], [4, 1]])
    for chunk in (None, 1, 7):
        result = Explainer(model, "target", "scorecam", utility, layout="NCHW", chunk=chunk)(images, classes)
        for i in range(4):
            for m in range(2):
                expected = score_by_hand(model, "", images[i : i + 1], int(classes[i, m]), utility)
                torch.testing.assert_close(result.raw[i, m].flatten(), expected, rtol=1e-10, atol=1e-13)


def test_dead_channels_are_not_asked_one_by_one():
    model = Split(Coarse(), nn.Sequential(nn.Flatten(), nn.Linear(24, 5))).eval()
    images = torch.ones(1, 3, 6, 4)
    seen = []
    with torch.no_grad():
        model.target.conv.bias.fill_(1.0)  # every channel alive but 0 and 3
    model.target.conv.weight.data.abs_()
    explainer = Explainer(model, "target", "scorecam", layout="NCHW")
    explainer.prepare(images)
    model.target.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    explainer(images)
    assert sum(seen) == 1 + 4 + 1  # the image, four live channels, one black image for both dead ones


@pytest.mark.parametrize("name", ["flatten-mlp", "attention"])
def test_a_model_that_flattens_with_view(name):
    """The channels are put last in memory for speed; a model that cannot have that gets what it needs."""

    class View(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], -1)

    torch.manual_seed(0)
    head = nn.Sequential(View(), nn.Linear(24, 5))
    model = Split(nn.Conv2d(3, 6, (3, 2), (3, 2)), head).double().eval()
    images = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    result = Explainer(model, "target", "scorecam", layout="NCHW")(images, 1)
    expected = score_by_hand(model, "", images[:1], 1, "rest")
    torch.testing.assert_close(result.raw[0].flatten(), expected, rtol=1e-10, atol=1e-13)


def principal_by_svd(x: Tensor) -> Tensor:
    """[C, S] to [S] by a singular value decomposition, the entry of largest magnitude positive."""
    x = x.double().T
    x = x - x.mean(0)
    projected = x @ torch.linalg.svd(x).Vh[0]
    return projected * projected[projected.abs().argmax()].sign()


@pytest.mark.parametrize("shape", [(3, 6, 20), (3, 20, 6), (2, 5, 5), (1, 1, 4), (2, 7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_principal_map_is_that_of_a_singular_value_decomposition(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    found = principal_map(x.transpose(1, 2).contiguous().transpose(1, 2))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.stack([principal_by_svd(one) for one in x])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 if dtype != torch.float64 else 1e-10)


def test_the_principal_map_keeps_images_apart():
    x = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(2))
    x[1, 2, 3] = float("nan")
    x[2] = 5.0  # nothing varies
    found = principal_map(x)
    assert found[1].isnan().all()
    assert (found[2].abs() < 1e-6).all()
    for i in (0, 3):
        torch.testing.assert_close(found[i], principal_by_svd(x[i]).float())
    assert principal_map(torch.zeros(0, 3, 4)).shape == (0, 4)


@pytest.mark.parametrize("name", ["pool-linear", "conv-bn-silu", "attention"])
def test_eigencam_and_eigengradcam(name, images):
    model, images = net(name), images.double()
    classes = torch.tensor([[0, 3], [1, 4], [2, 2]])
    a = model.target(images).detach().requires_grad_(True)
    z = model.head(a.clone())
    plain = Explainer(model, "target", "eigencam")(images, classes)
    weighted = Explainer(model, "target", "eigengradcam", "log_probability")(images, classes)
    assert plain.raw.shape == weighted.raw.shape == (3, 2, 4, 4)
    for i in range(3):
        for m in range(2):
            u = z.log_softmax(1)[i, classes[i, m]]
            (g,) = torch.autograd.grad(u, a, retain_graph=True)
            one, both = (channels_of(t[i : i + 1], name) for t in (a.detach(), (g * a).detach()))
            torch.testing.assert_close(plain.raw[i, m].flatten(), principal_by_svd(one), rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(weighted.raw[i, m].flatten(), principal_by_svd(both), rtol=1e-7, atol=1e-11)


NEW = ["scorecam", "ablationcam", "eigencam", "eigengradcam"]


@pytest.mark.parametrize("method", NEW)
def test_an_image_of_nan_harms_no_other(method):
    model = toy()
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    explainer = Explainer(model, "2", method)
    clean = explainer(images, 1)
    images[1, 0, 0, 0] = float("nan")
    with pytest.warns(ShapleyCamWarning, match=r"images \[1\]"):
        result = explainer(images, 1)
    assert result.raw[1].isnan().all()
    torch.testing.assert_close(result.raw[::2], clean.raw[::2])


@pytest.mark.parametrize("method", NEW)
def test_several_layers_and_a_predicted_class(method):
    model = toy()
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    both = Explainer(model, ["0", "2"], method)(images)
    assert torch.equal(both.targets, model(images).argmax(1))
    for k, layer in enumerate(("0", "2")):
        torch.testing.assert_close(both.raws[k], Explainer(model, layer, method)(images, both.targets).raw)
    assert both.heatmaps().shape == (3, 8, 8) and both.heatmaps().std() > 0.01


@pytest.mark.parametrize("method", NEW)
def test_nothing_of_the_users_is_changed(method):
    model = toy()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    kept, state = images.clone(), torch.get_rng_state()
    explainer = Explainer(model, "2", method)
    explainer(images)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(images, kept)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.is_grad_enabled() and not model.training
    model[6].register_forward_hook(_fail_on_large)
    with pytest.raises(InterruptedError):
        Explainer(model, "2", method)(torch.full_like(images, 1e6))
    assert torch.is_grad_enabled()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1


def _fail_on_large(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    if args[0].abs().max() > 1e3:
        raise InterruptedError


@pytest.mark.parametrize("method", ["scorecam", "ablationcam"])
def test_a_utility_need_not_be_differentiable(method):
    model = toy()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))

    def rank(outputs: Tensor, targets: Tensor) -> Tensor:
        return 1.0 + (outputs >= outputs.gather(1, targets[:, None])).sum(1).to(outputs.dtype)

    assert Explainer(model, "2", method, rank)(images, torch.tensor([0, 1])).finite.all()


@pytest.mark.parametrize("chunk", [0, -1, 2.0, True, "8"])
def test_a_bad_chunk_is_refused(chunk):
    with pytest.raises(InputError, match="chunk"):
        Explainer(toy(), "2", "scorecam", chunk=chunk)


def test_scorecam_needs_maps_of_the_images_dimensions():
    model = Split(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(2)), nn.Sequential(nn.Flatten(), nn.Linear(96, 5))).eval()
    with pytest.raises(InputError, match="resizes"):
        Explainer(model, "target", "scorecam", layout="NCL")(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("method", NEW)
def test_half_precision_and_inference_mode(method):
    model = toy()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = Explainer(model, "2", method)(images, 1).heatmaps()
    with torch.inference_mode():
        given = images.clone()
    torch.testing.assert_close(Explainer(model, "2", method)(given, 1).heatmaps(), expected)
    low = Explainer(model.bfloat16(), "2", method)(images.bfloat16(), 1)
    assert low.raw.dtype == torch.float32 and low.finite.all()
    if method != "ablationcam":  # the differences of AblationCAM drown in bfloat16
        assert (low.heatmaps() - expected).abs().mean() < 0.05


def test_the_completeness_gap_needs_derivatives():
    for method in ("scorecam", "ablationcam", "eigencam"):
        for option in ("with_gap", "with_norms"):
            with pytest.raises(InputError, match="no derivatives"):
                Explainer(toy(), "2", method)(torch.randn(2, 3, 8, 8), **{option: True})
