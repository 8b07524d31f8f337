"""The road as a user sees it: targets, layers, display form, what is left behind, threads."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shapleycam import (
    METHODS,
    BackendStatus,
    DerivativeError,
    Explainer,
    InputError,
    KernelMismatch,
    LayerError,
    Layout,
    ShapleyCamWarning,
)
from shapleycam.ops.backends import LADDER, Backend

from .helpers import Split, available, small_heads, toy


def state(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        [(name, module.training, *(len(getattr(module, h)) for h in hooks)) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.grad, p.data_ptr(), p._version) for name, p in model.named_parameters()],
        [(name, b.data_ptr(), b._version) for name, b in model.named_buffers()],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(),
    )


@pytest.fixture
def batch():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_logits_are_the_models_own(batch):
    model = toy()
    with torch.no_grad():
        expected = model(batch)
    result = Explainer(model)(batch)
    assert torch.equal(result.logits, expected)
    assert torch.equal(result.targets, expected.argmax(1))
    torch.testing.assert_close(result.probabilities, expected.softmax(1).amax(1))
    assert not result.logits.requires_grad and not result.raw.requires_grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", ["pool-linear", "flatten-mlp"])
def test_targets(batch, head, method):
    torch.manual_seed(0)
    model = Split(*small_heads(classes=5)[head]).eval()
    x = batch[:, :, :4, :4]
    explain = lambda targets: Explainer(model, "target", method, seed=1)(x, targets)
    predicted = explain(None)
    assert torch.equal(predicted.raw, explain(predicted.targets).raw)
    two = explain(2)
    assert two.targets.tolist() == [2, 2, 2]
    assert torch.equal(two.raw, explain([2, 2, 2]).raw)
    assert torch.equal(two.raw, explain(np.int64(2)).raw)
    assert torch.equal(two.raw, explain(np.array([2, 2, 2])).raw)
    other = (predicted.targets + 1) % 5
    one = explain(other)
    both = explain(torch.stack((predicted.targets, other), 1))
    assert both.raw.shape == (3, 2, *one.raw.shape[1:])
    assert both.heatmaps().shape == (3, 2, 4, 4)
    # EigenCAM's map is that of the activations, whatever the class.
    assert torch.allclose(both.raw[:, 0], both.raw[:, 1]) == (method == "eigencam")
    if method != "randomcam":  # whose maps are drawn anew
        torch.testing.assert_close(both.raw[:, 0], predicted.raw, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(both.raw[:, 1], one.raw, rtol=1e-5, atol=1e-7)


def test_images_are_independent(batch):
    model = toy()
    together = Explainer(model)(batch)
    for i in range(3):
        alone = Explainer(model)(batch[i : i + 1])
        torch.testing.assert_close(alone.raw[0], together.raw[i], rtol=1e-4, atol=1e-6)


def test_display_form(batch):
    """max(0), min-max, half-pixel bilinear, min-max again."""
    result = Explainer(toy())(batch)

    def unit(m):
        m = m - m.amin((1, 2), keepdim=True)
        return m / (1e-7 + m.amax((1, 2), keepdim=True))

    small = unit(result.raw.clamp_min(0))
    for size in ((8, 8), (20, 13)):
        expected = unit(F.interpolate(small[:, None], size, mode="bilinear", align_corners=False)[:, 0])
        torch.testing.assert_close(result.heatmaps(size), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.heatmaps(), result.heatmaps((8, 8)))
    assert torch.equal(result.heatmaps(5), result.heatmaps((5, 5)))
    for size in (0, (3,), (3, 3, 3), (2.5, 2)):
        with pytest.raises(InputError, match="size"):
            result.heatmaps(size)


def test_several_layers_are_averaged_in_display_form(batch):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3),
        nn.Flatten(),
        nn.Linear(24, 9),
        nn.Tanh(),
        nn.Linear(9, 5),
    ).eval()
    both = Explainer(model, ["0", "2"])(batch)
    single = [Explainer(model, name)(batch) for name in ("0", "2")]
    for raw, alone in zip(both.raws, single, strict=True):
        torch.testing.assert_close(raw, alone.raw, rtol=1e-5, atol=1e-7)
    maps = torch.stack([s.heatmaps() for s in single])  # each min-maxed after the resize; close, but not the definition
    assert both.heatmaps().shape == maps.shape[1:]

    def unit(m):
        m = m - m.amin((1, 2), keepdim=True)
        return m / (1e-7 + m.amax((1, 2), keepdim=True))

    resized = [F.interpolate(unit(s.raw.clamp_min(0))[:, None], (8, 8), mode="bilinear")[:, 0] for s in single]
    torch.testing.assert_close(both.heatmaps(), unit(torch.stack(resized).mean(0)), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="raws"):
        _ = both.raw
    with pytest.raises(InputError, match="single layer"):
        Explainer(model, ["0", "2"])(batch, with_gap=True)


def test_in_place_relu_behind_the_layer_changes_nothing(batch):
    x = batch[:, :, :4, :4]
    for tail in ((), (nn.Linear(5, 5), nn.Tanh())):
        torch.manual_seed(0)
        target, head = small_heads()["relu-pool-linear"]
        head.extend(tail)
        model = Split(target, head).eval()
        for engine in ("auto", "reverse_over_reverse", "forward_over_reverse", "midpoint"):
            for method in ("shapleycam", "hirescam", "randomcam"):
                head[0].inplace = True
                written = Explainer(model, "target", method, engine=engine)(x)
                head[0].inplace = False
                assert torch.equal(written.raw, Explainer(model, "target", method, engine=engine)(x).raw)
    # the layer's own output is explained, not what the ReLU makes of it
    assert (written.raw < 0).any()


def test_an_in_place_operator_that_appears_later_is_harmless(batch):
    model = Split(
        nn.Conv2d(3, 6, 1), nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    ).eval()
    explainer = Explainer(model, "target")
    explainer(batch)
    model.head[0] = nn.ReLU(inplace=True)
    expected = Explainer(model, "target", engine="reverse_over_reverse")(batch).raw
    torch.testing.assert_close(explainer(batch).raw, expected, rtol=1e-4, atol=1e-6)
    curved = Explainer(model, "target", "randomcam", seed=3)
    a = model.target(batch)
    curved(batch)
    assert (a < 0).any()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", ["auto", "reverse_over_reverse", "forward_over_reverse", "midpoint"])
def test_the_model_is_left_as_it_was(batch, engine, outer, frozen):
    model = toy().requires_grad_(not frozen)
    expected = Explainer(model, engine="reverse_over_reverse")(batch).raw
    with outer():
        x = batch.clone()
        before = state(model)
        explainer = Explainer(model, engine=engine)
        result = explainer(x, with_norms=True, with_gap=True)
        assert state(model) == before
        with pytest.raises(InputError):
            explainer(x[:0])
        assert state(model) == before
    if engine != "midpoint":
        torch.testing.assert_close(result.raw.clone(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["auto", "reverse_over_reverse", "forward_over_reverse", "midpoint"])
@pytest.mark.parametrize("when", ["study", "call"])
def test_the_model_is_left_as_it_was_after_an_exception(batch, engine, when):
    class Bomb(nn.Module):
        armed = False

        def forward(self, a):
            if self.armed:
                raise ZeroDivisionError("boom")
            return a

    model = toy()
    model.insert(4, Bomb().eval())
    before = state(model)
    explainer = Explainer(model, "2", engine=engine)
    if when == "call":
        explainer.prepare(batch)
    model[4].armed = True
    with pytest.raises(ZeroDivisionError):
        explainer(batch)
    assert state(model) == before
    model[4].armed = False
    assert torch.equal(explainer(batch).raw, Explainer(model, "2", engine=engine)(batch).raw)


def test_nothing_accumulates(batch):
    explainer = Explainer(toy())

    def tensors():
        # What earlier tests left behind may take more than one round to go.
        counts = [-1, -2]
        while counts[-1] != counts[-2]:
            gc.collect()
            counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
        return counts[-1]

    for _ in range(2):
        explainer(batch, [0, 1, 2])
    before = tensors()
    for _ in range(30):
        explainer(batch, [0, 1, 2])
    assert tensors() <= before


def test_one_forward_pass_per_call(batch):
    for head in ("pool-linear", "flatten-mlp"):
        model = Split(*small_heads()[head]).eval()
        explainer = Explainer(model, "target")
        explainer.prepare(batch[:, :, :4, :4])
        runs = []
        handle = model.target.register_forward_hook(lambda *_: runs.append(1))
        explainer(batch[:, :, :4, :4], torch.tensor([[0, 1], [2, 3], [3, 4]]), with_norms=True)
        handle.remove()
        assert len(runs) == 1


def test_nothing_before_the_target_layer_is_differentiated(batch):
    model = toy()
    seen = []
    model[0].register_forward_hook(lambda m, a, o: seen.append(o.requires_grad))
    explainer = Explainer(model, "2")
    explainer(batch)
    assert seen and not any(seen)


@pytest.mark.parametrize("engine", ["auto", "reverse_over_reverse", "forward_over_reverse"])
def test_threads_with_a_model_each_and_with_one_explainer(engine):
    inputs = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    shared = Split(*small_heads()["attention"]).eval()
    shared_inputs = [x[:, :, :4, :4].contiguous() for x in inputs]
    expected_shared = [Explainer(shared, "target", layout="auto", engine=engine)(x).raw for x in shared_inputs]
    models = [toy() for _ in inputs]
    expected = [Explainer(m, engine=engine)(x).raw for m, x in zip(models, inputs, strict=True)]
    one = Explainer(shared, "target", engine=engine)
    before = state(shared)
    gate = threading.Barrier(8)

    def work(i):
        gate.wait()
        mine = Explainer(models[i], engine=engine)
        for _ in range(6):
            own, common = mine(inputs[i]).raw, one(shared_inputs[i]).raw
        return own, common

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for i, (own, common) in enumerate(results):
        torch.testing.assert_close(own, expected[i], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(common, expected_shared[i], rtol=1e-5, atol=1e-7)
    assert state(shared) == before


def test_structurally_zero_hessian_is_said_once(batch):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    ).eval()
    for layer in ("0", "3"):  # a piecewise-linear head, and a linear one
        explainer = Explainer(model, layer, utility="logit")
        with pytest.warns(ShapleyCamWarning, match="equals its first-order counterpart") as caught:
            first = explainer(batch)
            explainer(batch)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert "Hessian" in first.diagnostics.notes[0]
        assert torch.equal(first.raw, Explainer(model, layer, "gradcam", "logit")(batch).raw)


def test_own_utility_and_own_outputs(batch):
    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = toy()

        def forward(self, x):
            return {"logits": self.inner(x), "extra": 3}

    result = Explainer(Dict().eval())(batch)
    torch.testing.assert_close(result.raw, Explainer(toy())(batch).raw)
    assert result.outputs["extra"] == 3
    assert not result.outputs["logits"].requires_grad, "the caller would keep the head's graph alive"
    own = lambda outputs, targets: outputs["logits"].square().sum(1)
    assert Explainer(Dict().eval(), "inner.2", utility=own)(batch).finite.all()

    class Segment(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.top = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.top(torch.tanh(self.body(x)))

    own = lambda outputs, targets: outputs[:, 1].sigmoid().sum((1, 2))
    result = Explainer(Segment().eval(), "body", utility=own)(batch)
    assert result.targets is None and result.raw.shape == (3, 8, 8) and result.raw.any()
    with pytest.raises(InputError, match="no class probabilities"):
        _ = result.probabilities
    with pytest.raises(InputError, match="your own utility"):
        Explainer(Segment().eval(), "body")(batch)


class Looks(nn.Module):
    """A transformer block with queries, keys and values of their own and normed keys; ends in the mean of the tokens or one."""

    def __init__(self, first_token, patches=None):
        super().__init__()
        self.patches, self.norm = patches or nn.Conv2d(3, 6, 4, stride=4), nn.LayerNorm(6)
        self.query, self.key, self.value, self.wide = (nn.Linear(6, n) for n in (6, 6, 6, 24))
        self.key_norm, self.classifier = nn.LayerNorm(3), nn.Linear(24, 5)
        self.first_token = first_token

    def forward(self, images):
        t = self.patches(images).flatten(2).transpose(1, 2)
        n = self.norm(torch.cat((t.mean(1, keepdim=True), t), 1) if self.first_token else t)
        q, k, v = (layer(n).unflatten(2, (2, 3)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        t = nn.functional.scaled_dot_product_attention(q, self.key_norm(k), v).transpose(1, 2).flatten(2)
        return self.classifier(self.wide(t[:, 0] if self.first_token else t.tanh().mean(1)))


@pytest.mark.parametrize("first_token", [True, False])
def test_projections_inside_attention_are_no_target_layers(first_token):
    # Behind the values the patches no longer reach the keys: the whole of their influence passes through the norm.
    torch.manual_seed(0)
    result = Explainer(Looks(first_token).eval())(torch.randn(2, 3, 16, 12))
    assert result.diagnostics.layers == ("norm",)
    assert result.diagnostics.layouts[0].grid == (4, 3) and result.diagnostics.layouts[0].prefix == int(first_token)


def test_tokens_whose_grid_is_a_guess_are_the_callers_to_name():
    # A video's patches overlap, so nothing says how the tokens lie, except that a convolution had as many positions.
    torch.manual_seed(0)
    model = Looks(True, nn.Conv3d(3, 6, (3, 7, 7), stride=(2, 4, 4), padding=(1, 3, 3))).eval()
    clip = torch.randn(2, 3, 8, 16, 16)
    with pytest.raises(LayerError, match=r"tokens of layer 'norm'.*grid=\(4, 4, 4\), prefix=1") as error:
        Explainer(model)(clip)
    said = str(error.value)
    layout = eval(said[said.index("Layout(") : -1], {"Layout": Layout})
    assert Explainer(model, "norm", layout=layout)(clip).raw.shape == (2, 4, 4, 4)


def test_auto_lists_candidates_when_it_cannot_tell(batch):
    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(self.stem(x).detach().mean((2, 3)))

    with pytest.raises(LayerError, match=r"(?s)detaches.*stem: \(N, 6, 6, 6\)"):
        Explainer(Blind().eval())(batch)
    with pytest.raises(DerivativeError, match="no differentiable path"):
        Explainer(nn.Sequential(nn.Conv2d(3, 6, 3), Detach()).eval(), "0")(batch)


def test_auto_passes_over_a_module_that_runs_twice(batch):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.act, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.SiLU(), nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(self.act(self.two(self.act(self.one(x)))).mean((2, 3)))

    assert Explainer(Shared().eval())(batch).diagnostics.layers == ("two",)


class Detach(nn.Module):
    def forward(self, a):
        return a.detach().mean((2, 3)).tanh()


def test_repr(batch):
    explainer = Explainer(toy(), "2")
    assert "layer=['2']" in repr(explainer) and "engine='auto'" in repr(explainer)
    explainer(batch)
    assert "engine='reverse_over_reverse'" in repr(explainer)


class Wrong(Backend):
    """Says that it serves every operator on a CPU, and is one off."""

    name = "wrong"

    def status(self):
        return BackendStatus(True, "wrong on purpose", ("cpu",))

    def can(self, call):
        return None

    def run(self, operator, arguments):
        return operator.reference(*arguments) + 1


def test_an_explainer_checks_its_kernels(images):
    model = toy()
    expected = Explainer(model)(images).raw
    with LADDER.holding(Wrong()):
        with pytest.raises(KernelMismatch, match="'wrong' computed"):
            Explainer(model, check=True)(images)
        cautious = Explainer(model, check=True, on_mismatch="fallback")
        with pytest.warns(ShapleyCamWarning, match="serves .* no more"):
            torch.testing.assert_close(cautious(images).raw, expected)
        torch.testing.assert_close(cautious(images).raw, expected)  # and says it once
        assert not torch.allclose(Explainer(model, check=False)(images).raw, expected)
    with pytest.raises(InputError, match="fraction"):
        Explainer(model, check=7.0)


def no_forward_mode():
    return torch.autograd.forward_ad._set_fwd_grad_enabled(False)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, no_forward_mode], ids=lambda c: c.__name__)
@pytest.mark.parametrize("engine", ["reverse_over_reverse", "forward_over_reverse"])
@pytest.mark.parametrize("studied", [False, True])
def test_the_callers_modes_change_nothing(context, engine, studied, batch):
    model = toy()
    expected = Explainer(model, engine=engine)(batch).raw
    explainer = Explainer(model, engine=engine)
    if studied:
        explainer.prepare(batch)
    with context():
        found = explainer(batch).raw
        assert torch.is_grad_enabled() == (context is no_forward_mode)
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    assert torch.equal(found, expected) and expected.any()


class Counted(TorchDispatchMode):
    """How many of torch's operators are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif("native" not in available("utility_rows"), reason="needs the compiled extension")
def test_a_closed_form_call_adds_few_operators_to_the_forward_pass():
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    model, images = Split(nn.Conv2d(3, 6, 1), head).eval(), torch.randn(1, 3, 4, 4)
    explainer = Explainer(model, "target", backend="native")
    targets = torch.tensor([3])
    assert explainer(images, targets).diagnostics.engine == "closed_form"
    with Counted() as forward, torch.no_grad():
        model(images)
    with Counted() as call:
        explainer(images, targets)
    added = len(call.names) - len(forward.names)
    assert added <= 15, call.names  # each costs some microseconds, whatever the size
