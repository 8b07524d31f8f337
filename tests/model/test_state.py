"""What counts as training mode, that it is seen in every call, and models no explanation can be made of."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from shapleycam import Explainer, ModelStateError
from shapleycam.model.state import ModeCheck, mode_dependent, refuse_frozen

from ..helpers import Split, small_heads, toy

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "depends"),
    [
        (nn.BatchNorm2d(3), True),
        (nn.SyncBatchNorm(3), True),
        (nn.LazyBatchNorm1d(), True),
        (nn.InstanceNorm2d(3), False),
        (nn.InstanceNorm2d(3, track_running_stats=True), True),
        (nn.Dropout(), True),
        (nn.AlphaDropout(), True),
        (nn.RReLU(), True),
        (nn.LSTM(3, 3, 2), False),
        (nn.LSTM(3, 3, 2, dropout=0.1), True),
        (nn.MultiheadAttention(4, 2), False),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.Conv2d(3, 3, 1), False),
        (nn.Sequential(), False),
        (nn.DataParallel(Plain()), False),
        (Plain(), True),
        (type("Mine", (nn.LSTM,), {"__module__": "mine"})(3, 3), True),
        (torch.fx.symbolic_trace(Plain()), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_which_modules_depend_on_the_mode(module, depends):
    assert mode_dependent(module) is depends
    model = nn.Sequential(module)
    for part in model.modules():
        part.training = part is module or part is model
    if depends:
        with pytest.raises(ModelStateError, match=r"training mode \(0\)"):
            ModeCheck(model).check()
    else:
        assert ModeCheck(model).check() is False


def parametrized(kind):
    model = toy()
    if kind == "lora":
        low_rank = type("LowRank", (nn.Module,), {"forward": lambda self, w: w + 0.1, "__module__": "mine"})
        parametrize.register_parametrization(model[2], "weight", low_rank())
    else:
        getattr(parametrizations, kind)(model[2], "weight")
    return model


@pytest.mark.parametrize("kind", ["weight_norm", "orthogonal", "spectral_norm", "lora"])
def test_parametrizations_behind_eval(kind):
    model = parametrized(kind)
    # The fact behind this: PyTorch leaves the container that it adds in training mode.
    assert model[2].parametrizations.training and not model[2].training
    expected = Explainer(Split(model[:4], model[4:]).eval(), "target")(X).raw
    model = parametrized(kind)
    torch.testing.assert_close(Explainer(model, "3")(X).raw, expected)


def test_a_parametrization_that_depends_on_the_mode_counts():
    model = parametrized("spectral_norm")
    model[2].parametrizations.weight[0].train()
    with pytest.raises(ModelStateError, match=r"2\.parametrizations\.weight\.0"):
        Explainer(model)(X)


def test_a_parametrized_layer_of_pytorch_is_still_one():
    model = parametrized("weight_norm")
    model[2].training = True
    assert not mode_dependent(model[2])
    Explainer(model)(X)
    norm = nn.BatchNorm2d(3)
    parametrizations.weight_norm(norm, "weight", dim=None)
    assert mode_dependent(norm)


def test_the_flag_of_a_wrapper_is_not_the_models():
    model = toy()
    model.insert(4, nn.BatchNorm2d(6))
    model.eval()
    wrapper = nn.DataParallel(model)
    assert wrapper.training
    torch.testing.assert_close(Explainer(wrapper)(X).raw, Explainer(model)(X).raw)
    wrapper.train()
    with pytest.raises(ModelStateError, match=r"training mode \(module\.4\)"):
        Explainer(wrapper)(X)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(toy())
        assert wrapper.training
        torch.testing.assert_close(Explainer(wrapper)(X).raw, Explainer(toy())(X).raw)
        assert wrapper.training
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("added", [nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Sequential(nn.Identity(), nn.Dropout(0.5))])
@pytest.mark.parametrize("how", ["insert", "replace", "deep", "into a leaf"])
def test_what_is_added_later_is_seen(added, how):
    model = toy()
    model.insert(2, nn.Sequential(nn.Sequential(nn.Identity())))
    model.eval()
    explainer = Explainer(model)
    explainer(X)
    added.train()
    if how == "insert":
        model.insert(2, added)
    elif how == "replace":
        model[2] = added
    elif how == "deep":
        model[2][0][0] = added
    else:
        model[2][0][0].add_module("extra", added)
    with pytest.raises(ModelStateError, match="training mode"):
        explainer(X)
    added.eval()
    explainer(X)


def test_a_change_of_the_tree_is_told_once():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Identity()).eval()
    check = ModeCheck(model)
    assert check.check() is False
    model[1] = nn.Identity()
    assert [check.check(), check.check()] == [True, False]
    del model[1]
    assert [check.check(), check.check()] == [True, False]
    model[0].append(nn.BatchNorm2d(3).eval())
    assert [check.check(), check.check()] == [True, False]
    model[0][1].train()
    with pytest.raises(ModelStateError, match=r"0\.1"):
        check.check()


def test_scripted_and_traced():
    model = toy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted, traced = torch.jit.script(model), torch.jit.trace(model, X)
        part, head = torch.jit.script(model[:4]), torch.jit.trace(model[4:], model[:4](X))
    with pytest.raises(ModelStateError, match="scripted.*original nn.Module"):
        Explainer(scripted)
    with pytest.raises(ModelStateError, match="traced.*original nn.Module"):
        Explainer(traced)
    with pytest.raises(ModelStateError, match="not a scripted or traced one"):
        Explainer(nn.Sequential(part, *model[4:]).eval())(X)
    # A traced head is a function like any other.
    half = Explainer(nn.Sequential(*model[:4], head).eval(), "3")(X)
    torch.testing.assert_close(half.raw, Explainer(model, "3")(X).raw)


def test_a_traced_trunk_is_named():
    model = toy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trunk = torch.jit.trace(model[:4], X)
    with pytest.raises(ModelStateError, match="part '0' is scripted or traced"):
        Explainer(nn.Sequential(trunk, *model[4:]).eval(), "0.2")(X)


def test_exported():
    model = toy()
    program = torch.export.export(model, (X,))
    with pytest.raises(ModelStateError, match="calls no modules.*original nn.Module"):
        Explainer(program.module())
    torch.testing.assert_close(Explainer(torch.export.unflatten(program), "3")(X).raw, Explainer(model, "3")(X).raw)
    traced = torch.fx.symbolic_trace(model)
    refuse_frozen(traced)
    torch.testing.assert_close(Explainer(traced, "3")(X).raw, Explainer(model, "3")(X).raw)


@pytest.mark.parametrize("layer", ["auto", "3"])
def test_dynamically_quantised(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(toy(), {nn.Linear})
        with pytest.raises(ModelStateError, match=r"quantised layers \(6, 8\).*floating-point model"):
            Explainer(model, layer)(X)
        assert Explainer(model, "3", "ablationcam")(X).raw.abs().sum() > 0


@pytest.mark.parametrize("layer", ["auto", "3"])
def test_weights_made_in_inference_mode(layer):
    with torch.inference_mode():
        model = toy()
    with pytest.raises(ModelStateError, match=r"'0\.weight' was made under torch\.inference_mode.*inference_mode\(False\)"):
        Explainer(model, layer)(X)
    # Nothing is differentiated here, so nothing stands in the way.
    torch.testing.assert_close(Explainer(model, "3", "eigencam")(X).raw, Explainer(toy(), "3", "eigencam")(X).raw)
    with torch.inference_mode():
        flat = Split(*small_heads()["pool-linear"]).eval()
    assert Explainer(flat, "target")(X).diagnostics.engine == "closed_form"


def test_statistics_made_in_inference_mode():
    model = Split(*small_heads()["conv-bn-silu"]).eval()
    with torch.inference_mode():
        model.head[1].running_mean = model.head[1].running_mean + 0.1
    with pytest.raises(ModelStateError, match=r"'head\.1\.running_mean'"):
        Explainer(model, "target")(X)


def test_other_errors_of_the_model_pass_through():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("out of paper")

    with pytest.raises(RuntimeError, match="out of paper"):
        Explainer(nn.Sequential(*toy()[:4], Fails()).eval(), "3")(X)


def test_a_module_that_returns_a_constant_map_is_no_candidate():
    """As DETR's position embedding, whose output does not depend on the image."""

    class Positions(nn.Module):
        def forward(self, a):
            return torch.linspace(-1, 1, a.shape[2] * a.shape[3]).view(1, 1, *a.shape[2:]).expand_as(a)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.positions, self.fc = nn.Conv2d(3, 6, 3, padding=1), Positions(), nn.Linear(6, 5)

        def forward(self, x):
            a = self.conv(x)
            return self.fc((a + self.positions(a)).tanh().mean((2, 3)))

    torch.manual_seed(0)
    result = Explainer(Model().eval())(X)
    assert result.diagnostics.layers == ("conv",) and result.raw.abs().sum() > 0
