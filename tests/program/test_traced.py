"""Traced programs against their explainers and torch's own Hessian-vector product, in float64, and through torch.export."""

import copy
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from shapleycam import UTILITIES, Explainer, ExportError, Layout, ModelStateError
from shapleycam.objectives import SegmentationScore
from shapleycam.program import traced
from shapleycam.program.build import off

from ..helpers import Split, by_definition, network, small_heads

HEADS = [name for name in small_heads() if name != "pool-linear"]
TIGHT = {"rtol": 1e-9, "atol": 1e-12}


def curved(head: str = "conv-bn-silu", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    model = Split(*small_heads()[head]).eval().to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 1.5)
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        last.weight.mul_(6)
    return model


def images(count: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("head", "utility"), [*((head, "rest") for head in HEADS), *(("conv-bn-silu", u) for u in UTILITIES if u != "rest")]
)
def test_against_the_definition(head, utility, monkeypatch):
    if head == "attention":  # fused attention has no second derivative
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", _plain_attention)
    model, x = curved(head), images()
    targets = torch.tensor([0, 3, 1, 4, 2])
    program = Explainer(model, "target", utility=utility).program(x[:2], targets="given")
    found = program(x, targets)
    assert program.engine == "reverse_over_reverse"
    for i, target in enumerate(targets.tolist()):
        torch.testing.assert_close(found.raw[i], by_definition(model, x[i : i + 1], target, utility), **TIGHT)


def _plain_attention(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize(
    ("method", "engine"),
    [
        ("shapleycam-e", "auto"),
        ("shapleycam-x", "auto"),
        ("layercam", "auto"),
        ("gradcam++", "auto"),
        ("xgradcam", "quadrature"),
    ]
    + [(method, "quadrature") for method in ("shapleycam", "shapleycam-x")],
)
def test_a_program_is_its_explainer(method, engine):
    model, x = curved(), images()
    explainer = Explainer(model, "target", method, engine=engine, backend="torch")
    program = explainer.program(x[:2], targets="given", size="image")
    many = torch.tensor([[0, 3], [1, 1], [2, 4], [4, 0], [3, 2]])
    for targets in (None, many[:, 1], many):
        expected, found = explainer(x, targets), program(x, targets)
        assert torch.equal(found.targets, expected.targets)
        torch.testing.assert_close(found.logits, expected.logits, **TIGHT)
        torch.testing.assert_close(found.raw, expected.raw, **TIGHT)
        torch.testing.assert_close(found.maps, expected.heatmaps(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("head", "engine", "start"),
    [("conv-bn-silu", "auto", "mean"), ("conv-bn-silu", "midpoint", "mean")]
    + [("attention", engine, "tensor") for engine in ("auto", "quadrature")],
)
def test_baselines(head, engine, start):
    model, x = curved(head), images()
    baseline = "mean" if start == "mean" else torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    explainer = Explainer(model, "target", "shapleycam-h", engine=engine, baseline=baseline, backend="torch")
    torch.testing.assert_close(explainer.program(x[:2])(x).raw, explainer(x).raw, **TIGHT)


def test_a_users_utility_and_outputs():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = curved()

        def forward(self, x):
            z = self.inner(x)
            return {"logits": z, "twice": 2 * z}

    def margin(outputs, targets):
        z = outputs["logits"].tanh() * outputs["twice"]
        return z.gather(1, targets[:, None])[:, 0] - z.mean(1)

    x = images()
    for engine in ("auto", "quadrature"):
        explainer = Explainer(Wrapped().eval(), "inner.target", utility=margin, engine=engine)
        torch.testing.assert_close(explainer.program(x[:2])(x).raw, explainer(x).raw, **TIGHT)
    # Also where the head is pool-and-linear, of which a program's closed form needs the utility's coefficients.
    model = Split(*small_heads()["pool-linear"]).eval().double()
    explainer = Explainer(model, "target", utility=lambda z, t: z.gather(1, t[:, None])[:, 0].tanh() + z.square().sum(1))
    torch.testing.assert_close(explainer.program(x[:2])(x).raw, explainer(x).raw, **TIGHT)


class Last(nn.Module):
    """The last output of a recurrent network over the positions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return self.network(a.flatten(2).transpose(1, 2))[0][:, -1]


class Apply(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return self.function(a)


class Pair(nn.Bilinear):
    def forward(self, a: torch.Tensor) -> torch.Tensor:
        return super().forward(a.mean((2, 3)), a.amax((2, 3)))


def awkward() -> dict[str, tuple[nn.Module, ...]]:
    """Heads, but for the classifier, with operators whose own derivatives are for one number of images."""
    pooled = (nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    statistics = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    statistics.running_mean.uniform_(-1, 1)
    statistics.running_var.uniform_(0.5, 2)
    functional = nn.functional
    return {
        "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), *pooled),
        "bilinear-corners": (nn.Upsample(size=(7, 5), mode="bilinear", align_corners=True), *pooled),
        "bilinear-factor": (nn.Upsample(scale_factor=1.7, mode="bilinear", recompute_scale_factor=False), *pooled),
        "bicubic": (nn.Upsample(size=(3, 7), mode="bicubic"), *pooled),
        "nearest": (nn.Upsample(size=(6, 9)), *pooled),
        "nearest-exact": (nn.Upsample(size=(7, 5), mode="nearest-exact"), *pooled),
        "antialias": (Apply(lambda a: functional.interpolate(a, (3, 2), mode="bicubic", antialias=True)), *pooled),
        "sgn": (Apply(lambda a: (a.sgn() * a.exp()).mean((2, 3))),),
        "instance": (nn.InstanceNorm2d(6, affine=True), *pooled),
        "instance-statistics": (statistics, *pooled),
        "glu": (nn.GLU(1), nn.Conv2d(3, 6, 1), *pooled),
        "gru": (Last(nn.GRU(6, 6, batch_first=True)),),
        "lstm": (Last(nn.LSTM(6, 6, batch_first=True, bidirectional=True)), nn.Linear(12, 6)),
        "std": (Apply(lambda a: a.std((2, 3))),),
        "var": (Apply(lambda a: a.var((2, 3), correction=0)),),
        "unfold": (Apply(lambda a: functional.unfold(a, (2, 3), 1, 1, 2).tanh().mean(2)), nn.Linear(36, 6)),
        "lp-pool": (nn.Softplus(), nn.LPPool2d(2, 2), *pooled),
        "pair": (Pair(6, 6, 6),),
    }


SHORT = ("bilinear", "instance-statistics", "glu", "gru", "std", "unfold", "lp-pool", "pair")  # the others take as long again


@pytest.mark.parametrize("head", [pytest.param(h, marks=() if h in SHORT else pytest.mark.long) for h in awkward()])
def test_operators_that_fix_the_number_of_images(head):
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Conv2d(3, 6, 1), *awkward()[head], nn.Linear(6, 5)).eval().double(), images()
    with torch.no_grad():
        model[-1].weight.mul_(6)
    explainer = Explainer(model, "0", "shapleycam-h", layout=Layout("NCHW", (4, 4)), backend="torch")
    expected = explainer(x, torch.tensor([0, 3, 1, 4, 2]))
    first = Explainer(model, "0", "hirescam", layout=Layout("NCHW", (4, 4)), backend="torch")(x, expected.targets)
    assert (expected.raw - first.raw).abs().max() > 1e-4 * expected.raw.abs().max()  # the second order counts
    found = explainer.program(x[:2], targets="given")(x, expected.targets)
    torch.testing.assert_close(found.raw, expected.raw, **TIGHT)
    torch.testing.assert_close(found.logits, expected.logits, **TIGHT)


def test_a_deviation_of_zero_is_as_nan_as_the_explainer_s():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), Apply(lambda a: a.std(1).flatten(1)), nn.Linear(16, 5))
    model, x = model.eval().double(), images()
    flat = x.clone()
    flat[1, :, 0] = 0
    for method, lost in (("shapleycam-h", [False, True]), ("hirescam", [False, False])):
        explainer = Explainer(model, "1", method, layout=Layout("NCHW", (4, 4)), backend="torch")
        program = explainer.program(x[:2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = explainer(flat[:2], program(flat[:2]).targets)
        found = program(flat[:2]).raw
        assert found.isnan().flatten(1).any(1).tolist() == expected.raw.isnan().flatten(1).any(1).tolist() == lost
        torch.testing.assert_close(found[~torch.tensor(lost)], expected.raw[~torch.tensor(lost)], **TIGHT)


def test_programs_are_made_in_several_threads():
    """What one thread does to tensors without values must not land with the tracer of another."""
    before, wrong = sys.getswitchinterval(), []

    def make():
        try:
            model = network(curved=True).double()
            explainer = Explainer(model, "2", layout=Layout("NCHW", (4, 4)), backend="torch")
            x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            for _ in range(2):
                program = explainer.program(x)
            torch.testing.assert_close(program(x).raw, explainer(x).raw, **TIGHT)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    try:
        sys.setswitchinterval(1e-5)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert wrong == []


@pytest.mark.parametrize("odd", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_hides_no_error(odd):
    expected = torch.tensor([[1.0, 2.0, odd], [3.0, 4.0, 5.0]])
    assert off(expected.clone(), expected) == 0
    for column, value, error in ((1, 2.1, 0.05), (2, 7.0, float("inf")), (2, 0.0 if odd != odd else -odd, float("inf"))):
        got = expected.clone()
        got[0, column] = value
        assert off(got, expected) == pytest.approx(error)


class Attends(nn.MultiheadAttention):
    def forward(self, a):
        tokens = a.flatten(2).transpose(1, 2)
        return super().forward(tokens, tokens, tokens, need_weights=False)[0][:, 0]


def test_a_linear_layer_is_one_product():
    """Attention turns its tokens around, and torch multiplies such rows one by one, each of which reads the weight."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 6, 1), Attends(6, 2, batch_first=True), nn.Linear(6, 5)).eval().double(), images()
    explainer = Explainer(model, "0", "shapleycam-h", layout=Layout("NCHW", (4, 4)), backend="torch")
    program = explainer.program(x[:2])
    torch.testing.assert_close(program(x).raw, explainer(x).raw, **TIGHT)
    for node in program.derivatives.graph.find_nodes(op="call_function", target=torch.ops.aten.expand.default):
        assert (node.args[0].meta["val"].ndim, node.meta["val"].ndim) != (2, 3), node.format_node()


def test_an_operator_without_a_substitute_is_named():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.GRUCell(6, 6), nn.Linear(6, 5)
    )
    with pytest.raises(ExportError, match=r"one number of images, as aten.gru_cell\S* fixes it.*explain a layer behind"):
        Explainer(model.eval().double(), "0", layout=Layout("NCHW", (4, 4))).program(images())


def test_a_program_that_does_not_run_names_the_operator(monkeypatch):
    """Whatever a graph has with the sizes of its example."""
    cut = traced._derivatives

    def fixed(recipe, graph):
        made, doubtful = cut(recipe, graph)
        reshapes = made.graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default)
        reshapes[0].args = (reshapes[0].args[0], [13, 96])
        made.recompile()
        return made, doubtful

    monkeypatch.setattr(traced, "_derivatives", fixed)
    with pytest.raises(
        ExportError, match=r"does not run for 5 images \(in torch.ops.aten.reshape.default\): RuntimeError: shape"
    ):
        Explainer(curved("flatten-mlp"), "target").program(images())


class Around(nn.Module):
    """Something goes past the target layer: an image's own feature, its count, and a table that belongs to no image."""

    def __init__(self):
        super().__init__()
        self.stem, self.target, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 5)
        self.register_buffer("table", torch.randn(6))
        self.scale = torch.full((1,), 1.5, dtype=torch.float64)  # neither a parameter nor a buffer

    def forward(self, x):
        y = self.stem(x)
        a = self.target(y).relu_()
        mixed = (a * y.sigmoid() + self.table[:, None, None].tanh()).view(x.shape[0], 6, -1)
        return self.last(torch.tanh(mixed * self.scale).mean(2)) * 4


@pytest.mark.parametrize("engine", ["auto", "quadrature"])
def test_what_goes_around_the_layer(engine):
    torch.manual_seed(0)
    model, x = Around().eval().double(), images()
    explainer = Explainer(model, "target", engine=engine, backend="torch")
    program = explainer.program(x[:2], targets="given")
    many = torch.tensor([[0, 3, 1], [1, 1, 2], [2, 4, 0], [4, 0, 0], [3, 2, 1]])
    torch.testing.assert_close(program(x, many).raw, explainer(x, many).raw, **TIGHT)


def test_all_classes_must_be_asked_for():
    model, x = curved(), images()
    explainer = Explainer(model, "target")
    with pytest.raises(ExportError, match="5 passes of the head"):
        explainer.program(x, targets="all")
    found = explainer.program(x[:2], targets="all", all_classes=True)(x)
    expected = explainer(x, torch.arange(5).expand(5, 5).contiguous())
    torch.testing.assert_close(found.raw, expected.raw, **TIGHT)
    assert found.maps.shape == (5, 5, 4, 4)


def test_targets():
    x = images()
    explainer = Explainer(curved(), "target")
    program = explainer.program(x, targets="given")
    plain = explainer.program(x)(x)
    found = program(x, torch.tensor([-1, 2, 5, -2, -1]))
    assert torch.equal(found.targets[[0, 4]], plain.targets[[0, 4]]) and found.targets[1:4].tolist() == [2, 5, -2]
    torch.testing.assert_close(found.raw[[0, 4]], plain.raw[[0, 4]], **TIGHT)
    for part in (found.raw, found.maps):
        assert part[[2, 3]].isnan().all() and part[[0, 1, 4]].isfinite().all()


@pytest.mark.parametrize(
    ("engine", "targets"), [("auto", "predicted"), ("auto", "given"), ("auto", "all"), ("quadrature", "given")]
)
def test_torch_export_takes_it(engine, targets):
    x = images(dtype=torch.float32)
    program = Explainer(curved("attention", torch.float32), "target", engine=engine).program(
        x, targets=targets, size=(6, 6), all_classes=True
    )
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


def test_the_model_is_left_as_it_was_and_followed():
    model, x = curved(), images()
    model.head[0].weight.grad = torch.ones_like(model.head[0].weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    explainer = Explainer(model, "target")
    program = explainer.program(x)
    program.train()(x)
    assert not model.training and not model.target._forward_hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and bool((model.head[0].weight.grad == 1).all())
    with torch.no_grad():
        model.head[0].weight.mul_(-1.5)
        model.head[1].running_mean.add_(0.5)
    torch.testing.assert_close(program(x).raw, explainer(x).raw, **TIGHT)
    model.head[0].weight = nn.Parameter(model.head[0].weight.detach() / 2)
    torch.testing.assert_close(program(x).raw, explainer(x).raw, **TIGHT)
    model.head[2] = nn.Tanh()
    with pytest.raises(ModelStateError, match="edited"):
        program(x)


def test_nan_in_an_image_is_nan_in_its_map_alone():
    model, x = curved(), images()
    program = Explainer(model, "target").program(x)
    x[1, 0, 0, 0] = float("nan")
    raw = program(x).raw
    assert raw[1].isnan().all() and raw[[0, 2, 3, 4]].isfinite().all()


class Decides(nn.Module):
    def forward(self, a):
        if a.sum() > 0:  # the place that the error names
            return a * 2
        return a.tanh()


def test_control_flow_is_refused_and_its_place_named():
    model, x = curved(), images()
    model.head.insert(0, Decides())
    with pytest.raises(ExportError, match=r"test_traced\.py:\d+, in forward: if a\.sum\(\) > 0"):
        Explainer(model.eval(), "target").program(x)


def test_a_utility_that_decides_is_refused_and_its_place_named():
    def decides(z, targets):
        picked = z.gather(1, targets[:, None])[:, 0]
        return picked.tanh() if bool(picked.sum() > 0) else picked.exp()

    with pytest.raises(ExportError, match=r"test_traced\.py:\d+, in decides: return picked\.tanh"):
        Explainer(curved(), "target", utility=decides).program(images())


def test_threads_trace_one_after_another():
    models = [curved(head) for head in ("flatten-mlp", "pool-norm-linear")]
    x, found = images(), {}

    def work(index):
        found[index] = Explainer(models[index], "target", backend="torch").program(x[:2])(x).raw

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, model in enumerate(models):
        torch.testing.assert_close(found[index], Explainer(model, "target", backend="torch")(x).raw, **TIGHT)


def test_memory_formats_copies_and_inference_mode():
    model, x = curved("attention", torch.float32), images(dtype=torch.float32)
    explainer = Explainer(model, "target", backend="torch")
    with torch.inference_mode():
        program = explainer.program(x[:2])
        torch.testing.assert_close(program(x).raw, explainer(x).raw)
    torch.testing.assert_close(program(x.to(memory_format=torch.channels_last)).raw, explainer(x).raw)
    exact = Explainer(copy.deepcopy(model).double(), "target", backend="torch")(x.double())
    torch.testing.assert_close(copy.deepcopy(program).double()(x.double()).raw, exact.raw, **TIGHT)


def test_a_fixed_number_of_images_is_refused():
    class Fixed(nn.Module):
        def forward(self, a):
            return a.reshape(len(a), 6, 4, 4)

    model = curved()
    model.head.insert(0, Fixed())
    with pytest.raises(ExportError, match=r"batch.*not len\(x\)"):
        Explainer(model.eval(), "target").program(images(2))


def test_what_a_program_does_not_have():
    x = images()
    with pytest.raises(ExportError, match="one target layer, and there are 2"):
        Explainer(curved(), ["target", "head.0"]).program(x)
    mask = torch.rand(5, 4, 4) > 0.5
    with pytest.raises(ExportError, match="every image of one batch"):
        Explainer(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, 5, 1)).eval().double(), "0",
                  utility=SegmentationScore(mask=mask)).program(x, targets="given")  # fmt: skip
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh(), nn.Conv2d(6, 5, 1)).eval().double()
    with pytest.raises(ExportError, match=r"logits \[N, K\]"):
        Explainer(model, "0", utility=lambda z, t: z.square().mean((1, 2, 3))).program(x)


def test_layouts():
    class Last(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    class Back(nn.Module):
        def forward(self, a):
            return a.permute(0, 3, 1, 2)

    model = curved()
    model.target = nn.Sequential(model.target, Last())
    model.head.insert(0, Back())
    x = images()
    for options in ({}, {"baseline": "mean"}, {"engine": "quadrature", "baseline": "mean"}):
        explainer = Explainer(model.eval(), "target", "shapleycam-h", layout=Layout("NHWC", (4, 4)), backend="torch", **options)
        torch.testing.assert_close(explainer.program(x[:2])(x).raw, explainer(x).raw, **TIGHT)
