"""Programs against the explainers that they are made from, in float64, and through torch.export."""

import copy

import pytest
import torch
from torch import nn

from shapleycam import METHODS, UTILITIES, Explainer, ExportError, InputError, ModelStateError, Utility

from ..helpers import Split, small_heads

METHODS_OF_PROGRAMS = [row.name for row in METHODS.values() if row.order and row.pooling != "principal"]
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def pooled(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Activations of both signs in front of a pool-and-linear head whose softmax is neither flat nor saturated."""
    torch.manual_seed(3)
    model = Split(*small_heads()["pool-linear"]).eval().to(dtype)
    with torch.no_grad():
        model.head[-1].weight.mul_(4)
    return model


def images(count: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:The Hessian term is zero", "ignore:The path says nothing")
@pytest.mark.parametrize("engine", ["auto", "quadrature", "midpoint"])
@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("method", METHODS_OF_PROGRAMS)
def test_a_program_is_its_explainer(method, utility, engine):
    model, x = pooled(), images()
    # A channel less its mean sums to nothing, by which the pooling "activation" would divide.
    for baseline in ("zero",) if METHODS[method].pooling == "activation" else ("zero", "mean"):
        explainer = Explainer(model, "target", method, utility, engine, backend="torch", baseline=baseline)
        many = torch.tensor([[0, 3], [1, 1], [2, 4], [4, 0], [3, 2]])
        for targets in (None, many[:, 0], many):
            program = explainer.program(x[:2], targets="predicted" if targets is None else "given", size="image")
            expected, found = explainer(x, targets), program(x, targets)
            torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
            assert torch.equal(found.targets, expected.targets)
            torch.testing.assert_close(found.raw, expected.raw, **TIGHT)
            torch.testing.assert_close(found.maps, expected.heatmaps(), rtol=1e-6, atol=1e-6)
        every = explainer.program(x[:2], targets="all")(x)
        expected = explainer(x, torch.arange(5).expand(5, 5).contiguous())
        torch.testing.assert_close(every.raw, expected.raw, **TIGHT)
        assert every.maps.shape == (5, 5, 4, 4)


def test_the_methods_and_engines_differ():
    """Or the comparison above would say little."""
    x = images()
    raws = [
        Explainer(pooled(), "target", method, engine=engine).program(x)(x).raw
        for method in ("shapleycam", "gradcam", "shapleycam-e", "layercam", "gradcam++")
        for engine in (("auto", "quadrature") if method == "shapleycam" else ("auto",))
    ]
    for i, one in enumerate(raws):
        for other in raws[:i]:
            assert (one - other).abs().max() > 1e-3 * one.abs().max()


@pytest.mark.parametrize("baseline", ["mean", torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]])
def test_a_users_coefficients_and_baselines(baseline):
    row = UTILITIES["probability"]
    own = Utility("own", "p_c", row.value, row.gradient, row.curvature)
    explainer = Explainer(pooled(), "target", utility=own, baseline=baseline)
    x = images()
    torch.testing.assert_close(explainer.program(x[:2])(x).raw, explainer(x).raw, **TIGHT)


def test_targets():
    x = images()
    explainer = Explainer(pooled(), "target")
    program = explainer.program(x, targets="given")
    plain = program(x)
    found = program(x, torch.tensor([-1, 2, 5, -2, -1]))
    assert torch.equal(
        found.targets, torch.where(torch.tensor([1, 0, 0, 0, 1]) > 0, plain.targets, torch.tensor([0, 2, 5, -2, 0]))
    )
    assert torch.equal(found.raw[[0, 4]], plain.raw[[0, 4]])
    for part in (found.raw, found.maps):
        assert part[[2, 3]].isnan().all() and part[[0, 1, 4]].isfinite().all()
    with pytest.raises(InputError, match="int64"):
        program(x, torch.zeros(5))
    with pytest.raises(InputError, match=r"a row for each of 5 images, got \(1,\)"):
        program(x, torch.zeros(1, dtype=torch.int64))  # which would broadcast
    with pytest.raises(InputError, match="a row for each of 5 images"):
        program(x, torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(InputError, match="without targets"):
        explainer.program(x)(x, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(InputError, match="targets must be one of"):
        explainer.program(x, targets="some")


def test_sizes():
    x = images()
    explainer = Explainer(pooled(), "target")
    assert explainer.program(x, size=(3, 7))(x).maps.shape == (5, 3, 7)
    with pytest.raises(InputError, match="'layer', 'image'"):
        explainer.program(x, size="big")
    with pytest.raises(InputError, match=r"images \[N, 3, 4, 4\]"):
        explainer.program(x)(torch.zeros(1, 3, 5, 5, dtype=torch.float64))


def test_nan_in_an_image_is_nan_in_its_map_alone():
    model, x = pooled(), images()
    model.target = nn.Sequential(nn.Hardtanh(), model.target)  # NaN passes; infinity is swallowed
    program = Explainer(model, "target").program(x)
    x[1, 0, 0, 0], x[3, 0, 0, 0] = float("nan"), float("inf")
    raw = program(x).raw
    assert raw[[1, 3]].isnan().all() and raw[[0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("targets", ["predicted", "given", "all"])
@pytest.mark.parametrize("engine", ["auto", "quadrature"])
def test_torch_export_takes_it(engine, targets):
    x = images(dtype=torch.float32)
    program = Explainer(pooled(torch.float32), "target", engine=engine).program(x, targets=targets, size=(6, 6))
    given = (torch.tensor([[0, 1], [-1, 9]]),) if targets == "given" else ()
    n, m = torch.export.Dim("n", min=1), torch.export.Dim("m", min=1)
    dims = ({0: n}, {0: n, 1: m}) if given else ({0: n}, None)
    exported = torch.export.export(program, (x[:2], *(given or (None,))), dynamic_shapes=dims)
    assert not any("shapleycam" in str(node.target) for node in exported.graph.nodes)  # plain operators alone
    for count in (1, 5):
        asked = torch.tensor([[0, -1, 7]]).expand(count, 3) if given else None
        found, expected = exported.module()(x[:count], asked), program(x[:count], asked)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)


def test_the_model_is_left_as_it_was():
    model, x = pooled(), images()
    seen: list[int] = []
    model.target.register_forward_hook(lambda *_: seen.append(1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = Explainer(model, "target").program(x)
    seen.clear()
    program.train()(x)
    assert seen == [1] and len(model.target._forward_hooks) == 1 and not model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())

    def fail(*_: object) -> None:
        raise ValueError("on purpose")

    handle = model.head.register_forward_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        program(x)
    handle.remove()
    assert len(model.target._forward_hooks) == 1


def test_an_edited_model():
    model, x = pooled(), images()
    explainer = Explainer(model, "target")
    program = explainer.program(x)
    other = copy.deepcopy(program)
    with torch.no_grad():
        model.head[-1].weight.mul_(-0.5)
    torch.testing.assert_close(program(x).raw, explainer(x).raw, **TIGHT)  # followed
    assert not torch.allclose(other(x).raw, program(x).raw)  # a copy has weights of its own
    model.head[-1] = nn.Linear(6, 5).double()
    with pytest.raises(ModelStateError, match="edited"):
        program(x)
    model.train()
    model.head.append(nn.Dropout())
    with pytest.raises(ModelStateError, match="training mode"):
        program(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "eigengradcam"}, "not EigenGradCAM"),
        ({"method": "randomcam"}, "not RandomCAM"),
        ({"engine": "quadrature", "nodes": "auto"}, "number of nodes"),
        ({"engine": "quadrature", "masks": 4}, "without masks"),
        ({"baseline": torch.zeros(5, 6, 1, dtype=torch.float64)}, "any number of images"),
    ],
)
def test_what_a_program_does_not_have(settings, message):
    with pytest.raises(ExportError, match=message):
        Explainer(pooled(), "target", **settings).program(images())


def test_a_model_that_is_another_in_every_call_is_noticed():
    class Restless(nn.Module):
        def forward(self, x):
            return x * (1 + 0.01 * torch.rand(()))

    model, x = pooled(), images()
    model.target = nn.Sequential(model.target, Restless()).eval()
    with pytest.raises(ExportError, match="differs from the explainer"):
        Explainer(model, "target").program(x)


@pytest.mark.parametrize("head", ["pool-linear", "conv-bn-silu"])
def test_a_program_made_under_autocast_is_none_of_autocast(head):
    model, x = Split(*small_heads()[head]).eval(), images(dtype=torch.float32)
    explainer = Explainer(model, "target", backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        program = Explainer(model, "target", backend="torch").program(x[:2])
        within = program(x)
    # In a call it acts on a model that runs, not on a graph.
    assert within.logits.dtype == (torch.bfloat16 if head == "pool-linear" else torch.float32)
    found, expected = program(x), explainer(x)
    assert found.logits.dtype == torch.float32
    torch.testing.assert_close(found.raw, expected.raw)


def test_the_mark_of_a_class_that_is_none_outlives_a_relu_that_swallows_it(monkeypatch):
    """OpenVINO's maximum of NaN and 0 is 0."""
    clamp = torch.Tensor.clamp_min
    monkeypatch.setattr(torch.Tensor, "clamp_min", lambda x, least: clamp(x.nan_to_num(least), least))
    x = images()
    for method in ("layercam", "shapleycam-e"):
        program = Explainer(pooled(), "target", method, backend="torch").program(x, targets="given")
        raw = program(x, torch.tensor([1, 5, -2, 0, -1])).raw
        assert raw[[1, 2]].isnan().all() and raw[[0, 3, 4]].isfinite().all()
